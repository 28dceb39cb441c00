"""Prepare, train, resume, evaluate and predict through the command line, with what users get wrong on the way."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from rsseg.cli import run
from tests.conftest import write_png, write_tif
from tests.training.recipes import tiny_values

CLASSES = """
name: tiny
bands: [red, green, blue]
classes:
  - {name: field, value: 0, color: "#ff0000"}
  - {name: road, value: 1, color: "#00ff00"}
  - {name: water, value: 2, color: "#0000ff"}
"""


@pytest.fixture
def workplace(tmp_path: Path, rgb_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with `mine.yaml`, a tiny recipe for `rgb_dataset`; commands run in it."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(yaml.safe_dump(tiny_values(rgb_dataset)))
    return tmp_path


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(1).integers(1, 255, (3, 70, 90), np.uint8)
    pixels[:, :10] = 0
    return write_tif(tmp_path / "scene one.tif", pixels, nodata=0)


def values_of(model: Path) -> dict[str, bytes]:
    with safe_open(model, framework="np") as file:
        return {key: file.get_tensor(key).tobytes() for key in file.keys()}  # noqa: SIM118 - not a mapping


def test_from_images_to_a_class_raster(
    workplace: Path, rgb_dataset: Path, scene: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("classes.yaml").write_text(CLASSES)
    folder = ["--images", "images/*.png", "--masks", "masks/*.png", "--split-ratio", "train=0.6,val=0.2,test=0.2"]
    prepare = ["dataset", "prepare", "folder", "--src", str(rgb_dataset), "--classes", "classes.yaml"]
    assert run([*prepare, *folder, "--out", "data/own"]) == 0
    assert run(["dataset", "verify", "data/own"]) == 0
    assert run(["train", "--method", "ktda", "--recipe", "mine.yaml", "--data", "data/own", "--steps", "2"]) == 0
    assert "rsseg eval" in capsys.readouterr().out

    assert run(["eval", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["scores"]["miou"] >= 0
    assert "runs" in captured.err
    assert run(["eval", "--split", "train"]) == 0
    assert "used for the training" in capsys.readouterr().err
    assert run(["eval", "--fail-under", "miou=0.999"]) == 8
    assert re.search(r"miou is 0\.\d{4}, below 0\.999\.", capsys.readouterr().err)
    assert run(["info", "runs/latest"]) == 0
    assert not set("{}[]") & set(capsys.readouterr().out)

    assert run(["predict", str(scene)]) == 0
    assert "runs" in capsys.readouterr().err
    with rasterio.open("scene one_rsseg.tif") as product, rasterio.open(scene) as source:
        assert (product.crs, product.transform, product.shape) == (source.crs, source.transform, source.shape)
        assert (product.read(1)[:10] == product.nodata).all()
        assert set(np.unique(product.read(1)[10:])) <= {0, 1, 2}
        assert product.colormap(1)[0][:3] == (255, 0, 0)
    assert run(["predict", str(scene)]) == 2, "an existing file needs --overwrite"


@pytest.mark.parametrize("folder", ["2024", "1.5", "yes", "~", "a: b", "-", "[1", "\u00fc \U0001f30d"])
def test_dataset_folder_may_have_any_name(workplace: Path, rgb_dataset: Path, folder: str) -> None:
    Path(folder).symlink_to(rgb_dataset, target_is_directory=True)
    assert run(["train", "--recipe", "mine.yaml", "--data", folder, "--dry-run"]) == 0


def test_dry_run_of_a_resume_checks_what_the_resume_checks(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--recipe", "mine.yaml", "--steps", "2", "--name", "short"]) == 0
    changed = ["train", "--resume", "runs/latest", "--steps", "3", "--set", "trainer.clip_grad=1"]
    capsys.readouterr()
    for more in (["--dry-run"], []):
        assert run([*changed, *more]) == 3
        error = capsys.readouterr().err
        assert "cannot be resumed: trainer.clip_grad: was None, is 1.0. Restore the recipe" in error
    assert run(["train", "--resume", "runs/latest", "--dry-run"]) == 2, "it has its steps already"
    capsys.readouterr()
    assert run([*changed, "--resume-anyway", "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["warning: resumed with changes: trainer.clip_grad: was None, is 1.0."]
    assert "3 steps of 2 micro-steps, resuming after step 2" in captured.out
    assert run(["train", "--resume", "runs/latest", "--steps", "3", "--dry-run"]) == 0


def test_run_at_the_limit_of_hours_says_how_to_continue(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--recipe", "mine.yaml", "--steps", "9", "--max-hours", "1e-9"]) == 0
    output = capsys.readouterr().out
    assert "stopped at the limit of trainer.max_hours after step 1 of 9" in output
    assert "\nrsseg train --resume runs" in output
    assert run(["runs", "ls"]) == 0
    assert " stopped " in capsys.readouterr().out
    assert run(["runs", "show"]) == 0
    shown = capsys.readouterr().out
    assert "None" not in shown
    assert "max_hours" in shown


def test_model_with_keys_of_another_version_is_one_sentence(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", "--recipe", "mine.yaml", "--steps", "1"]) == 0
    model = Path("runs/latest/model.safetensors")
    with safe_open(model, "pt") as file:
        header, tensors = json.loads(file.metadata()["rsseg"]), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    header["recipe"] |= {"ema": 1, "taps": 2, "kind": 3}
    save_file(tensors, "old.safetensors", {"rsseg": json.dumps(header)})
    capsys.readouterr()
    assert run(["eval", "--model", "old.safetensors"]) == 5
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "old.safetensors" in line
    assert "(and 2 more such problems)" in line


def in_two_processes(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rsseg", "train", "--recipe", "mine.yaml", "--gpus", "2", *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_two_processes_check_in_one_folder_and_print_once(workplace: Path) -> None:
    done = in_two_processes("--check")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("saving and loading work") == 1
    done = in_two_processes("--dry-run", "--json")
    assert json.loads(done.stdout)["processes"] == 2


def test_one_device_for_two_processes_is_refused_once(workplace: Path) -> None:
    done = in_two_processes("--device", "cuda:0")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: device 'cuda:0' is one device, but each of several processes needs its own. Choose cuda."
    ]


def test_killed_training_resumes_to_the_same_weights(workplace: Path) -> None:
    steps = ["--steps", "30", "--set", "trainer.eval_every=100"]
    command = [sys.executable, "-m", "rsseg", "train", "--recipe", "mine.yaml", *steps, "--name", "killed"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)
    while not list(Path("runs").glob("*killed*/checkpoints/last.state/state.safetensors")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (folder,) = Path("runs").glob("*killed*")
    assert run(["eval"]) == 5, "a run that never finished is not chosen by itself"
    assert run(["train", "--resume", str(folder)]) == 0
    assert run(["train", "--recipe", "mine.yaml", *steps, "--name", "unbroken"]) == 0
    (unbroken,) = Path("runs").glob("*unbroken*")
    assert values_of(folder / "model.safetensors") == values_of(unbroken / "model.safetensors")


def test_interrupted_training_says_how_to_go_on(workplace: Path) -> None:
    command = [sys.executable, "-m", "rsseg", "train", "--recipe", "mine.yaml", "--steps", "10000"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    while not list(Path("runs").glob("*/checkpoints/last.state/state.safetensors")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in errors
    assert "Traceback" not in errors


@pytest.mark.skipif(sys.platform != "linux", reason="finds the loader process in /proc")
def test_killed_loader_process_is_a_limit_of_the_machine(workplace: Path) -> None:
    """The system kills one when memory is short."""
    options = ["--steps", "10000", "--set", "trainer.workers=1", "--set", "trainer.eval_every=10000"]
    command = [sys.executable, "-m", "rsseg", "train", "--recipe", "mine.yaml", *options]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    while not list(Path("runs").glob("*/checkpoints/last.state/state.safetensors")) and process.poll() is None:
        time.sleep(0.02)
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 6, errors
    assert "fewer loader workers" in errors
    (manifest,) = Path("runs").glob("*_ktda_*/manifest.json")
    assert json.loads(manifest.read_text())["state"] == "failed"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "--recipe", "missing.yaml"], 3, "rsseg recipe ls"),
        (["train", "--recipe", "mine.yaml", "--method", "mtdf"], 3, "--method"),
        (["train", "--recipe", "mine.yaml", "--set", "trainer.stepz=3"], 3, "'steps'"),
        (
            ["train", "--recipe", "mine.yaml", "--set", "trainer.steps=many"],
            3,
            "error: --set trainer.steps: trainer.steps: Input",
        ),
        (["train", "--recipe", "mine.yaml", "--data", "elsewhere"], 4, "elsewhere"),
        (["--offline", "train", "--recipe", "mine.yaml", "--set", "student.weights=pretrained"], 5, "weights"),
        (["train", "--resume", "runs/nothing"], 2, "nothing"),
        (
            ["train", "--recipe", "mine.yaml", "--max-hours", "0"],
            2,
            "error: --max-hours: trainer.max_hours: Input should be greater",
        ),
        (["eval"], 5, "train"),
        (["eval", "--model", "mine.yaml"], 5, "mine.yaml"),
        (["predict", "scene.tif"], 5, "train"),
        (["dataset", "prepare", "folder"], 2, "--src"),
        (["dataset", "prepare", "potsdam"], 2, "pass --src"),
        (["dataset", "verify", "elsewhere"], 4, "elsewhere"),
    ],
)
def test_mistake_is_one_sentence_with_its_exit_code(
    workplace: Path, arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == code
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not Path("runs").exists()


@pytest.mark.parametrize("file", ["images/00.png", "masks/00.png"])
def test_broken_file_stops_training_and_is_named(
    workplace: Path, rgb_dataset: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (rgb_dataset / file).write_bytes((rgb_dataset / file).read_bytes()[:100])
    assert run(["train", "--recipe", "mine.yaml"]) == 4
    assert file in capsys.readouterr().err


def test_mask_with_an_undeclared_value_stops_training_and_is_named(
    workplace: Path, rgb_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_png(rgb_dataset / "masks/00.png", np.full((40, 64), 9, np.uint8))
    assert run(["train", "--recipe", "mine.yaml"]) == 4
    assert "masks/00.png: 1 undeclared mask value(s): 9 (" in capsys.readouterr().err
