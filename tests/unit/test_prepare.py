"""From sources to prepared datasets."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.crs import CRS

from rsseg.data.index import SegmentationIndex
from rsseg.datasets.cards import CARDS
from rsseg.datasets.prepare import run, transfer
from rsseg.datasets.prepare.options import FolderOptions, PrepareOptions, parse_pairs, parse_scale
from rsseg.datasets.prepare.run import prepare
from rsseg.errors import DataError, MachineError, UsageError
from tests.conftest import write_png, write_tif

CLASSES = """
name: mine
gsd_m: 10
classes: [{name: land, value: 1, color: "#00FF00"}, {name: sea, value: 2, color: "#0000FF"}]
ignore: [0]
"""


def quiet(what: str, done: int, total: int) -> None:
    """No progress."""


def own_source(folder: Path, *, dtype: str = "uint8", bands: int = 3, size: tuple[int, int] = (24, 20)) -> Path:
    """Three images in train, one in val; the masks' values are 0, 1, 2."""
    rng = np.random.default_rng(3)
    top = 200 if dtype == "uint8" else 9000
    for split, count in (("train", 3), ("val", 1)):
        for number in range(count):
            pixels = rng.integers(1, top, (bands, *size)).astype(dtype)
            write_tif(folder / split / "images" / f"{number}.tif", pixels)
            write_png(folder / split / "masks" / f"{number}.png", rng.integers(0, 3, size).astype(np.uint8))
    (folder / "classes.yaml").write_text(CLASSES, encoding="utf-8")
    return folder


def own_options(source: Path, out: Path, **options: Any) -> PrepareOptions:
    folder = {
        "classes": source / "classes.yaml",
        "images": "{split}/images/*.tif",
        "masks": "{split}/masks/*.png",
        **options.pop("folder", {}),
    }
    return PrepareOptions(src=source, out=out, folder=FolderOptions(**folder), jobs=2, **options)


def publisher_zip(path: Path, card: str) -> Path:
    """A miniature of an authors' archive, in a folder of its own as they wrap it."""
    suffix = ".tif" if card == "grass" else ".png"
    source = path.parent / f"{card}-source"
    rng = np.random.default_rng(1)
    for split in CARDS[card].splits:
        for name in ("a_1", "b_2"):
            image = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
            if suffix == ".tif":
                write_tif(source / "img_dir" / split / f"{name}.tif", image.transpose(2, 0, 1), photometric="RGB")
            else:
                write_png(source / "img_dir" / split / f"{name}.png", image)
            mask = Image.fromarray(rng.integers(0, len(CARDS[card].classes), (16, 16)).astype(np.uint8))
            mask.putpalette(bytes(range(256)) * 3)
            (source / "ann_dir" / split).mkdir(parents=True, exist_ok=True)
            mask.save(source / "ann_dir" / split / f"{name}.png")
    with zipfile.ZipFile(path, "w") as archive:
        for file in source.rglob("*.*"):
            archive.write(file, Path("wrapped") / file.relative_to(source))
    return path


@pytest.mark.parametrize("card", ["grass", "cloud"])
def test_the_authors_archives_become_indexes_with_their_splits(tmp_path: Path, card: str) -> None:
    archive = publisher_zip(tmp_path / f"{card}.zip", card)
    out = prepare(card, PrepareOptions(src=archive, out=tmp_path / "out"), quiet)
    index = SegmentationIndex.load(out)
    assert set(index.splits()) == set(CARDS[card].splits)
    assert index.task.class_names == tuple(info.name for info in CARDS[card].classes)
    assert index.task.bands == ("red", "green", "blue")
    assert all(item.classes is not None and sum(item.classes) == 256 for item in index.items)
    assert not (out / ".unpacked").exists()


def test_an_archive_that_lacks_a_split_is_an_error(tmp_path: Path) -> None:
    archive = publisher_zip(tmp_path / "cloud.zip", "grass")
    with pytest.raises(DataError, match="no file matches"):
        prepare("cloud", PrepareOptions(src=archive, out=tmp_path / "out"), quiet)
    for file in (tmp_path / "grass-source/img_dir/val").iterdir():
        file.unlink()
    for file in (tmp_path / "grass-source/ann_dir/val").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="'val' has no images"):
        prepare("grass", PrepareOptions(src=tmp_path / "grass-source", out=tmp_path / "out"), quiet)


def test_an_own_folder_gets_classes_statistics_and_counts(tmp_path: Path) -> None:
    source = own_source(tmp_path / "src")
    index = SegmentationIndex.load(prepare("folder", own_options(source, tmp_path / "out"), quiet))
    assert (index.task.name, index.task.gsd_m, index.task.class_names) == ("mine", 10, ("land", "sea"))
    assert index.task.scale == (1 / 255,) * 3
    train = np.stack([rasterio.open(source / f"train/images/{i}.tif").read() for i in range(3)])
    assert index.task.mean is not None
    assert index.task.std is not None
    np.testing.assert_allclose(index.task.mean, train.mean((0, 2, 3)) / 255)
    np.testing.assert_allclose(index.task.std, train.std((0, 2, 3)) / 255)
    mask = np.array(Image.open(source / "train/masks/0.png"))
    assert index.items[0].classes == ((mask == 1).sum(), (mask == 2).sum())


def test_the_result_survives_the_loss_of_its_source(tmp_path: Path) -> None:
    source = own_source(tmp_path / "src")
    out = prepare("folder", own_options(source, tmp_path / "out"), quiet)
    for file in source.rglob("*.*"):
        file.unlink()
    index = SegmentationIndex.load(out)
    assert all(path.is_file() for item in index.items for path in index.image_files(item))


def test_wide_pixels_are_scaled_by_percentiles_or_by_a_fixed_range(tmp_path: Path) -> None:
    source = own_source(tmp_path / "src", dtype="uint16")
    train = np.stack([rasterio.open(source / f"train/images/{i}.tif").read() for i in range(3)])
    task = SegmentationIndex.load(prepare("folder", own_options(source, tmp_path / "a"), quiet)).task
    low, high = np.percentile(train.transpose(1, 0, 2, 3).reshape(3, -1), (1, 99), axis=1)
    np.testing.assert_allclose(low * task.scale + task.offset, 0, atol=1e-6)
    np.testing.assert_allclose(high * task.scale + task.offset, 1, atol=1e-6)
    options = own_options(source, tmp_path / "b", scale=parse_scale("fixed:0,10000"))
    fixed = SegmentationIndex.load(prepare("folder", options, quiet)).task
    assert (fixed.dtype, fixed.scale, fixed.offset) == ("uint16", (1e-4,) * 3, (0.0,) * 3)


def test_a_constant_band_does_not_give_a_zero_deviation(tmp_path: Path) -> None:
    source = own_source(tmp_path / "src")
    for file in source.rglob("*.tif"):
        write_tif(file, np.full((3, 24, 20), 7, np.uint8))
    task = SegmentationIndex.load(prepare("folder", own_options(source, tmp_path / "out"), quiet)).task
    assert task.std is not None
    assert min(task.std) > 0


def test_bands_may_lie_in_files_of_their_own_and_be_named(tmp_path: Path) -> None:
    source = own_source(tmp_path / "src", bands=1)
    for file in source.glob("*/images/*.tif"):
        write_tif(file.with_name(f"{file.stem}_nir.tif"), np.full((1, 24, 20), 9, np.uint8))
        file.rename(file.with_name(f"{file.stem}_red.tif"))
    options = own_options(
        source,
        tmp_path / "out",
        bands=("red", "nir"),
        folder={"images": "{split}/images/*_red.tif|{split}/images/*_nir.tif"},
    )
    index = SegmentationIndex.load(prepare("folder", options, quiet))
    assert index.task.bands == ("red", "nir")
    assert len(index.image_files(index.items[0])) == 2


def test_tiles_cover_the_image_and_keep_grid_nodata_and_classes(tmp_path: Path) -> None:
    source = own_source(tmp_path / "src", size=(40, 50))
    out = prepare("folder", own_options(source, tmp_path / "out", tile=32), quiet)
    index = SegmentationIndex.load(out)
    tiles = [item for item in index.items if item.image.startswith("images/train/images/0_")]
    assert [item.image[-15:-4] for item in tiles] == ["00000_00000", "00000_00018", "00008_00000", "00008_00018"]
    with rasterio.open(source / "train/images/0.tif") as whole, rasterio.open(out / tiles[3].image) as tile:
        np.testing.assert_array_equal(tile.read(), whole.read()[:, 8:, 18:])
        assert tile.transform == whole.window_transform(((8, 40), (18, 50)))
    assert tiles[3].mask is not None
    with Image.open(source / "train/masks/0.png") as mask, rasterio.open(out / tiles[3].mask) as tile:
        indices = np.array([255, 0, 1], np.uint8)[np.array(mask)[8:, 18:]]
        np.testing.assert_array_equal(tile.read(1), indices)
        assert tile.crs == CRS.from_epsg(32631)
    assert index.label_map.values == {0: 0, 1: 1, 255: 255}
    assert (tiles[3].scene, tiles[3].origin) == ("train/images/0.tif", (8, 18))


def test_tiles_without_data_are_left_out(tmp_path: Path) -> None:
    source = own_source(tmp_path / "src", size=(16, 32))
    pixels = np.ones((3, 16, 32), np.uint8)
    pixels[:, :, 16:] = 0
    write_tif(source / "train/images/0.tif", pixels, nodata=0)
    index = SegmentationIndex.load(prepare("folder", own_options(source, tmp_path / "out", tile=16), quiet))
    assert sum(item.split == "train" for item in index.items) == 5


@pytest.mark.parametrize("tile", [None, 16])
def test_the_result_does_not_depend_on_the_number_of_threads(tmp_path: Path, tile: int | None) -> None:
    source = own_source(tmp_path / "src")
    options = own_options(source, tmp_path / "1", tile=tile).model_copy(update={"jobs": 1})
    one = prepare("folder", options, quiet)
    many = prepare("folder", options.model_copy(update={"jobs": 8, "out": tmp_path / "8"}), quiet)
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(many) for path in many.rglob("*") if path.is_file())
    assert all((one / file).read_bytes() == (many / file).read_bytes() for file in files)


def test_the_same_request_again_does_nothing_and_another_one_is_refused(tmp_path: Path) -> None:
    source = own_source(tmp_path / "src")
    options = own_options(source, tmp_path / "out")
    out = prepare("folder", options, quiet)
    before = (out / "rsseg-index.json").stat().st_mtime_ns
    told: list[str] = []
    assert prepare("folder", options, lambda what, *_: told.append(what)) == out
    assert (out / "rsseg-index.json").stat().st_mtime_ns == before
    assert told == [f"{out} is prepared already"]
    with pytest.raises(DataError, match=r"exists already.*--overwrite"):
        prepare("folder", options.model_copy(update={"scale": (0.0, 100.0)}), quiet)
    write_png(source / "val/masks/0.png", np.ones((24, 20), np.uint8))
    with pytest.raises(DataError, match="exists already"):
        prepare("folder", options, quiet)
    prepare("folder", options.model_copy(update={"overwrite": True}), quiet)
    assert SegmentationIndex.load(out).items[-1].classes == (480, 0)


def test_overwrite_does_not_delete_a_folder_of_other_things(tmp_path: Path) -> None:
    source = own_source(tmp_path / "src")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").touch()
    with pytest.raises(DataError, match="not a prepared dataset"):
        prepare("folder", own_options(source, tmp_path / "out", overwrite=True), quiet)
    with pytest.raises(UsageError, match="lies in --src"):
        prepare("folder", own_options(source, source / "out"), quiet)
    assert (tmp_path / "out/thesis.tex").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bug")])
def test_an_interrupted_run_goes_on_where_it_was_and_the_old_result_stays(
    tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = own_source(tmp_path / "src", size=(40, 50))
    options = own_options(source, tmp_path / "made/out", tile=16)
    whole = prepare("folder", options, quiet)

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "cut tiles" and done == 3:
            raise error

    again = options.model_copy(update={"overwrite": True, "jobs": 1})
    other = options.model_copy(update={"out": tmp_path / "new/out", "jobs": 1})
    for asked in (again, other):
        with pytest.raises(type(error)):
            prepare("folder", asked, interrupt)
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["out", "out.partial"]
    assert len(SegmentationIndex.load(whole).items) == 4 * 12
    half = tmp_path / "new/out.partial" / SegmentationIndex.load(whole).items[-1].image
    half.parent.mkdir(parents=True, exist_ok=True)
    half.write_bytes(b"II*\0half a file")
    written: list[Path] = []
    write = transfer.write_tile
    monkeypatch.setattr(transfer, "write_tile", lambda path, *rest: (written.append(path), write(path, *rest)))
    resumed = prepare("folder", other, quiet)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    assert 0 < len(written) <= 2 * (48 - 3 * 4)
    assert contents(resumed) == contents(whole)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_leftovers_of_another_request_are_cleared(tmp_path: Path) -> None:
    source = own_source(tmp_path / "src")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/half.tif").touch()
    (tmp_path / "out.partial/prepared.json").write_text("{}")
    out = prepare("folder", own_options(source, tmp_path / "out"), quiet)
    assert not (out / "half.tif").exists()
    assert not (tmp_path / "out.partial").exists()


def test_an_undeclared_value_names_value_count_file_and_remedy(tmp_path: Path) -> None:
    source = own_source(tmp_path / "src")
    mask = np.ones((24, 20), np.uint8)
    mask[3, 4:9] = 77
    write_png(source / "train/masks/1.png", mask)
    with pytest.raises(DataError, match=rf"^{source}/train/masks/1\.png: .*77 \(5 pixels\).*class file.*ignore"):
        prepare("folder", own_options(source, tmp_path / "out"), quiet)


def test_a_mask_of_another_size_is_an_error(tmp_path: Path) -> None:
    source = own_source(tmp_path / "src")
    write_png(source / "val/masks/0.png", np.ones((24, 21), np.uint8))
    with pytest.raises(DataError, match=r"val/masks/0\.png: .*24 x 21.*24 x 20"):
        prepare("folder", own_options(source, tmp_path / "out"), quiet)
    with pytest.raises(DataError, match=r"val/masks/0\.png"):
        prepare("folder", own_options(source, tmp_path / "out", tile=8), quiet)


@pytest.mark.parametrize("name", ["val/images/0.tif", "val/masks/0.png"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    source = own_source(tmp_path / "src")
    content = (source / name).read_bytes()
    (source / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        prepare("folder", own_options(source, tmp_path / "out"), quiet)


def test_images_that_differ_in_bands_or_type_are_an_error(tmp_path: Path) -> None:
    source = own_source(tmp_path / "src")
    write_tif(source / "val/images/0.tif", np.ones((3, 24, 20), np.uint16))
    with pytest.raises(DataError, match=r"val/images/0\.tif.*uint16.*uint8"):
        prepare("folder", own_options(source, tmp_path / "a"), quiet)
    write_tif(source / "val/images/0.tif", np.ones((2, 24, 20), np.uint8))
    with pytest.raises(DataError, match=r"val/images/0\.tif"):
        prepare("folder", own_options(source, tmp_path / "b"), quiet)


def test_a_missing_split_list_is_an_error(tmp_path: Path) -> None:
    source = own_source(tmp_path / "src")
    patterns = {"images": "*/images/*.tif", "masks": "*/masks/*.png", "split_lists": {"train": source / "none.txt"}}
    with pytest.raises(DataError, match=r"none\.txt: there is no such file"):
        prepare("folder", own_options(source, tmp_path / "out", folder=patterns), quiet)


def test_a_dataset_without_training_images_is_an_error(tmp_path: Path) -> None:
    source = own_source(tmp_path / "src")
    options = own_options(source, tmp_path / "out", folder={"split_as": {"train": "training"}})
    with pytest.raises(DataError, match=r"no image is in the split 'train'.*--split-as"):
        prepare("folder", options, quiet)


def test_a_full_disk_is_said_before_anything_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = own_source(tmp_path / "src")
    usage = run.require_free_disk.__globals__["shutil"].disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr("rsseg.files.shutil.disk_usage", lambda path: usage)
    with pytest.raises(MachineError, match="free, about"):
        prepare("folder", own_options(source, tmp_path / "out"), quiet)
    assert not (tmp_path / "out").exists()


def test_overlapping_tiles_ask_for_the_room_that_they_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = own_source(tmp_path / "src")
    asked: list[int] = []
    monkeypatch.setattr("rsseg.datasets.prepare.run.require_free_disk", lambda folder, needed: asked.append(needed))
    for name, stride in (("apart", 16), ("overlapping", 8)):
        prepare("folder", own_options(source, tmp_path / name, tile=16, stride=stride), quiet)
    assert asked[1] == pytest.approx(4 * asked[0], abs=4)


def test_nothing_is_fetched_without_consent_or_offline(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--download to fetch cloud\.zip \(2\.8 GB, licence cc-by-nc-4\.0\).*--src"):
        prepare("cloud", PrepareOptions(out=tmp_path / "out"), quiet)
    told: list[str] = []
    options = PrepareOptions(out=tmp_path / "out", download=True, offline=True)
    with pytest.raises(DataError, match=r"offline.*--src cloud\.zip"):
        prepare("cloud", options, lambda what, *_: told.append(what))
    assert "2.8 GB" in told[0]
    assert "cc-by-nc-4.0" in told[0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("grss", {}, "did you mean 'grass'"),
        ("folder", {}, "needs --src"),
        ("demo", {"src": Path()}, "neither --src"),
        ("grass", {"folder": FolderOptions(classes=Path("c"), images="*")}, "defines its own"),
    ],
)
def test_calls_that_make_no_sense_are_usage_errors(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prepare(name, PrepareOptions(**options), quiet)


def test_a_source_that_is_no_archive_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "grass.zip").write_bytes(b"<html>not found</html>")
    for src in (tmp_path / "grass.zip", tmp_path / "nothing"):
        with pytest.raises(DataError, match=src.name):
            prepare("grass", PrepareOptions(src=src, out=tmp_path / "out"), quiet)


def test_options_that_contradict_themselves_are_refused() -> None:
    for wrong in ({"stride": 3}, {"tile": 4, "stride": 5}, {"scale": (2.0, 1.0)}):
        with pytest.raises(ValueError, match=r"stride|scale"):
            PrepareOptions.model_validate(wrong)
    assert parse_pairs("--split-as", ["a=b,c=d:e", "f=g"]) == {"a": "b", "c": "d:e", "f": "g"}
    for text in ("a", "a=", "=b", "a=b,a=c"):
        with pytest.raises(UsageError, match="--split-as"):
            parse_pairs("--split-as", [text])
    with pytest.raises(UsageError, match="fixed:LOW,HIGH"):
        parse_scale("fixed:1")


def test_cards_are_data(tmp_path: Path) -> None:
    for card in CARDS.values():
        assert json.loads(json.dumps(card.summary()))["name"] == card.name
        assert len(card.row()) == 6
