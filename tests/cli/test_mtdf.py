"""RS-MTDF as a user types it: what bad input gets, the import of published weights, prediction without teachers."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
import yaml
from safetensors.torch import save_file

from rsseg.backbones.backbone import create_backbone
from rsseg.checkpoint import read_header
from rsseg.cli import run
from rsseg.config import BackboneConfig
from rsseg.data.index import SegmentationIndex
from tests.conftest import rgb_task, write_tif
from tests.unit.mtdf_models import PYRAMID, TAUGHT, TEACHERS
from tests.unit.test_mtdf_importer import checkpoint

TEACHER = {"name": "dino", "backbone": {"name": "vit_base_patch14_dinov2"}}


def write_recipe(folder: Path, data: Path, **changes: Any) -> str:
    """Two labeled images of five, crops of 32 pixels, two steps."""
    values = copy.deepcopy(TAUGHT) | {
        "trainer": {"steps": 2, "batch_size": 2, "workers": 0, "eval_every": 2, "checkpoint_every": 2},
        "data": {
            "path": str(data),
            "augment": {"crop_size": 32},
            "streams": {"labeled": {"count": 2}, "unlabeled": {"count": 2, "complement": True}},
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values | changes))
    return str(file)


def without_pretrained(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A machine that has no pretrained weights and reaches no network."""
    monkeypatch.setenv("HF_HUB_CACHE", str(folder / "no-weights"))
    monkeypatch.setenv("RSSEG_OFFLINE", "1")


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("data.streams.labeled.count=5", 4, "selects all|complement leaves no image"),
        ("data.streams.unlabeled={split: nowhere}", 4, "split 'nowhere' is empty"),
        ("data.streams.labeled={fraction: 0.01}", 4, "selects none"),
        ("data.augment.crop_size=36", 3, "36 pixels are not a multiple of 8"),
        ("complementary_dropout=true", 3, "set strong_views to 2"),
        ("only_teachers=[clip]", 3, "only_teachers names 'clip'"),
        ("confidance=0.9", 3, "Did you mean 'confidence'"),
        ("start=nowhere", 5, "nowhere: no such file or folder"),
    ],
)
def test_bad_values_end_with_their_exit_code_and_one_message(
    rgb_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, code: int, message: str
) -> None:
    settings = ["--set", override]
    if override == "data.streams.labeled.count=5":
        settings += ["--set", "data.streams.unlabeled.count=5"]
    recipe = write_recipe(tmp_path, rgb_dataset)
    assert run(["train", "--recipe", recipe, "--dry-run", *settings]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert any(part in " ".join(captured.err.split()) for part in message.split("|"))


def test_missing_teacher_weights_exit_5_before_any_image_is_read(
    rgb_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_pretrained(monkeypatch, tmp_path)
    for image in (rgb_dataset / "images").iterdir():
        image.unlink()
    recipe = write_recipe(tmp_path, rgb_dataset, teachers=[TEACHER])
    assert run(["train", "--recipe", recipe, "--output", str(tmp_path / "runs")]) == 5
    assert "rsseg weights pull vit_base_patch14_dinov2" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("bands", "code", "named"), [(None, 3, "'dino'"), (["red", "green", "swir"], 4, "'swir'")])
def test_teacher_with_incompatible_bands_is_named(
    uint16_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bands: list[str] | None,
    code: int,
    named: str,
) -> None:
    without_pretrained(monkeypatch, tmp_path)
    cached = tmp_path / "no-weights" / "models--timm--convnext_atto.d2_in1k"
    for folder, file, text in (("refs", "main", "1"), ("snapshots/1", "model.safetensors", "")):
        (cached / folder).mkdir(parents=True)
        (cached / folder / file).write_text(text)
    teacher = {"name": "dino", "backbone": {"name": "convnext_atto", "out_indices": [3]}, "bands": bands}
    recipe = write_recipe(tmp_path, uint16_dataset, teachers=[teacher])
    assert run(["train", "--recipe", recipe, "--dry-run"]) == code
    assert named in " ".join(capsys.readouterr().err.split())


def test_absent_class_is_a_warning_with_its_name(
    rgb_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = SegmentationIndex.load(rgb_dataset)
    items = tuple(item.model_copy(update={"classes": (5, 0, 5)}) for item in index.items)
    index.model_copy(update={"items": items}).save(rgb_dataset)
    recipe = write_recipe(tmp_path, rgb_dataset)
    assert run(["train", "--recipe", recipe, "--output", str(tmp_path / "runs")]) == 0
    assert "none of its 2 images contains road" in " ".join(capsys.readouterr().err.split())


def test_published_weights_are_imported_and_predict_a_scene(
    rgb_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pretrained(monkeypatch, tmp_path)
    teachers = [TEACHERS[0] | {"name": "dino"}, TEACHERS[1] | {"name": "clip"}]
    recipe = write_recipe(tmp_path, rgb_dataset, teachers=teachers)
    torch.save({"model": checkpoint(0), "model_ema": checkpoint(1)}, tmp_path / "best.pth")
    model = tmp_path / "imported.safetensors"
    command = ["weights", "import", str(tmp_path / "best.pth"), "--method", "mtdf", "--recipe", recipe]
    assert run([*command, "--data", str(rgb_dataset), "-o", str(model)]) == 0
    assert read_header(model).training["imported_from"] == "best.pth"
    assert run([*command, "--data", str(rgb_dataset), "-o", str(model)]) == 2
    predict(model, tmp_path)


def test_scene_is_predicted_where_the_teacher_weights_are_gone(
    rgb_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pretrained(monkeypatch, tmp_path)
    weights = tmp_path / "teacher.safetensors"
    network = create_backbone(BackboneConfig.model_validate(PYRAMID), rgb_task()).body.network  # type: ignore[union-attr]
    save_file(network.state_dict(), weights)  # type: ignore[union-attr, operator]
    teacher = TEACHERS[1] | {"backbone": PYRAMID | {"weights": str(weights)}}
    recipe = write_recipe(tmp_path, rgb_dataset, teachers=[teacher])
    assert run(["train", "--recipe", recipe, "--output", str(tmp_path / "runs")]) == 0
    weights.unlink()
    (run_folder,) = (tmp_path / "runs").glob("*_mtdf_*")
    predict(run_folder, tmp_path)


def predict(model: Path, folder: Path) -> None:
    """Run `rsseg predict` on a scene of 70 x 50 pixels and look at what it wrote."""
    pixels = np.random.default_rng(3).integers(0, 255, (3, 50, 70), dtype=np.uint8)
    scene = write_tif(folder / "scene.tif", pixels)
    classes = folder / "classes.tif"
    assert run(["predict", str(scene), "--model", str(model), "-o", str(classes)]) == 0
    with rasterio.open(classes) as raster:
        assert raster.shape == (50, 70)
        assert set(np.unique(raster.read(1))) <= {0, 1, 2, 255}
