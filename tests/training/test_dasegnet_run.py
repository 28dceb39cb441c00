"""Whole runs of ST-DASegNet: files that must stay closed, what chooses the weights, how a run ends, what ships."""

import copy
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import yaml
from safetensors.torch import load_file

from rsseg.cli import run
from rsseg.data.dataset import CACHE_NAME
from rsseg.data.index import SegmentationIndex
from rsseg.errors import RecipeError
from rsseg.files import read_rows
from rsseg.inference.network import load_segmenter
from rsseg.recipe import Recipe, RecipeSource, parse_recipe
from rsseg.runs import RunFolder
from rsseg.training.progress import Progress
from rsseg.training.run import plan, train
from tests.conftest import write_tif
from tests.training.test_run import Listening, assert_same_tensors
from tests.unit.dasegnet_models import SIDE, make_recipe


def values_for(data: Path, *, val: str = "south", **changes: Any) -> dict[str, Any]:
    """Labels in the south, images in the north; validation on the domain `val`."""
    values = make_recipe().model_dump(mode="json")
    values["data"] = {
        "path": str(data),
        "augment": {"crop_size": SIDE},
        "streams": {"source": {"domain": "south"}, "target": {"domain": "north"}},
        "val": {"split": "val", "domain": val},
        "test": {"split": "test", "domain": "north"},
    }
    values["trainer"] = {
        "steps": 3,
        "batch_size": 2,
        "workers": 0,
        "eval_every": 1,
        "checkpoint_every": 1,
        "log_every": 1,
    }
    for key, change in copy.deepcopy(changes).items():
        values[key] = values[key] | change if isinstance(change, dict) else change
    return values


def recipe_for(data: Path, *, val: str = "south", **changes: Any) -> Recipe:
    return parse_recipe(RecipeSource("unit", yaml.safe_dump(values_for(data, val=val, **changes))))


def poison(data: Path, domain: str) -> None:
    """Make every mask of a domain unreadable."""
    shutil.rmtree(data / CACHE_NAME, ignore_errors=True)
    index = SegmentationIndex.load(data)
    for item in index.items:
        file = index.mask_file(item)
        if item.domain == domain and file is not None:
            file.write_bytes(b"poison")


def test_target_masks_are_never_opened_by_a_run(rgb_dataset: Path, tmp_path: Path) -> None:
    recipe = recipe_for(rgb_dataset)
    clean = train(recipe, output=tmp_path / "clean", progress=Progress())
    poison(rgb_dataset, "north")
    poisoned = train(recipe, output=tmp_path / "poisoned", progress=Progress())
    assert_same_tensors(clean.model, poisoned.model)


def test_lowest_entropy_chooses_the_weights_and_opens_no_mask(rgb_dataset: Path, tmp_path: Path) -> None:
    poison(rgb_dataset, "north")
    listener = Listening()
    recipe = recipe_for(rgb_dataset, val="north", trainer={"monitor": "entropy"})
    result = train(recipe, output=tmp_path, progress=listener)
    entropies = [report.entropy for report in listener.evaluations]
    assert all(entropy is not None and 0 < entropy < 1 for entropy in entropies)
    assert result.best_score == min(e for e in entropies if e is not None)
    assert [report.improved for report in listener.evaluations][result.best_step - 1]  # type: ignore[operator]
    assert {row["miou"] for row in read_rows(result.run / "metrics.csv")} == {""}
    assert RunFolder(result.run).manifest().selection == "lowest entropy on 1 images, without labels"


@pytest.mark.parametrize(
    ("domain", "monitor", "selection"),
    [
        ("south", "miou", "best miou on labels of 1 images"),
        ("north", "oa", "best oa on labels of 1 images of the domain of stream 'target', which trains without labels"),
        ("north", "last", "the last weights ship, without selection"),
    ],
)
def test_manifest_says_whose_labels_chose_the_weights(
    domain: str, monitor: str, selection: str, rgb_dataset: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(rgb_dataset, val=domain, trainer={"monitor": monitor, "steps": 1})
    assert selection in plan(recipe).text()
    result = train(recipe, output=tmp_path, progress=Progress())
    assert RunFolder(result.run).manifest().selection == selection


LATE = {"warmup_steps": 2, "warmup_start": 0.0, "warmup_style": "mmcv"}
EXPLODING = {"disc_source": {"name": "adam", "schedule": LATE}}


def exploding(recipe: Recipe) -> Recipe:
    """A rate that no recipe may ask for."""
    wild = recipe.optimizers["disc_source"].model_copy(update={"lr": 1e30})
    return recipe.model_copy(update={"optimizers": {**recipe.optimizers, "disc_source": wild}})


def test_exploding_discriminator_ends_the_run_and_leaves_the_last_good_checkpoint(
    rgb_dataset: Path, tmp_path: Path
) -> None:
    recipe = exploding(recipe_for(rgb_dataset, optimizers=EXPLODING))
    with pytest.raises(RecipeError, match=r"training diverged: .* not finite by step 2\..*last\.safetensors"):
        train(recipe, output=tmp_path, progress=Progress())
    (path,) = tmp_path.glob("*_dasegnet_*")
    assert all(tensor.isfinite().all() for tensor in load_file(RunFolder(path).last).values())
    assert RunFolder(path).manifest().state == "failed"


def test_adversarial_losses_that_are_not_finite_are_named(rgb_dataset: Path, tmp_path: Path) -> None:
    rarely = {"log_every": 3, "eval_every": 3, "checkpoint_every": 3}
    recipe = exploding(recipe_for(rgb_dataset, optimizers=EXPLODING, trainer=rarely))
    with pytest.raises(RecipeError, match=r"diverged: the loss\w* .*disc_source.* not finite by step 3.*No checkpoint"):
        train(recipe, output=tmp_path, progress=Progress())


def with_other_classes(data: Path) -> None:
    """The same dataset under `other`, with one class called meadow."""
    shutil.copytree(data, data.parent / "other")
    index = SegmentationIndex.load(data.parent / "other")
    renamed = index.task.classes[0].model_copy(update={"name": "meadow"})
    task = index.task.model_copy(update={"classes": (renamed, *index.task.classes[1:])})
    index.model_copy(update={"task": task}).save(data.parent / "other")


@pytest.mark.parametrize(
    ("setting", "code", "said"),
    [
        ("data.augment.crop_size=40", 3, ("crops of 40 pixels", "smallest legal crop_size is 48")),
        ("source_decoder_weights=[1.0, 2.0]", 3, ("has 2 entries", "has 3 classes", "road")),
        ("self_training.class_weights=[1.0, 1.0, 1.0, 1.0]", 3, ("self_training.class_weights has 4 entries",)),
        ("data.streams.target.split=unlabeled", 4, ("the split 'unlabeled' is empty", "train")),
        ("data.streams.target.domain=east", 4, ("no domain 'east'", "north")),
        ("data.streams.target.path={other}", 4, ("meadow", "field")),
        ("data.streams.target.bands=[nir, red, green]", 4, ("'nir'", "red", "`bands`")),
        ("data.streams.target.bands=[red]", 4, ("1 bands are chosen (red)", "the task has 3")),
        ("data.match_gsd=true", 4, ("has no ground sampling distance", "gsd_m")),
        ("optimizers={main: {}}", 3, ("needs ['disc_source', 'disc_target', 'main']",)),
    ],
)
def test_bad_recipe_is_refused_before_a_run_begins(
    setting: str,
    code: int,
    said: tuple[str, ...],
    rgb_dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_other_classes(rgb_dataset)
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(values_for(rgb_dataset)))
    setting = setting.replace("{other}", str(rgb_dataset.parent / "other"))
    assert run(["train", "--recipe", str(file), "--set", setting, "--output", str(tmp_path / "runs")]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    flat = " ".join(captured.err.split())
    assert [words for words in said if words not in flat] == []
    assert not (tmp_path / "runs").exists()


def test_shipped_file_alone_predicts_a_target_scene(
    rgb_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = train(recipe_for(rgb_dataset, trainer={"steps": 1}), output=tmp_path / "runs", progress=Progress())
    names = load_file(result.model)
    assert not any(word in name for name in names for word in ("disc", "teacher", "averages"))
    model = shutil.copy(result.model, tmp_path / "alone.safetensors")
    for folder in (rgb_dataset, tmp_path / "runs"):
        shutil.rmtree(folder)
    monkeypatch.setattr(socket, "socket", None)  # no network
    assert load_segmenter(tmp_path / "alone.safetensors").tile.size == SIDE
    pixels = np.random.default_rng(0).integers(0, 255, (3, 150, 90), np.uint8)
    scene = write_tif(tmp_path / "scene.tif", pixels, descriptions=("red", "green", "blue"))
    assert run(["predict", str(scene), "--model", str(model), "--output", str(tmp_path / "classes.tif")]) == 0
    with rasterio.open(tmp_path / "classes.tif") as file:
        assert (file.height, file.width) == (150, 90)
        assert set(np.unique(file.read(1))) <= {0, 1, 2}
