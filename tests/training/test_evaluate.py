from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rsseg.config import SelectConfig
from rsseg.data.index import SegmentationIndex
from rsseg.data.sources import Datasets
from rsseg.errors import DataError, WeightsError
from rsseg.evaluation.model import evaluate, evaluate_model
from rsseg.evaluation.rasters import evaluate_rasters
from rsseg.inference.network import load_segmenter
from rsseg.training.progress import Silent
from rsseg.training.run import train
from tests.conftest import rgb_task, write_png, write_tif
from tests.training.recipes import tiny_recipe


def test_model_is_scored_on_a_split_and_knows_what_it_has_seen(rgb_dataset: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(rgb_dataset, trainer={"steps": 3})
    result = train(recipe, output=tmp_path, progress=Silent())
    told: list[tuple[int, int]] = []
    test = evaluate_model(result.model, device="cpu", progress=lambda done, total: told.append((done, total)))
    assert test.images == 1
    assert test.seen is None
    assert told == [(1, 1)]
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
    result = train(recipe, output=tmp_path, progress=Silent())
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


def test_rasters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    truth, pred = tmp_path / "truth", tmp_path / "pred"
    with pytest.raises(DataError, match="no such folder"):
        evaluate_rasters(pred, truth)
    truth.mkdir()
    pred.mkdir()
    with pytest.raises(DataError, match="no raster here"):
        evaluate_rasters(pred, truth)
    write_png(truth / "a.png", np.zeros((2, 3), np.uint8))
    with pytest.raises(DataError, match="have no prediction, the first is a"):
        evaluate_rasters(pred, truth)
    write_png(pred / "a.png", np.zeros((3, 2), np.uint8))
    with pytest.raises(DataError, match="3 x 2 pixels"):
        evaluate_rasters(pred, truth)
    write_png(pred / "a.png", np.full((2, 3), 9, np.uint8))
    with pytest.raises(DataError, match="value 9 is no class"):
        evaluate_rasters(pred, truth, task=rgb_task())
    write_png(pred / "a.png", np.zeros((2, 3, 3), np.uint8))
    with pytest.raises(DataError, match="one band of uint8"):
        evaluate_rasters(pred, truth)


def test_run_parses_the_dataset_index_once(rgb_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    original = SegmentationIndex.model_validate_json
    monkeypatch.setattr(SegmentationIndex, "model_validate_json", lambda text: parsed.append(text) or original(text))
    train(tiny_recipe(rgb_dataset, trainer={"steps": 2, "eval_every": 1}), output=tmp_path, progress=Silent())
    assert len(parsed) == 1
