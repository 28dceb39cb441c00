"""Real images as they come go through `folder` without a script, and the counts are those of their READMEs."""

from pathlib import Path

import numpy as np
import pytest

from rsseg.data.index import SegmentationIndex
from rsseg.data.labels import LabelTable
from rsseg.datasets.class_file import load_classes
from rsseg.datasets.layouts import Layout
from rsseg.datasets.measure import count_classes
from rsseg.datasets.prepare.options import FolderOptions, PrepareOptions
from rsseg.datasets.prepare.run import prepare
from rsseg.datasets.verify import statistics, verify
from rsseg.raster import Raster

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
CLOUD_SHARES = {
    "train": (45.46, 1.82, 5.49, 47.22),
    "val": (71.10, 1.37, 15.04, 12.49),
    "test": (65.79, 2.62, 6.43, 25.15),
}


def prepared(source: Path, out: Path, masks: str, images: str, **options: object) -> Path:
    folder = {"classes": EXAMPLES / "l8biome-classes.yaml", "images": images, "masks": masks, **options}
    request = PrepareOptions(src=source, out=out, folder=FolderOptions.model_validate(folder), jobs=2)
    return prepare("folder", request, lambda *_: None)


def test_eight_bands_of_scaled_numbers(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "l8biome_cloud"
    out = prepared(source, tmp_path / "out", "{split}/masks/*.png", "{split}/images/*.tif")
    task = SegmentationIndex.load(out).task
    assert (task.dtype, len(task.bands), task.gsd_m) == ("float32", 8, 30)
    assert task.mean is not None
    assert 0.1 < min(task.mean) < max(task.mean) < 0.5
    for split in verify(out).splits:
        pixels = np.array(list(split.pixels.values()))
        np.testing.assert_allclose(100 * pixels / pixels.sum(), CLOUD_SHARES[split.split], atol=0.01)


def test_two_domains_in_folders_of_their_own(shared_data: Path, tmp_path: Path) -> None:
    names = {
        "source_rgb": "train:natural",
        "target_nirswirred_train": "unlabeled:infrared",
        "target_nirswirred_test": "test:infrared",
    }
    source = shared_data / "l8biome_cloud_uda"
    patterns = ("{split}/masks/*.png", "{split}/images/*.png")
    out = prepared(source, tmp_path / "out", *patterns, split_as=names, unlabeled=["unlabeled"])
    found = {(s.split, s.domain): s for s in statistics(out).splits}
    assert {key: split.images for key, split in found.items()} == {
        ("train", "natural"): 16,
        ("unlabeled", "infrared"): 6,
        ("test", "infrared"): 6,
    }
    assert [band.mean for band in found["train", "natural"].bands] == pytest.approx([121, 118, 128], abs=0.6)
    assert [band.std for band in found["unlabeled", "infrared"].bands] == pytest.approx([44, 32, 41], abs=0.6)
    assert found["unlabeled", "infrared"].classes[0].share is None


def test_dubai_by_folders_and_by_lists(shared_data: Path) -> None:
    source, classes = shared_data / "dubai", load_classes(EXAMPLES / "dubai-classes.yaml")
    items = Layout("{split}/images/*.jpg", "{split}/masks/*.png").items(source)
    assert {split: sum(item.split == split for item in items) for split in ("train", "val", "test")} == {
        "train": 45,
        "val": 9,
        "test": 9,
    }
    total = np.zeros(6, np.int64)
    for item in items:
        if item.split == "test" and item.mask is not None:
            with Raster(source / item.image) as raster:
                total += count_classes(source / item.mask, LabelTable(classes.label_map(), 5), 5, raster.info)
    np.testing.assert_allclose(100 * total / total.sum(), (12.29, 59.66, 12.70, 5.77, 7.26, 2.32), atol=0.01)

    lines = {
        target: (source / "splits" / f"{name}.txt").read_text(encoding="utf-8").split()
        for target, name in {"train": "semi_labeled", "unlabeled": "semi_unlabeled"}.items()
    }
    semi = Layout("*/images/*.jpg", "*/masks/*.png", unlabeled=("unlabeled",), split_lists=lines).items(source)
    assert [sum(item.split == split for item in semi) for split in ("train", "unlabeled")] == [10, 35]
    assert {item.mask is None for item in semi if item.split == "unlabeled"} == {True}
