"""Checks and statistics of prepared datasets."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import rasterio
from PIL import Image

from rsseg.cli import run
from rsseg.data.index import SegmentationIndex
from rsseg.datasets.measure import Survey
from rsseg.datasets.prepare.run import prepare
from rsseg.datasets.verify import statistics, verify
from rsseg.errors import DataError
from rsseg.raster import Window
from tests.conftest import write_png, write_tif
from tests.unit.test_prepare import own_options, own_source, quiet


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    return prepare("folder", own_options(own_source(tmp_path / "src"), tmp_path / "out"), quiet)


def replaced(path: Path, mask: np.ndarray) -> None:
    # a hard link to the source: write a new file, not through the link
    path.unlink()
    write_png(path, mask.astype(np.uint8))


def test_a_sound_dataset_has_no_problems_and_the_counts_of_its_masks(prepared: Path) -> None:
    report = verify(prepared, pixels=True)
    assert (report.ok, report.images, report.masks) == (True, 4, 4)
    masks = np.stack([np.array(Image.open(prepared / f"train/masks/{i}.png")) for i in range(3)])
    train = report.splits[0]
    assert (train.split, train.images) == ("train", 3)
    assert train.pixels == {"land": (masks == 1).sum(), "sea": (masks == 2).sum()}
    assert train.ignored == (masks == 0).sum()


def test_every_planted_defect_is_found_and_named(prepared: Path) -> None:
    replaced(prepared / "train/masks/0.png", np.full((24, 20), 9))
    replaced(prepared / "train/masks/1.png", np.ones((23, 20)))
    (prepared / "train/masks/2.png").unlink()
    image = prepared / "val/images/0.tif"
    content = image.read_bytes()
    image.unlink()
    image.write_bytes(content[: len(content) // 2])
    index = SegmentationIndex.load(prepared)
    leak = index.items[0].model_copy(update={"split": "test", "mask": None})
    index.model_copy(update={"items": (*index.items, leak)}).save(prepared)

    problems = verify(prepared, pixels=True).problems
    found = {(problem.file, problem.split) for problem in problems}
    assert found == {
        ("train/masks/0.png", "train"),
        ("train/masks/1.png", "train"),
        ("train/masks/2.png", "train"),
        ("val/images/0.tif", "val"),
        ("train/images/0.tif", "test"),
    }
    reasons = " ".join(problem.reason for problem in problems)
    for word in ("9 (480 pixels)", "23 x 20", "no such file", "must not share"):
        assert word in reasons


def test_statistics_give_bands_shares_and_areas(prepared: Path) -> None:
    found = statistics(prepared)
    val = found.splits[1]
    with rasterio.open(prepared / "val/images/0.tif") as file:
        pixels = file.read().astype(float)
    mask = np.array(Image.open(prepared / "val/masks/0.png"))
    assert [band.mean for band in val.bands] == pytest.approx(pixels.mean((1, 2)))
    assert [band.std for band in val.bands] == pytest.approx(pixels.std((1, 2)))
    assert (val.bands[0].low, val.bands[0].high) == (pixels[0].min(), pixels[0].max())
    sea = val.classes[1]
    assert (sea.pixels, sea.share, sea.m2) == ((mask == 2).sum(), (mask == 2).mean(), (mask == 2).sum() * 100)
    assert val.ignored.ha == pytest.approx((mask == 0).sum() / 100)


def test_a_folder_without_index_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rsseg dataset prepare"):
        verify(tmp_path)


def test_the_command_finds_five_planted_defects_and_gives_them_as_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = own_source(tmp_path / "src", size=(32, 48))
    out = prepare("folder", own_options(source, tmp_path / "out", tile=16), quiet)
    assert run(["dataset", "verify", str(out), "--json"]) == 0
    masks = sorted((out / "masks/train").rglob("*.tif"))
    write_tif(masks[0], np.full((1, 16, 16), 77, np.uint8))
    write_tif(masks[1], np.zeros((1, 16, 15), np.uint8))
    masks[2].unlink()
    image = sorted((out / "images/train").rglob("*.tif"))[3]
    image.write_bytes(image.read_bytes()[:-200])  # the tags come first, the pixels last
    index = SegmentationIndex.load(out)
    items = list(index.items)
    items[4] = items[4].model_copy(update={"split": "val"})
    index.model_copy(update={"items": tuple(items)}).save(out)
    capsys.readouterr()

    assert run(["dataset", "verify", str(out), "--json"]) == 4
    answer = capsys.readouterr()
    problems = {problem["file"]: problem["reason"] for problem in json.loads(answer.out)["problems"]}
    names = [path.relative_to(out).as_posix() for path in (*masks[:3], image)]
    assert set(names) < set(problems)
    assert len(problems) == 5
    assert "77 (256 pixels), first at row 0, column 0" in problems[names[0]]
    assert "16 x 15" in problems[names[1]]
    assert "no such file" in problems[names[2]]
    assert "damaged" in problems[names[3]]
    (leak,) = set(problems) - set(names)
    assert "the scene train/images/0.tif is in train" in problems[leak]
    assert "5 problem(s)" in answer.err
    assert run(["dataset", "verify", str(out)]) == 4
    assert "masks/train/images/0_00000_00000.tif" in capsys.readouterr().out


def test_a_copy_of_an_image_in_another_split_is_a_leak(prepared: Path) -> None:
    copy = prepared / "val/images/copy.tif"
    copy.write_bytes((prepared / "train/images/1.tif").read_bytes())
    index = SegmentationIndex.load(prepared)
    leak = index.items[1].model_copy(update={"split": "val", "image": "val/images/copy.tif"})
    index.model_copy(update={"items": (*index.items, leak)}).save(prepared)
    (problem,) = verify(prepared).problems
    assert (problem.file, problem.split) == ("val/images/copy.tif", "val")
    assert "the same as train/images/1.tif in train" in problem.reason


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_polygons_are_counted_across_strips(rows: int) -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        indices = rng.choice(np.array([0, 1, 255], np.uint8), (12, 17), p=(0.55, 0.35, 0.1))
        whole = [cv2.connectedComponents((indices == i).astype(np.uint8), connectivity=4)[0] - 1 for i in (0, 1)]
        survey = Survey(None, 2, 10.0)
        for row in range(0, 12, rows):
            part = indices[row : row + rows]
            survey.add(part, Window(row, 0, *part.shape))
        assert survey.polygons.tolist() == whole
        assert survey.hectares is not None
        assert survey.hectares.tolist() == pytest.approx([(indices == i).sum() / 100 for i in (0, 1)])


def test_verify_counts_places_per_class_and_warns_of_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = own_source(tmp_path / "src")
    mask = np.zeros((24, 20), np.uint8)
    mask[2:8, 2:8], mask[12:20, 2:8] = 1, 1
    for path in source.rglob("masks/*.png"):
        write_png(path, mask)
    mask[10, 10] = 2
    write_png(source / "val/masks/0.png", mask)
    report = verify(prepare("folder", own_options(source, tmp_path / "out"), quiet))
    land, sea = report.classes
    assert (land.polygons, land.pixels, land.scenes, land.splits) == (8, 4 * 84, 4, ("train", "val"))
    assert (sea.polygons, sea.pixels, sea.scenes, sea.splits, sea.features) == (1, 1, 1, ("val",), None)
    assert land.ha == pytest.approx(4 * 84 / 100, rel=0.01)  # pixels of 10 m
    assert len(report.warnings) == 1
    assert "the class sea is labeled in 1 place(s)" in report.warnings[0]
    assert report.ok
    assert run(["dataset", "verify", str(tmp_path / "out")]) == 0
    answer = capsys.readouterr()
    assert "hectares" in answer.out
    assert "warning: the class sea" in answer.err
