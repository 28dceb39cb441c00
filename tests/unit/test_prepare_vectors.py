"""From scenes and polygons to prepared datasets."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import shapely

from rsseg.data.index import SegmentationIndex
from rsseg.datasets.class_file import load_classes
from rsseg.datasets.prepare import transfer
from rsseg.datasets.prepare.options import PrepareOptions, parse_options
from rsseg.datasets.prepare.run import prepare
from rsseg.datasets.verify import verify
from rsseg.errors import DataError, UsageError
from tests.unit.test_vector_labels import EAST, GSD, NORTH, ground, in_crs, scene, write_vector

CLASSES = """
name: mine
classes: [{name: land, value: 7, color: "#00FF00", also_names: [field]}, {name: sea, value: 9, color: "#0000FF"}]
ignore_names: [cloud]
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three scenes side by side, 64 pixels high and 80 wide, and polygons of another coordinate system in each."""
    for number in range(3):
        place = rasterio.transform.from_origin(EAST + number * 80 * GSD, NORTH, GSD, GSD)
        scene(tmp_path / "scenes" / f"s{number}.tif", size=(64, 80), place=place)
    shapes, values, splits = [], [], []
    for number, split in enumerate(("train", "val", "test")):
        for col, value in ((5, "land"), (40, "sea")):
            shapes.append(in_crs(ground(number * 80 + col, 10, 20, 30), "EPSG:4326"))
            values.append(value)
            splits.append(split)
    write_vector(tmp_path / "labels.gpkg", shapes, values, crs="EPSG:4326", split=splits)
    (tmp_path / "classes.yaml").write_text(CLASSES, encoding="utf-8")
    return tmp_path


def made(source: Path, *, notes: list[str] | None = None, out: str = "out", **options: Any) -> SegmentationIndex:
    vectors = {"labels": source / "labels.gpkg", "field": "class", "classes": source / "classes.yaml"}
    vectors |= options.pop("vectors", {})
    request = PrepareOptions(
        src=options.pop("src", source / "scenes"), out=source / out, vectors=vectors, jobs=1, **options
    )
    said = [] if notes is None else notes
    return SegmentationIndex.load(prepare("vectors", request, lambda text, done, total: said.append(text)))


def mask_of(index: SegmentationIndex, name: str) -> np.ndarray:
    (item,) = [item for item in index.items if item.image == name]
    path = index.mask_file(item)
    assert path is not None
    with rasterio.open(path) as file:
        return file.read(1)


def test_scenes_and_polygons_become_masks_on_the_grid_of_the_scenes(source: Path) -> None:
    index = made(source)
    assert sorted(item.split for item in index.items) == ["test", "train", "val"]
    assert [info.name for info in index.task.classes] == ["land", "sea"]
    expected = np.full((64, 80), 255)
    expected[10:40, 5:25], expected[10:40, 40:60] = 0, 1
    for item in index.items:
        np.testing.assert_array_equal(mask_of(index, item.image), expected)
        path = index.mask_file(item)
        assert path is not None
        with rasterio.open(path) as mask, rasterio.open(source / "scenes" / item.image) as image:
            assert (mask.crs, mask.transform, mask.shape) == (image.crs, image.transform, image.shape)
            assert mask.colormap(1)[1][:3] == (0, 0, 255)
        assert item.classes == (600, 600)
    assert index.source_features == {"land": 3, "sea": 3}
    assert verify(source / "out").ok
    assert not list((source / "out").rglob(".*"))


def test_unlabeled_pixels_are_ignored_unless_a_background_is_named(source: Path) -> None:
    index = made(source, vectors={"background": "land"})
    found = mask_of(index, "s0.tif")
    assert (found == 1).sum() == 600
    assert (found == 0).sum() == 64 * 80 - 600
    with pytest.raises(UsageError, match=r"--background lan: .*did you mean 'land'"):
        made(source, out="b", vectors={"background": "lan"})


def test_pixels_outside_the_extent_are_ignored(source: Path) -> None:
    write_vector(source / "extent.gpkg", [ground(0, 0, 50, 64)], ["x"])
    extent = {"background": "land", "extent": source / "extent.gpkg"}
    index = made(source, vectors=extent, split_ratio={"train": 1.0})
    found = mask_of(index, "s0.tif")
    assert (found[:, 50:] == 255).all()
    assert (found[:, :50] != 255).all()
    assert {item.image: item.split for item in index.items if item.mask is None} == {
        "s1.tif": "unlabeled", "s2.tif": "unlabeled",
    }  # fmt: skip


def test_without_a_class_file_the_values_become_classes_with_colours(source: Path) -> None:
    notes: list[str] = []
    index = made(source, notes=notes, vectors={"classes": None, "background": "rest"})
    assert [info.name for info in index.task.classes] == ["rest", "land", "sea"]
    assert any("no --classes: the values of the field are the classes (rest, land, sea)" in note for note in notes)
    written = load_classes(source / "out/classes.yaml")
    assert [entry.name for entry in written.classes] == ["rest", "land", "sea"]
    assert len({entry.color for entry in written.classes}) == 3
    (source / "classes.yaml").write_bytes((source / "out/classes.yaml").read_bytes())
    again = made(source, out="again", vectors={"background": "rest"})
    assert again.task.classes == index.task.classes


def test_numbers_become_classes_of_their_value(source: Path) -> None:
    shapes = [ground(number * 80 + 5, 10, 20, 30) for number in range(3)]
    write_vector(source / "labels.gpkg", shapes, [10, 2, 10])
    index = made(source, vectors={"classes": None}, split_ratio={"train": 1.0})
    assert [(info.name, info.value) for info in index.task.classes] == [("2", 2), ("10", 10)]


def test_too_many_values_are_the_wrong_field(source: Path) -> None:
    shapes = [ground(5, 10, 20, 30)] * 300
    write_vector(source / "labels.gpkg", shapes, [f"n{i}" for i in range(300)])
    with pytest.raises(DataError, match="300 different values, too many for classes"):
        made(source, vectors={"classes": None})


def faulty(source: Path) -> None:
    bow_tie = shapely.Polygon([(EAST, NORTH), (EAST + 40, NORTH - 40), (EAST + 40, NORTH), (EAST, NORTH - 40)])
    shapes = [ground(n * 80 + 5, 10, 20, 30) for n in range(3)]
    shapes += [ground(20, 10, 20, 30), ground(5000, 0, 9, 9), bow_tie, None, ground(70, 50, 8, 8), ground(60, 2, 1, 1)]
    values = ["field", "field", "field", "cloud", "land", "land", "land", None, "land"]
    write_vector(source / "labels.gpkg", shapes, values)


def test_every_defect_of_the_labels_is_reported_with_its_features(source: Path) -> None:
    faulty(source)
    notes: list[str] = []
    index = made(source, notes=notes, vectors={"buffer": -1.5})
    warnings = "\n".join(note for note in notes if note.startswith("warning: "))
    for expected in (
        "1 feature(s) without a geometry, not drawn: 7",
        "1 feature(s) with an invalid geometry (such as a ring that crosses itself), repaired: 6",
        "1 feature(s) without a class value, not drawn: 8",
        "1 feature(s) outside all scenes: 5",
        "1 feature(s) with nothing left after --buffer -1.5: 9",
        "no feature in any scene has the class sea",
        "1 pair(s) of features of two classes overlap, the upper one is drawn: 1 and 4",
    ):
        assert expected in warnings
    with (source / "out/label-issues.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["feature"] for row in rows} == {"1", "5", "6", "7", "8", "9", ""}
    assert [row["other_feature"] for row in rows if row["other_feature"]] == ["4"]
    found = mask_of(index, "s0.tif")
    assert found[25, 30] == 255  # a cloud
    assert found[25, 15] == 0


def test_strict_makes_defects_errors_and_leaves_nothing_behind(source: Path) -> None:
    faulty(source)
    with pytest.raises(DataError, match=r"labels\.gpkg: 1 feature\(s\) without a geometry"):
        made(source, vectors={"strict": True})
    assert not list(source.glob("out*"))


def test_tiles_without_a_label_are_kept_unlabeled(source: Path) -> None:
    index = made(source, tile=24, split_ratio={"train": 0.6, "test": 0.4})
    assert {item.split for item in index.items} == {"train", "test", "unlabeled", "unused"}
    assert all((item.mask is None) == item.split.startswith("un") for item in index.items)
    assert {item.split for item in index.items if item.scene == "s0.tif"} in (
        {"train", "unlabeled"},
        {"test", "unused"},
    )
    assert all(sum(item.classes or ()) for item in index.items if item.mask)
    assert verify(source / "out").ok


def test_splits_by_blocks_of_ground(source: Path) -> None:
    (source / "scenes/s1.tif").unlink()
    (source / "scenes/s2.tif").unlink()
    with pytest.raises(DataError, match=r"1 labeled scene\(s\) cannot fill .*--tile 512 --split-block 1024"):
        made(source)
    index = made(source, tile=8, vectors={"split_block": 16}, seed=1)
    labeled = [item for item in index.items if item.mask is not None]
    assert {item.split for item in labeled} == {"train", "val", "test"}
    blocks: dict[tuple[int, int], set[str]] = {}
    for item in labeled:
        assert item.origin is not None
        blocks.setdefault((item.origin[0] // 16, item.origin[1] // 16), set()).add(item.split)
    assert all(len(splits) == 1 for splits in blocks.values())
    assert verify(source / "out").ok
    with pytest.raises(UsageError, match=r"--split-block|split_block needs tile"):
        parse_options("vectors", {"src": source, "vectors": {"labels": source / "labels.gpkg", "split_block": 16}})


def test_splits_of_a_field(source: Path) -> None:
    index = made(source, vectors={"split_field": "split"})
    assert {item.image: item.split for item in index.items} == {"s0.tif": "train", "s1.tif": "val", "s2.tif": "test"}
    again = made(source, out="as", vectors={"split_field": "split", "split_as": {"test": "train:south"}})
    assert {item.image: (item.split, item.domain) for item in again.items}["s2.tif"] == ("train", "south")


def test_tiles_with_features_of_two_splits_are_not_used(source: Path) -> None:
    shapes = [ground(0, 0, 30, 64), ground(50, 0, 30, 64)]
    write_vector(source / "labels.gpkg", shapes, ["land", "sea"], split=["train", "val"])
    with pytest.raises(DataError, match=r"s0\.tif: features of the splits train and val.*--tile"):
        made(source, vectors={"split_field": "split"})
    index = made(source, tile=40, stride=20, vectors={"split_field": "split"})
    splits = {item.origin: item.split for item in index.items if item.scene == "s0.tif"}
    assert splits[0, 0] == "train"
    assert splits[0, 20] == "unused"
    assert splits[0, 40] == "val"


def test_splits_of_folders_and_lists(source: Path) -> None:
    for number, split in enumerate(("train", "val", "test")):
        (source / "scenes" / split).mkdir()
        (source / "scenes" / f"s{number}.tif").rename(source / "scenes" / split / f"s{number}.tif")
    index = made(source, vectors={"images": "{split}/*.tif"})
    assert {item.image: item.split for item in index.items}["val/s1.tif"] == "val"
    (source / "train.txt").write_text("train/s0.tif\nval/s1.tif\n", encoding="utf-8")
    listed = made(source, out="listed", vectors={"split_lists": {"train": source / "train.txt"}})
    assert [(item.image, item.split) for item in listed.items] == [("train/s0.tif", "train"), ("val/s1.tif", "train")]


def test_one_scene_may_be_the_source_and_labels_may_lie_beside_it(source: Path) -> None:
    index = made(source, src=source / "scenes/s0.tif", split_ratio={"train": 1.0})
    assert [item.image for item in index.items] == ["s0.tif"]
    (source / "labels.gpkg").rename(source / "scenes/labels.gpkg")
    beside = made(source, out="b", vectors={"labels": source / "scenes/labels.gpkg"})
    assert len(beside.items) == 3


def test_a_changed_label_file_is_another_request(source: Path) -> None:
    made(source)
    notes: list[str] = []
    made(source, notes=notes)
    assert notes == [f"{source / 'out'} is prepared already"]
    faulty(source)
    with pytest.raises(DataError, match="--overwrite"):
        made(source)
    assert (mask_of(made(source, overwrite=True), "s0.tif")[10:40, 40:60] == 255).all()


def test_labels_in_no_scene_are_an_error_that_says_why(source: Path) -> None:
    write_vector(source / "labels.gpkg", [ground(9000, 0, 5, 5)], ["land"])
    with pytest.raises(DataError, match=r"no label lies in a scene \(1 feature\(s\) outside all scenes: 1"):
        made(source)


def test_two_scenes_that_differ_by_their_ending_are_refused(source: Path) -> None:
    (source / "scenes/s0.tif").rename(source / "scenes/a.tif")
    (source / "scenes/s1.tif").rename(source / "scenes/a.tiff")
    with pytest.raises(DataError, match="same name but for its ending"):
        made(source)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"split_field": "split", "split_block": 64}, "--split-field and --split-block exclude each other"),
        ({"width": 0}, "--width"),
        ({"buffer": float("nan")}, "--buffer"),
        ({"masks": "*.png"}, "--masks: --masks is for `folder`; vectors has no such option"),
    ],
)
def test_options_that_make_no_sense_name_the_option(source: Path, more: dict[str, Any], message: str) -> None:
    vectors = {"labels": source / "labels.gpkg", "field": "class", **more}
    with pytest.raises(UsageError, match=message):
        parse_options("vectors", {"src": source, "tile": 32, "vectors": vectors})


def test_options_of_vectors_are_refused_elsewhere() -> None:
    with pytest.raises(UsageError, match="--field: --field is for `vectors`; cloud has no such option"):
        parse_options("cloud", {"folder": {"field": "class"}, "vectors": {"field": "class"}})
    with pytest.raises(UsageError, match="`vectors` needs --src DIR, --labels FILE and --field NAME"):
        parse_options("vectors", {"vectors": {"field": "class"}})


def test_an_interrupted_call_resumes_and_gives_the_same_files(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def contents(out: str) -> dict[str, bytes]:
        files = sorted((source / out).rglob("*"))
        skipped = {"prepared.json", "rsseg-index.json"}
        return {
            str(f.relative_to(source / out)): f.read_bytes() for f in files if f.is_file() and f.name not in skipped
        }

    made(source, out="whole", tile=24, split_ratio={"train": 1.0})
    write = transfer.write_tile
    count = 0

    def interrupted(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == 12:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(transfer, "write_tile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made(source, tile=24, split_ratio={"train": 1.0})
    assert (source / "out.partial").is_dir()
    monkeypatch.setattr(transfer, "write_tile", write)
    index = made(source, tile=24, split_ratio={"train": 1.0})
    assert contents("out") == contents("whole")
    assert len(index.items) == 36


def test_scenes_of_any_depth_and_suffix_are_found_but_not_their_side_files(source: Path) -> None:
    deep = source / "scenes/2024/may"
    deep.mkdir(parents=True)
    (source / "scenes/s0.tif").rename(deep / "s0.TIF")
    (source / "scenes/s1.tif.aux.xml").write_text("<PAMDataset/>", encoding="utf-8")
    (source / "scenes/notes.txt").write_text("x", encoding="utf-8")
    assert sorted(item.image for item in made(source).items) == ["2024/may/s0.TIF", "s1.tif", "s2.tif"]


def test_a_folder_without_rasters_says_so(source: Path) -> None:
    (source / "empty").mkdir()
    (source / "empty/notes.txt").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match="no raster is in this folder"):
        made(source, src=source / "empty")


def test_sixteen_bits_four_bands_and_chosen_bands_keep_their_masks(source: Path) -> None:
    for path in (source / "scenes").iterdir():
        with rasterio.open(path) as file:
            profile, pixels = file.profile, file.read()
        profile |= {"count": 4, "dtype": "uint16"}
        with rasterio.open(path, "w", **profile) as file:
            file.write(np.concatenate([pixels, pixels[:1]]).astype(np.uint16) * 40)
    index = made(source, bands=("red", "green", "blue", "nir"), ignore_classes=("sea",))
    assert index.task.bands == ("red", "green", "blue", "nir")
    assert [info.name for info in index.task.classes] == ["land"]
    assert all(item.classes == (600,) for item in index.items)
