from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from rasterio.transform import Affine, from_origin

from rsseg.cli import run
from rsseg.config import SelectConfig
from rsseg.data.dataset import CACHE_NAME
from rsseg.data.index import SegmentationIndex
from rsseg.data.sources import Datasets
from rsseg.errors import DataError, RecipeError, WeightsError
from rsseg.evaluation.model import evaluate
from rsseg.evaluation.model_file import evaluate_model
from rsseg.evaluation.rasters import evaluate_rasters
from rsseg.inference.network import load_segmenter
from rsseg.training.progress import Progress
from rsseg.training.run import plan, train
from tests.conftest import rgb_task, write_png, write_tif
from tests.training.recipes import tiny_recipe, tiny_values


def test_model_is_scored_on_a_split_and_knows_what_it_has_seen(rgb_dataset: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(rgb_dataset, trainer={"steps": 3})
    result = train(recipe, output=tmp_path, progress=Progress())
    told: list[tuple[int, int]] = []
    test = evaluate_model(result.model, device="cpu", progress=lambda done, total: told.append((done, total)))
    assert test.images == 1
    assert test.seen is None
    assert told == [(0, 1), (1, 1)]
    files = [rgb_dataset / "masks" / "07.png"]
    pixels = sum(np.asarray(Image.open(file)).size for file in files)
    assert test.scores.pixels == test.matrix.sum() == pixels
    validation = evaluate_model(result.model, split="val", device="cpu")
    assert validation.scores == result.scores
    assert validation.seen == "selection"
    assert evaluate_model(result.model, split="train", data=rgb_dataset, device="cpu").seen == "training"
    with pytest.raises(DataError, match="split 'absent' is empty"):
        evaluate_model(result.model, split="absent", device="cpu")
    with pytest.raises(WeightsError):
        evaluate_model(tmp_path / "absent.safetensors", device="cpu")


def test_ignored_classes_are_left_out(rgb_dataset: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(rgb_dataset, trainer={"steps": 1}, eval={"ignore_classes": ["water"]})
    result = train(recipe, output=tmp_path, progress=Progress())
    segmenter = load_segmenter(result.model)
    source = Datasets(recipe.data).open(SelectConfig(), "val", segmenter.task, masks=True)
    scored = evaluate(segmenter, recipe, source, device=torch.device("cpu"))
    assert [c.name for c in scored.scores.classes] == ["field", "road"]
    assert scored.scores == result.scores


def test_class_rasters_are_compared_by_name(tmp_path: Path) -> None:
    true = np.array([[0, 1, 1], [2, 255, 2]], np.uint8)
    predicted = np.array([[0, 1, 2], [2, 2, 255]], np.uint8)
    write_png(tmp_path / "truth" / "a.png", true)
    write_tif(tmp_path / "pred" / "a.tif", predicted[None], nodata=255)
    result = evaluate_rasters(tmp_path / "pred", tmp_path / "truth")
    assert [c.name for c in result.scores.classes] == ["0", "1", "2"]
    assert result.matrix.tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 1]]
    assert (result.images, result.unpredicted, result.scores.oa) == (1, 1, 0.75)
    named = evaluate_rasters(tmp_path / "pred", tmp_path / "truth", task=rgb_task(), ignore=("water",))
    assert [c.name for c in named.scores.classes] == ["field", "road"]


def test_longitudes_may_differ_by_a_turn(tmp_path: Path) -> None:
    classes = np.random.default_rng(0).integers(0, 3, (20, 30), np.uint8)
    pred, truth = write_pair(tmp_path, classes, classes, crs="EPSG:4326", transform=from_origin(-170, 10, 0.1, 0.1))
    write_tif(pred / "a.tif", classes[None], crs="EPSG:4326", transform=from_origin(190, 10, 0.1, 0.1))
    assert evaluate_rasters(pred, truth).scores.oa == 1
    write_tif(pred / "a.tif", classes[None], crs="EPSG:4326", transform=from_origin(191, 10, 0.1, 0.1))
    with pytest.raises(DataError, match="lies elsewhere"):
        evaluate_rasters(pred, truth)


def test_classes_have_the_names_that_the_maps_carry(tmp_path: Path) -> None:
    values = np.array([[1, 2, 3], [1, 2, 3]], np.uint8)
    pred, truth = write_pair(tmp_path, values, values)
    with rasterio.open(pred / "a.tif", "r+") as file:
        file.update_tags(1, class_1="water", class_2="forest")
    assert [c.name for c in evaluate_rasters(pred, truth).scores.classes] == ["water", "forest", "3"]
    band = "<PAMRasterBand band='1'><CategoryNames>{}</CategoryNames></PAMRasterBand>"
    side = f"<PAMDataset>{band}</PAMDataset>"
    categories = "<Category/><Category>Water</Category><Category>wood</Category><Category>road</Category>"
    (truth / "a.tif.aux.xml").write_text(side.format(categories))
    assert [c.name for c in evaluate_rasters(pred, truth).scores.classes] == ["Water", "wood", "road"]
    (truth / "a.tif.aux.xml").write_text(side.format("<Category/><Category>forest</Category>"))
    with pytest.raises(DataError, match=r"a\.tif: the class 'forest' has the value 2, but 1 in "):
        evaluate_rasters(pred, truth)


def test_rasters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    truth, pred = tmp_path / "truth", tmp_path / "pred"
    with pytest.raises(DataError, match="no such folder"):
        evaluate_rasters(pred, truth)
    truth.mkdir()
    pred.mkdir()
    with pytest.raises(DataError, match="no raster in this folder"):
        evaluate_rasters(pred, truth)
    write_png(truth / "a.png", np.zeros((2, 3), np.uint8))
    with pytest.raises(DataError, match="have no prediction, the first is a"):
        evaluate_rasters(pred, truth)
    write_png(pred / "a.png", np.zeros((3, 2), np.uint8))
    with pytest.raises(DataError, match=r"2 x 3 pixels .* 3 x 2"):
        evaluate_rasters(pred, truth)
    write_png(pred / "a.png", np.full((2, 3), 9, np.uint8))
    with pytest.raises(DataError, match="value 9 is not a class"):
        evaluate_rasters(pred, truth, task=rgb_task())
    write_png(pred / "a.png", np.zeros((2, 3, 3), np.uint8))
    with pytest.raises(DataError, match=r"3 bands\. A class raster has one band"):
        evaluate_rasters(pred, truth)


def write_pair(folder: Path, predicted: NDArray[Any], true: NDArray[Any], **options: Any) -> tuple[Path, Path]:
    write_tif(folder / "p/a.tif", predicted[None])
    write_tif(folder / "t/a.tif", true[None], **options)
    return folder / "p", folder / "t"


def test_rasters_are_compared_by_place(tmp_path: Path) -> None:
    classes = np.random.default_rng(0).integers(0, 3, (20, 30), np.uint8)
    upside_down = write_pair(tmp_path / "a", classes, classes[::-1], transform=Affine(10, 0, 500000, 0, 10, 3999800))
    assert evaluate_rasters(*upside_down).scores.oa == 1
    shifted = write_pair(tmp_path / "b", classes, classes, transform=Affine(10, 0, 500010, 0, -10, 4000000))
    with pytest.raises(DataError, match="lies elsewhere"):
        evaluate_rasters(*shifted)
    with pytest.raises(DataError, match="EPSG:32632"):
        evaluate_rasters(*write_pair(tmp_path / "c", classes, classes, crs="EPSG:32632"))


def test_own_predictions_pair_with_truths_of_any_integer_type(tmp_path: Path) -> None:
    true = np.array([[0, 1, -1], [2, 3, 3]], np.int16)
    write_tif(tmp_path / "t/a.tif", true[None], nodata=-1)
    write_tif(tmp_path / "p/a_rsseg.tif", np.array([[[0, 1, 1], [2, 3, 2]]], np.uint8), nodata=255)
    result = evaluate_rasters(tmp_path / "p", tmp_path / "t")
    assert (result.scores.oa, result.scores.pixels) == (0.8, 5)
    write_tif(tmp_path / "t/a.tif", true[None])
    with pytest.raises(DataError, match="the value -1 is not a class"):
        evaluate_rasters(tmp_path / "p", tmp_path / "t")
    write_tif(tmp_path / "t/a.tif", true[None] / np.float32(2), nodata=-0.5)
    with pytest.raises(DataError, match=r"the value 0\.5 is not a class"):
        evaluate_rasters(tmp_path / "p", tmp_path / "t")
    write_png(tmp_path / "p/a_rsseg.png", np.zeros((2, 3), np.uint8))
    with pytest.raises(DataError, match=r"a_rsseg\.png and a_rsseg\.tif have the same stem"):
        evaluate_rasters(tmp_path / "p", tmp_path / "t")


def test_value_255_is_a_class_of_binary_masks_and_no_label_elsewhere(tmp_path: Path) -> None:
    binary = np.array([[0, 0, 255, 255]], np.uint8)
    turned = np.array([[0, 255, 255, 255]], np.uint8)
    result = evaluate_rasters(*write_pair(tmp_path / "a", turned, binary))
    assert [(c.name, c.iou) for c in result.scores.classes] == [("0", 0.5), ("255", pytest.approx(2 / 3))]
    with pytest.raises(DataError, match="besides 255, which means no label, the rasters hold only 0"):
        evaluate_rasters(*write_pair(tmp_path / "b", turned // 255, binary))
    declared = evaluate_rasters(*write_pair(tmp_path / "c", turned // 255, binary, nodata=255))
    assert declared.matrix.tolist() == [[1, 1], [0, 0]]
    three = np.array([[0, 1, 255, 255]], np.uint8)
    assert evaluate_rasters(*write_pair(tmp_path / "d", three, three)).matrix.tolist() == [[1, 0], [0, 1]]


def test_eval_settings_are_checked_before_training(rgb_dataset: Path) -> None:
    for settings, message in (
        ({"ignore_classes": ["watr"]}, "'watr' is no class of this dataset. Did you mean 'water'"),
        ({"ignore_classes": ["water", "road", "field"]}, "every class is ignored"),
        ({"tile": 32, "overlap": 32}, "overlap: 32 pixels do not fit tiles of 32"),
    ):
        with pytest.raises(RecipeError, match=message):
            plan(tiny_recipe(rgb_dataset, eval=settings))
    plan(tiny_recipe(rgb_dataset, eval={"ignore_classes": ["water"], "overlap": 1}))
    plan(tiny_recipe(rgb_dataset, eval={"mode": "resized", "overlap": 9999}))


def test_run_parses_the_dataset_index_once(rgb_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    original = SegmentationIndex.model_validate_json
    monkeypatch.setattr(SegmentationIndex, "model_validate_json", lambda text: parsed.append(text) or original(text))
    train(tiny_recipe(rgb_dataset, trainer={"steps": 2, "eval_every": 1}), output=tmp_path, progress=Progress())
    assert len(parsed) == 1


def test_unwritable_cache_is_one_plain_warning(
    rgb_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (rgb_dataset / CACHE_NAME).write_text("a file where the folder should be")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(tiny_values(rgb_dataset) | {"trainer": {"steps": 1, "workers": 1}}))
    assert run(["train", "--recipe", str(recipe), "--output", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr().err
    assert said.count("warning:") == 1
    assert "Warning:" not in said
    assert "set data.cache: false" in " ".join(said.split())


@pytest.mark.parametrize("bound", ["miou=nan", "miou=70", "miou=-1", "miou", "iou=0.5", "miou=1e999"])
def test_bound_that_could_not_fail_is_wrong_usage(bound: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "--fail-under", bound]) == 2
    assert "write miou=0.7" in capsys.readouterr().err
