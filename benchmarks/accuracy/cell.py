"""Run one job: train, and for a cell score the test split once and measure the shipped network.

    python -m benchmarks.accuracy.cell FOLDER

FOLDER holds `recipe.yaml` and `job.json`; `result.json` and the run come into it. An interrupted run is resumed.
"""

import json
import platform
import shutil
import signal
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from benchmarks.accuracy.table import NEEDED
from rsseg.data.sources import Datasets
from rsseg.errors import Interrupted, RssegError
from rsseg.evaluation.model import read_samples
from rsseg.evaluation.model_file import evaluate_model
from rsseg.files import read_rows, write_json
from rsseg.inference.device import resolve_device
from rsseg.inference.image import predict_image
from rsseg.inference.network import load_segmenter
from rsseg.recipe import Recipe, load_recipe
from rsseg.runs import RunFolder, list_runs
from rsseg.training.progress import Progress
from rsseg.training.run import train

PANELS = 2
SPEED_SIDE, SPEED_ROUNDS = 504, 3


def main(folder: Path) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the scheduler decides; it sends SIGTERM
    job: dict[str, Any] = json.loads((folder / "job.json").read_text())
    recipe = load_recipe(str(folder / "recipe.yaml"))
    try:
        run, seconds, cpu_seconds = _train(recipe, folder / "runs")
        manifest = run.manifest()
        result: dict[str, Any] = job | {
            "val_miou": manifest.best_score,
            "best_step": manifest.best_step,
            "curve": [[int(row["step"]), float(row["miou"])] for row in read_rows(run.path / "metrics.csv")],
            "processor": _processor() if recipe.trainer.device == "cpu" else manifest.device,
            "versions": dict(manifest.versions),
            "parameters": manifest.plan["parameters"],
            "trainable": manifest.plan["trainable"],
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
        }
        if job["score"]:
            evaluation = evaluate_model(run.model, split="test", device=recipe.trainer.device)
            result |= {
                "test": {name: getattr(evaluation.scores, name) for name in ("miou", "mf1", "oa")},
                "test_iou": {c.name: c.iou for c in evaluation.scores.classes},
                "megapixels_per_s": _speed(run.model, recipe),
            }
            _panels(run.model, recipe, folder)
    except Interrupted:
        return 130
    except RssegError as error:
        result = job | {"error": str(error)}
    if job["score"] and job["arm"] in NEEDED and "error" not in result:
        shutil.copyfile(run.model, folder / "model.safetensors")  # other arms learn from it
    write_json(folder / "result.json", result | {"date": f"{datetime.now().astimezone():%Y-%m-%d %H:%M}"})
    shutil.rmtree(folder / "runs", ignore_errors=True)  # weights and optimizer state of hundreds of cells
    return 0


def _train(recipe: Recipe, runs: Path) -> tuple[RunFolder, float | None, float | None]:
    """A finished run with its wall and processor seconds: the interrupted one resumed, or a new one.

    Of a run that was finished before its scores were written the seconds are not known; of a resumed one the
    processor's are not.
    """
    before = [run for run in list_runs(runs) if run.state.is_file()] if runs.is_dir() else []
    if before and before[-1].manifest().steps >= recipe.trainer.steps:
        return before[-1], None, None
    started = time.process_time()
    result = train(recipe, output=runs, resume=before[-1].path if before else None, progress=Progress())
    return RunFolder(result.run), result.seconds, None if before else time.process_time() - started


def _processor() -> str:
    """The processor's model name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _speed(model: Path, recipe: Recipe) -> float:
    """Megapixels per second of the predictor on one square image; the best of a few rounds.

    On a processor by its own seconds, so that other work on the machine does not count.
    """
    device = resolve_device(recipe.trainer.device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    segmenter = load_segmenter(model, device=recipe.trainer.device)
    image = torch.rand(len(segmenter.task.bands), SPEED_SIDE, SPEED_SIDE, generator=torch.Generator().manual_seed(0))
    best = float("inf")
    for _ in range(SPEED_ROUNDS):
        started = clock()
        predict_image(segmenter, image, None, recipe.eval, device=device)
        best = min(best, clock() - started)
    return SPEED_SIDE**2 / 1e6 / best


def _panels(model: Path, recipe: Recipe, folder: Path) -> None:
    """PNG of the first test images: input, truth and prediction, for the figures."""
    segmenter = load_segmenter(model, device=recipe.trainer.device)
    task, device = segmenter.task, resolve_device(recipe.trainer.device)
    colors = np.array([c.color for c in task.classes] + [(160, 160, 160)] * (256 - task.num_classes), np.uint8)
    source = Datasets(recipe.data, recipe.seed).open(recipe.data.test, "test", task, masks=True)
    few = source._replace(items=source.items[:: max(len(source.items) // PANELS, 1)][:PANELS])
    for number, sample in enumerate(read_samples(few, segmenter.fill)):
        prediction = predict_image(segmenter, sample.image, None, recipe.eval, device=device)
        views = {
            "input": (255 * sample.image[:3].clamp(0, 1)).byte().permute(1, 2, 0).numpy(),
            "truth": colors[sample.mask],
            "prediction": colors[prediction],
        }
        for name, pixels in views.items():
            cv2.imwrite(str(folder / f"panel{number}-{name}.png"), np.ascontiguousarray(pixels[..., ::-1]))


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    raise SystemExit(main(Path(sys.argv[1])))
