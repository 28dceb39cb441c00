"""Trackers behind the recorder: event files, missing packages, resuming."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import yaml

from rsseg.cli import run
from rsseg.errors import UsageError
from rsseg.files import read_rows
from rsseg.runs import RunFolder
from rsseg.training.checkpoints import PREVIOUS
from rsseg.training.progress import Progress, StepReport
from rsseg.training.run import plan, train
from tests.training.recipes import tiny_recipe, tiny_values


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars of TensorBoard's event files as TensorBoard shows them: tag -> steps and values."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(folder))
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_gets_the_values_of_the_tables(rgb_dataset: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(rgb_dataset, trainer={"log": ["tensorboard"]})
    result = train(recipe, output=tmp_path, progress=Progress())
    found = events(result.run / "tensorboard")
    steps = read_rows(result.run / "steps.csv")
    assert found["loss/total"] == [(int(row["step"]), pytest.approx(float(row["loss"]), rel=1e-6)) for row in steps]
    metrics = read_rows(result.run / "metrics.csv")
    assert found["val/miou"] == [(int(row["step"]), pytest.approx(float(row["miou"]), rel=1e-6)) for row in metrics]
    assert {"val/iou/water", "lr/main", "speed/images_per_s"} <= found.keys()


def test_a_resumed_run_replaces_the_steps_that_it_repeats(rgb_dataset: Path, tmp_path: Path) -> None:
    first = train(tiny_recipe(rgb_dataset, trainer={"log": ["tensorboard"]}), output=tmp_path, progress=Progress())
    state = RunFolder(first.run).state
    shutil.copy(state.with_name(PREVIOUS), state)  # as after a crash: the last steps were logged, but not saved
    longer = tiny_recipe(rgb_dataset, trainer={"log": ["tensorboard"], "steps": 8})
    train(longer, output=tmp_path, resume=first.run, progress=Progress())
    steps = [int(row["step"]) for row in read_rows(first.run / "steps.csv")]
    assert [step for step, _ in events(first.run / "tensorboard")["loss/total"]] == steps
    assert steps == sorted(set(steps))


def test_a_tracker_may_be_added_on_resume(rgb_dataset: Path, tmp_path: Path) -> None:
    first = train(tiny_recipe(rgb_dataset), output=tmp_path, progress=Progress())
    longer = tiny_recipe(rgb_dataset, trainer={"log": ["tensorboard"], "steps": 8})
    train(longer, output=tmp_path, resume=first.run, progress=Progress())
    assert [step for step, _ in events(first.run / "tensorboard")["loss/total"]] == [8]


def test_a_failed_run_keeps_its_values(rgb_dataset: Path, tmp_path: Path) -> None:
    class Failing(Progress):
        def on_step(self, report: StepReport) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tiny_recipe(rgb_dataset, trainer={"log": ["tensorboard"]}), output=tmp_path, progress=Failing())
    folder = (tmp_path / "latest/tensorboard").resolve()
    assert [step for step, _ in events(folder)["loss/total"]] == [2]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_before_anything_is_built(
    rgb_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == name else find(wanted))
    recipe = tiny_recipe(rgb_dataset, trainer={"log": [name]})
    for attempt in (lambda: plan(recipe), lambda: train(recipe, output=tmp_path / "runs", progress=Progress())):
        with pytest.raises(UsageError, match=rf"trainer\.log: {name} is not installed.*rsseg\[{name}\]"):
            attempt()
    assert not (tmp_path / "runs").exists()


def test_wandb_writes_an_offline_run(rgb_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    recipe = tiny_recipe(rgb_dataset, trainer={"log": ["wandb"], "steps": 2})
    result = train(recipe, output=tmp_path, progress=Progress())
    assert list((result.run / "wandb").glob("offline-run-*/run-*.wandb"))


def test_the_command_takes_trackers(
    rgb_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(yaml.safe_dump(tiny_values(rgb_dataset)), encoding="utf-8")
    assert run(["train", "--recipe", "mine.yaml", "--steps", "2", "--log", "tensorboard"]) == 0
    assert list(Path("runs").glob("*/tensorboard/events.*"))
    capsys.readouterr()
    assert run(["train", "--recipe", "mine.yaml", "--log", "tensorbord"]) == 2
    assert "--log" in capsys.readouterr().err
