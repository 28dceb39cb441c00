"""Every dataset, in every layout: prepare, verify, one training step, one prediction."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import rasterio

from rsseg.data.index import SegmentationIndex
from rsseg.datasets.card import DatasetCard
from rsseg.datasets.cards import CARDS
from rsseg.datasets.prepare.options import PrepareOptions
from rsseg.datasets.prepare.run import prepare
from rsseg.datasets.verify import verify
from rsseg.inference.network import load_segmenter
from rsseg.recipe import recipe_from_dict
from rsseg.scene.options import SceneOptions
from rsseg.scene.predict import predict_scene
from rsseg.training.progress import Progress
from rsseg.training.run import train
from tests.cards.miniatures import MINIATURES, Miniature


def quiet(what: str, done: int, total: int) -> None:
    """No progress."""


def prepared(miniature: Miniature, folder: Path) -> Path:
    source = miniature.make(folder / "source")
    options = PrepareOptions(src=source, out=folder / "out", jobs=2, **miniature.options)
    return prepare(miniature.card, options, quiet)


@pytest.mark.parametrize("miniature", MINIATURES, ids=str)
def test_the_publishers_layout_prepares_verifies_trains_and_predicts(miniature: Miniature, tmp_path: Path) -> None:
    out = prepared(miniature, tmp_path)
    assert not list(tmp_path.glob("*.partial"))
    assert not list(out.rglob(".*"))
    report = verify(out, pixels=True)
    assert report.problems == ()
    index = SegmentationIndex.load(out)
    card = CARDS[miniature.card]
    rule = card.choose_rule(miniature.options.get("split"))
    assert set(rule.splits) <= set(index.splits())
    assert index.split_rule == rule.name
    labels = card.choose_labels(miniature.options.get("labels"))
    ignored = miniature.options.get("ignore_classes", ())
    assert index.task.class_names == tuple(info.name for info in labels.classes if info.name not in ignored)
    assert index.task.bands == miniature.options.get("bands", index.task.bands)
    assert {item.mask is None for item in index.items if item.split == "train"} == {False}
    model = train_one_step(out, tmp_path / "runs")
    image = next(item for item in index.items if item.split == "train")
    scene = one_file(index.image_files(image), tmp_path)
    predicted = tmp_path / "predicted.tif"
    # GDAL takes the fourth band of the publisher's files for alpha
    bands = ("1", "2", "3", "4") if miniature.variant == "four-bands" else None
    options = SceneOptions(device="cpu", format="gtiff", zero_collar=index.ignore_zero_collar, bands=bands)
    predict_scene(load_segmenter(model), scene, predicted, options)
    with rasterio.open(predicted) as file, rasterio.open(scene) as original:
        assert file.shape == original.shape
        assert set(np.unique(file.read(1))) <= {*(info.value for info in index.task.classes), 255}


def one_file(files: Sequence[Path], folder: Path) -> Path:
    """The image itself, or, where each band is a file, the stack that a user would make of them."""
    if len(files) == 1:
        return files[0]
    with ExitStack() as stack:
        bands = [stack.enter_context(rasterio.open(file)) for file in files]
        profile = bands[0].profile | {"driver": "GTiff", "count": len(bands)}
        with rasterio.open(folder / "stack.tif", "w", **profile) as stacked:
            stacked.write(np.concatenate([band.read() for band in bands]))
    return folder / "stack.tif"


def train_one_step(data: Path, runs: Path) -> Path:
    index = SegmentationIndex.load(data)
    val = next(split for split in ("val", "test", "train") if any(i.split == split and i.mask for i in index.items))
    values = {
        "method": "ktda",
        "name": "one-step",
        "data": {
            "path": str(data),
            "augment": {"crop_size": 32},
            "val": {"split": val, "count": 1},
            "test": {"split": val, "count": 1},
        },
        "student": {"name": "convnext_mini", "weights": "random"},
        "decoder": {"type": "segformer", "channels": 8},
        "trainer": {"steps": 1, "batch_size": 2, "workers": 0, "eval_every": 1, "log_every": 1, "device": "cpu"},
        "eval": {"tile": 32, "overlap": 0},
    }
    result = train(recipe_from_dict(values, "one-step"), output=runs, progress=Progress())
    return result.model


def test_every_layout_of_every_card_has_a_miniature() -> None:
    assert {miniature.card for miniature in MINIATURES} == set(CARDS) - {"demo", "folder", "vectors"}


@pytest.mark.parametrize(
    "card", [card for card in CARDS.values() if card.name not in ("folder", "vectors")], ids=lambda card: card.name
)
def test_a_card_is_complete(card: DatasetCard) -> None:
    summary = card.summary()
    assert all(summary[key] for key in ("title", "classes", "bands", "splits", "size", "license"))
    assert card.citation or card.name == "demo"
    for labels in card.labels:
        used = {*labels.label_map.values.values(), *(index for _, index in labels.label_map.colors)}
        assert used - {255} == set(range(len(labels.classes)))
