import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rsseg.checkpoint import read_header
from rsseg.errors import DataError, Interrupted, MachineError, RecipeError, UsageError, WeightsError
from rsseg.files import read_rows
from rsseg.inference.network import load_segmenter
from rsseg.metrics import scores
from rsseg.recipe import RecipeSource, parse_recipe
from rsseg.runs import RunFolder, choose_model, find_run, list_runs, newest_finished
from rsseg.training.progress import EvaluationReport, Progress, StepReport
from rsseg.training.recorder import resolved_yaml
from rsseg.training.run import check, plan, train
from tests.training.recipes import tiny_recipe, tiny_values

QUIET = Progress()


class SignalAt(Progress):
    """Sends this process a signal when a step is reported."""

    def __init__(self, step: int, number: signal.Signals = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def on_step(self, report: StepReport) -> None:
        if report.step == self.step:
            os.kill(os.getpid(), self.number)


class Listening(Progress):
    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.evaluations: list[EvaluationReport] = []

    def on_step(self, report: StepReport) -> None:
        self.steps.append(report)

    def on_evaluation(self, report: EvaluationReport) -> None:
        self.evaluations.append(report)


def assert_same_tensors(a: Path, b: Path) -> None:
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def assert_same_ends(a: RunFolder, b: RunFolder) -> None:
    for name in ("model", "best", "last", "state"):
        assert_same_tensors(getattr(a, name), getattr(b, name))
    tables = [[row | {"seconds": ""} for row in read_rows(run.path / "metrics.csv")] for run in (a, b)]
    assert tables[0] == tables[1]


def test_run_folder_holds_everything(rgb_dataset: Path, tmp_path: Path) -> None:
    listener = Listening()
    recipe = tiny_recipe(rgb_dataset, trainer={"keep_checkpoints": 2})
    result = train(recipe, output=tmp_path / "runs", name="my run", progress=listener, source="# as given\n")
    run = result.run
    assert run.name.endswith("_ktda_my-run_001")
    files = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    assert {file for file in files if not file.startswith("evaluations/val/")} == {
        "evaluations/val.json",
        "recipe.yaml",
        "config.resolved.yaml",
        "manifest.json",
        "data.json",
        "metrics.csv",
        "steps.csv",
        "log.txt",
        "events.jsonl",
        "model.safetensors",
        "confusion/val-00000003.json",
        "confusion/val-00000006.json",
        "checkpoints/best.safetensors",
        "checkpoints/last.safetensors",
        "checkpoints/step-00000004.safetensors",
        "checkpoints/step-00000006.safetensors",
        "checkpoints/last.state/state.safetensors",
        "checkpoints/last.state/previous.safetensors",
    }
    assert (run / "recipe.yaml").read_text() == "# as given\n"
    resolved = (run / "config.resolved.yaml").read_text()
    assert parse_recipe(RecipeSource("resolved", resolved)) == recipe
    assert "  steps: 6  # given" in resolved
    assert "  clip_grad: null  # default" in resolved
    names = {name: [name] for name in ("a: b", "c #d", "[e]", "- f", "no", "1", "*g", "")}
    odd = tiny_recipe(rgb_dataset, data={"classes": {"into": names}})
    assert parse_recipe(RecipeSource("resolved", resolved_yaml(odd))) == odd

    manifest = RunFolder(run).manifest()
    assert (manifest.state, manifest.reason, manifest.steps) == ("finished", "all steps", 6)
    assert manifest.best_score == result.best_score
    assert set(manifest.used.values()) == {"training", "selection"}
    assert json.loads((run / "data.json").read_text())["task"]["name"] == "tiny"
    assert [report.step for report in listener.steps] == [2, 3, 4, 6]
    assert [row["step"] for row in read_rows(run / "steps.csv")] == ["2", "3", "4", "6"]

    matrix = json.loads((run / "confusion/val-00000003.json").read_text())
    assert scores(matrix["counts"], matrix["classes"]) == listener.evaluations[0].scores
    best = max(listener.evaluations, key=lambda report: report.score or 0)
    assert (result.best_step, result.scores) == (best.step, best.scores)
    assert_same_tensors(run / "model.safetensors", run / "checkpoints/best.safetensors")
    assert (tmp_path / "runs" / "latest").resolve() == run.resolve()

    details = RunFolder(run).details()
    assert details.metric_columns == ("step", "miou", "mf1", "oa", "iou_field", "iou_road", "iou_water")
    assert [row[0] for row in details.metric_rows] == ["3", "6"]
    assert details.facts["best step"] == best.step

    header = read_header(run / "model.safetensors")
    assert header.training["step"] == best.step
    assert header.backbones["student"]["name"] == "convnext_mini"
    assert load_segmenter(run).task == header.task
    assert choose_model(None, tmp_path / "runs") == run / "model.safetensors"
    assert find_run(Path("latest"), tmp_path / "runs").path == run


@pytest.mark.parametrize(("step", "stopped_after"), [(2, 3), (3, 3), (4, 5), (6, 6)])
def test_interrupted_run_resumes_exactly(rgb_dataset: Path, tmp_path: Path, step: int, stopped_after: int) -> None:
    """Steps 3 and 6 end with an evaluation, which the signal cuts short."""
    recipe = tiny_recipe(rgb_dataset, trainer={"clip_grad": 1.0}, ship="average", ema_decay=0.5)
    unbroken = RunFolder(train(recipe, output=tmp_path / "a", progress=QUIET).run)
    with pytest.raises(Interrupted, match=r"SIGTERM: stopped after step .* Continue with `rsseg train --resume"):
        train(recipe, output=tmp_path / "b", progress=SignalAt(step))
    stopped = find_run(None, tmp_path / "b")
    assert stopped.manifest().state == "interrupted"
    assert stopped.manifest().steps == stopped_after
    (stopped.path / "checkpoints" / ".best.safetensors.77.tmp").write_text("of a killed process")
    train(recipe, output=tmp_path / "b", resume=Path("latest"), progress=QUIET)
    assert_same_ends(unbroken, stopped)
    assert list(stopped.path.rglob(".*")) == []
    manifest = stopped.manifest()
    assert manifest.state == "finished"
    assert len(manifest.resumed) == 1
    with pytest.raises(UsageError, match="has its 6 steps already"):
        train(recipe, output=tmp_path / "b", resume=stopped.path, progress=QUIET)


KILLED = """
import sys
from pathlib import Path
import torch
from rsseg.recipe import load_recipe
from rsseg.training.run import train
torch.set_num_threads(1)
train(load_recipe(sys.argv[1]), output=Path(sys.argv[2]))
"""


def test_killed_run_resumes_bit_identically(rgb_dataset: Path, tmp_path: Path) -> None:
    values = tiny_values(rgb_dataset)
    values["trainer"] |= {"steps": 40, "checkpoint_every": 1, "eval_every": 10, "grad_accum_steps": 1}
    file, output = tmp_path / "tiny.yaml", tmp_path / "killed"
    file.write_text(yaml.safe_dump(values))
    with subprocess.Popen([sys.executable, "-c", KILLED, str(file), str(output)], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not list(output.glob("*/checkpoints/last.state/state.safetensors")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.5))
        process.kill()
    killed = find_run(None, output)
    assert killed.summary().state == "killed"
    recipe = parse_recipe(RecipeSource("resolved", killed.recipe_file.read_text()))
    train(recipe, output=output, resume=killed.path, progress=QUIET)
    unbroken = train(recipe, output=tmp_path / "unbroken", progress=QUIET)
    assert_same_ends(RunFolder(unbroken.run), killed)


def test_steps_may_be_extended_but_values_that_matter_may_not_change(rgb_dataset: Path, tmp_path: Path) -> None:
    short = {"steps": 2, "eval_every": 9}
    constant = {"main": {"schedule": {"decay": "constant"}}}
    first = train(tiny_recipe(rgb_dataset, trainer=short, optimizers=constant), output=tmp_path, progress=QUIET)
    changed = tiny_recipe(rgb_dataset, trainer=short | {"batch_size": 3}, optimizers=constant, seed=6)
    with pytest.raises(RecipeError, match=r"seed: was 5, is 6; trainer.batch_size: was 2, is 3"):
        train(changed, output=tmp_path, resume=first.run, progress=QUIET)
    longer = tiny_recipe(rgb_dataset, trainer=short | {"steps": 3}, optimizers=constant)
    assert train(longer, output=tmp_path, resume=first.run, progress=QUIET).steps == 3
    straight = train(longer, output=tmp_path / "straight", progress=QUIET)
    assert_same_tensors(RunFolder(first.run).last, RunFolder(straight.run).last)


def test_run_leaves_only_files_that_its_documentation_names(rgb_dataset: Path, tmp_path: Path) -> None:
    kept = {"keep_checkpoints": 2, "checkpoint_every": 1}
    run = train(tiny_recipe(rgb_dataset, trainer=kept | {"steps": 3}), output=tmp_path, progress=QUIET).run
    train(tiny_recipe(rgb_dataset, trainer=kept | {"steps": 4}), output=tmp_path, resume=run, progress=QUIET)
    page = (Path(__file__).parents[2] / "docs" / "runs.md").read_text()
    left = {re.sub(r"-\d+", "-STEP", path.relative_to(run).as_posix()) for path in run.rglob("*") if path.is_file()}
    assert {"checkpoints/last.state/previous.safetensors", "checkpoints/step-STEP.safetensors"} <= left
    assert [name for name in sorted(left) if f"`{name}`" not in page] == []
    assert {path.name for path in tmp_path.iterdir()} == {rgb_dataset.name, run.name, "latest"}
    beside = {path.name for path in rgb_dataset.iterdir()}
    assert beside == {"images", "masks", "rsseg-index.json", ".rsseg-cache"}


def test_run_without_state_cannot_be_resumed(rgb_dataset: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(rgb_dataset, trainer={"steps": 1})
    run = RunFolder(train(recipe, output=tmp_path, progress=QUIET).run)
    run.state.write_bytes(run.state.read_bytes()[:-10])
    with pytest.raises(WeightsError, match="no state to resume from"):
        train(recipe, output=tmp_path, resume=run.path, progress=QUIET)
    with pytest.raises(UsageError, match="not a run folder"):
        train(recipe, output=tmp_path, resume=tmp_path / "absent", progress=QUIET)


def test_damaged_state_falls_back_to_the_one_before(rgb_dataset: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(rgb_dataset)
    unbroken = RunFolder(train(recipe, output=tmp_path / "a", progress=QUIET).run)
    with pytest.raises(Interrupted):
        train(recipe, output=tmp_path / "b", progress=SignalAt(4))
    broken = find_run(None, tmp_path / "b")
    broken.state.write_bytes(broken.state.read_bytes()[:-10])
    train(recipe, output=tmp_path / "b", resume=broken.path, progress=QUIET)
    assert_same_ends(unbroken, broken)
    log = (broken.path / "log.txt").read_text()
    assert "is damaged; the run resumes from the state before it, after step 4." in log


def test_changed_recipe_is_resumed_only_anyway(rgb_dataset: Path, tmp_path: Path) -> None:
    run = train(tiny_recipe(rgb_dataset, trainer={"steps": 2}), output=tmp_path, progress=QUIET).run
    changed = tiny_recipe(rgb_dataset, trainer={"steps": 3, "clip_grad": 1.0})
    with pytest.raises(RecipeError, match=r"clip_grad: was None, is 1.0.*--resume-anyway accepts the change"):
        train(changed, output=tmp_path, resume=run, progress=QUIET)
    assert train(changed, output=tmp_path, resume=run, progress=QUIET, resume_anyway=True).steps == 3
    assert "warning: resumed with changes: trainer.clip_grad: was None, is 1.0.\n" in (run / "log.txt").read_text()
    sgd = tiny_recipe(rgb_dataset, trainer={"steps": 4}, optimizers={"main": {"name": "sgd"}})
    assert train(sgd, output=tmp_path, resume=run, progress=QUIET, resume_anyway=True).steps == 4
    assert "optimizer 'main' has another type than before" in (run / "log.txt").read_text()


def test_diverged_run_names_the_loss_and_keeps_the_last_good_checkpoint(rgb_dataset: Path, tmp_path: Path) -> None:
    wild = {"main": {"lr": 1e9, "schedule": {"decay": "constant", "warmup_steps": 3, "warmup_start": 0.0}}}
    trainer = {"checkpoint_every": 1, "grad_accum_steps": 1, "steps": 9}
    with pytest.raises(RecipeError, match=r"diverged: .* not finite by step \d.*last good checkpoint is .*last.safe"):
        train(tiny_recipe(rgb_dataset, optimizers=wild, trainer=trainer), output=tmp_path, progress=QUIET)
    run = find_run(None, tmp_path)
    assert run.manifest().state == "failed"
    assert "diverged" in run.manifest().reason
    assert "diverged" in (run.path / "log.txt").read_text()
    assert all(tensor.isfinite().all() for tensor in load_file(run.last).values())


def test_patience_and_hours_end_a_run(rgb_dataset: Path, tmp_path: Path) -> None:
    frozen = {"main": {"lr": 1e-12}}
    patient = tiny_recipe(rgb_dataset, optimizers=frozen, trainer={"steps": 50, "eval_every": 1, "patience": 2})
    result = train(patient, output=tmp_path, progress=QUIET)
    assert (result.reason, result.state) == ("patience", "finished")
    assert result.steps < 50
    late = train(tiny_recipe(rgb_dataset, trainer={"steps": 50, "max_hours": 1e-9}), output=tmp_path, progress=QUIET)
    assert (late.reason, late.state, late.steps) == ("max_hours", "stopped", 1)
    assert "step 1 of 50; the run is saved, and the command below continues it)" in late.text()
    assert late.text().endswith(f"\nrsseg train --resume {late.run}")
    assert [run.path for run in list_runs(tmp_path)] == [result.run, late.run]
    assert newest_finished(tmp_path).model == late.model


def test_limit_of_hours_counts_from_the_last_resume(rgb_dataset: Path, tmp_path: Path) -> None:
    first = train(tiny_recipe(rgb_dataset, trainer={"steps": 2}), output=tmp_path, progress=QUIET)
    state = RunFolder(first.run).state
    with safe_open(state, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata["counters"] = json.dumps(json.loads(metadata["counters"]) | {"elapsed_s": 3600.0})
    save_file(tensors, state, metadata)
    longer = tiny_recipe(rgb_dataset, trainer={"steps": 4, "max_hours": 1.0})
    resumed = train(longer, output=tmp_path, resume=first.run, progress=QUIET)
    assert (resumed.reason, resumed.steps) == ("all steps", 4)


def test_student_or_average_is_shipped(rgb_dataset: Path, tmp_path: Path) -> None:
    ends = {}
    for ship in ("average", "student"):
        recipe = tiny_recipe(rgb_dataset, trainer={"steps": 3, "monitor": "last"}, ship=ship, ema_decay=0.9)
        result = train(recipe, output=tmp_path / ship, progress=QUIET)
        ends[ship] = load_file(result.model)
        assert read_header(result.model).training["weights"] == ship
        stored = load_file(RunFolder(result.run).state)
        prefix = "ema/" if ship == "average" else "method/segmenter."
        assert all(torch.equal(tensor, stored[prefix + name]) for name, tensor in ends[ship].items())
    assert not all(torch.equal(ends["average"][name], tensor) for name, tensor in ends["student"].items())


def test_misfit_of_the_evaluation_is_found_before_training(rgb_dataset: Path) -> None:
    for values, message in (
        ({"overlap": 9999}, r"eval\.overlap: 9999 pixels do not fit tiles of \d+. Choose 0 to \d+"),
        ({"ignore_classes": ["watre"]}, r"eval\.ignore_classes: 'watre' is no class.*Did you mean 'water'"),
    ):
        with pytest.raises(RecipeError, match=message):
            plan(tiny_recipe(rgb_dataset, eval=values))
    with pytest.raises(RecipeError, match="eval: overlap: 9 pixels do not fit tiles of 8"):
        tiny_recipe(rgb_dataset, eval={"tile": 8, "overlap": 9})


class OutOfMemory(Progress):
    def on_step(self, report: StepReport) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")


def test_gpu_out_of_memory_is_a_machine_error(rgb_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"out of memory. Tried to allocate 2.00 GiB. Choose a smaller batch"):
        train(tiny_recipe(rgb_dataset), output=tmp_path, progress=OutOfMemory())
    assert "Choose a smaller batch" in find_run(None, tmp_path).manifest().reason


class Scatters(Progress):
    """Runs a kernel that has no deterministic form."""

    def on_step(self, report: StepReport) -> None:
        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))


def test_kernel_without_deterministic_form_is_named(
    rgb_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with pytest.raises(RecipeError, match=r"trainer\.deterministic: put_ has no deterministic form"):
        train(tiny_recipe(rgb_dataset, trainer={"deterministic": True}), output=tmp_path, progress=Scatters())
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_mixed_precision_trains_on_the_cpu(rgb_dataset: Path, tmp_path: Path) -> None:
    for amp in ("bf16", "auto"):
        recipe = tiny_recipe(rgb_dataset, trainer={"steps": 1, "amp_dtype": amp, "channels_last": True})
        assert train(recipe, output=tmp_path, progress=QUIET).steps == 1


def test_shortest_run_on_one_image_works(rgb_dataset: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        rgb_dataset,
        trainer={"steps": 1, "eval_every": 100, "log_every": 100, "checkpoint_every": 100},
        data={"streams": {"labeled": {"count": 1}}, "val": {"count": 1}},
    )
    assert train(recipe, output=tmp_path, progress=QUIET).scores is not None


def test_missing_parts_are_found_before_anything_is_built(rgb_dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "runs"
    cases = [
        (DataError, "no prepared dataset", {"data": {"path": str(tmp_path)}}),
        (DataError, "set trainer.monitor: last", {"data": {"val": {"split": "absent"}}}),
        (WeightsError, "no weights file", {"student": {"weights": str(tmp_path / "w.safetensors")}}),
        (MachineError, "device", {"trainer": {"device": "cuda:77"}}),
    ]
    for error, message, changes in cases:
        with pytest.raises(error, match=message):
            train(tiny_recipe(rgb_dataset, **changes), output=output, progress=QUIET)
    assert not output.exists()
    no_validation = tiny_recipe(rgb_dataset, data={"val": {"split": "absent"}}, trainer={"monitor": "last", "steps": 1})
    result = train(no_validation, output=output, progress=QUIET)
    assert (result.scores, result.best_score) == (None, None)
    assert result.model.exists()


def test_unwritable_output_is_a_machine_error(rgb_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot be written"):
        train(tiny_recipe(rgb_dataset), output=tmp_path / "file", progress=QUIET)


def test_plan_and_check_write_nothing(rgb_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = {p for p in tmp_path.rglob("*") if ".rsseg" not in str(p)}
    planned = plan(tiny_recipe(rgb_dataset))
    assert planned.streams["labeled"].images == 5
    assert len(planned.text().splitlines()) <= 12
    assert "saving and loading work" in check(tiny_recipe(rgb_dataset))
    assert {p for p in tmp_path.rglob("*") if ".rsseg" not in str(p)} == before
