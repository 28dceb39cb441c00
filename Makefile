# One command each: demo, test, check, bench, bench-accuracy, docs, clean.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RSSEG := $(BIN)/rsseg
DEMO ?= demo-output
CUT_NOISE := --quiet --disable-pip-version-check --root-user-action=ignore

.PHONY: demo test check bench bench-predict bench-gpu bench-accuracy docs clean

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rsseg needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing rsseg into $(VENV) (several minutes the first time: torch is large)"
	@$(BIN)/python -m pip install $(CUT_NOISE) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the test tools into $(VENV)"
	@$(BIN)/python -m pip install $(CUT_NOISE) -e '.[dev]'
	@touch $@

# Prepare the built-in dataset, train, evaluate, predict a scene, and compare with a per-pixel classifier.
demo: $(VENV)/.installed
	@$(RSSEG) dataset prepare demo --out $(DEMO)/data/demo --overwrite
	@$(RSSEG) train --recipe demo-ktda --data $(DEMO)/data/demo --output $(DEMO)/runs
	@$(RSSEG) eval --runs $(DEMO)/runs
	@$(BIN)/python benchmarks/pixel_baseline.py --data $(DEMO)/data/demo
	@$(RSSEG) predict $(DEMO)/data/demo/scene/scene.tif --runs $(DEMO)/runs --output $(DEMO)/scene_classes.tif --preview $(DEMO)/scene_classes.png --overwrite
	@echo
	@echo "Everything is in $(DEMO)/: data/demo (images and masks), runs/latest (model, scores, log),"
	@echo "scene_classes.tif (opens in QGIS) and scene_classes.png (scene, classes and legend as a picture)."

# The whole suite: one torch thread per worker, two workers.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every ratio; the scenes take longest.
bench: bench-predict
	$(BIN)/python benchmarks/confusion_matrix.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/prepare.py
	$(BIN)/python benchmarks/rasterize.py
	$(BIN)/python benchmarks/ktda_step.py
	$(BIN)/python -m benchmarks.ktda_side
	$(BIN)/python benchmarks/mtdf_step.py
	$(BIN)/python benchmarks/strong_views.py
	$(BIN)/python benchmarks/dasegnet_step.py

# GPU figures, as many as fit into four minutes; needs a GPU.
bench-gpu: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/gpu.py

# Scenes: rate against the bare network and the usual slide inference, memory, seams. About 20 minutes, 9 GB of memory.
bench-predict: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/predict_speed.py
	$(BIN)/python benchmarks/predict_slide.py
	$(BIN)/python benchmarks/predict_memory.py
	$(BIN)/python benchmarks/predict_memory.py --stub --sides 5000 20000
	$(BIN)/python benchmarks/predict_seams.py
	$(BIN)/python benchmarks/predict_engines.py

# Every method beside plain training of the same network: docs/results.md. Hours; a second call continues.
# ACCURACY="--quick" runs three tiny cells; else for example ACCURACY="--data DATA --weights WEIGHTS --jobs 2 --hours 8".
bench-accuracy: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.accuracy $(ACCURACY)

# The documentation site, in docs/_build. A broken link or reference is an error.
docs: $(VENV)/.installed-dev
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build
	@echo "docs/_build/index.html"

clean:
	rm -rf $(DEMO) docs/_build docs/reference build dist .pytest_cache .mypy_cache .ruff_cache
