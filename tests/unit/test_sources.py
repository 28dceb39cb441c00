"""Sources in the state in which people have them."""

import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.crs import CRS
from rasterio.transform import from_origin

from rsseg.data.index import SegmentationIndex
from rsseg.datasets.layouts import Layout, list_files
from rsseg.datasets.prepare.options import PrepareOptions
from rsseg.datasets.prepare.run import prepare
from rsseg.datasets.verify import statistics, verify
from rsseg.errors import DataError, UsageError
from tests.cards.miniatures import deepglobe, loveda, loveda_zips, potsdam, potsdam_zips
from tests.conftest import write_png, write_tif
from tests.unit.test_prepare import CLASSES, contents, own_options, own_source, publisher_zip, quiet


def made(source: Path, out: Path, **options: Any) -> SegmentationIndex:
    return SegmentationIndex.load(prepare("folder", own_options(source, out, **options), quiet))


def card(name: str, source: Path, out: Path, **options: Any) -> SegmentationIndex:
    return SegmentationIndex.load(prepare(name, PrepareOptions(src=source, out=out, jobs=1, **options), quiet))


def flat(folder: Path, count: int) -> Path:
    """Images NUMBER.png and masks NUMBER_mask.png in one folder."""
    rng = np.random.default_rng(0)
    for number in range(count):
        write_png(folder / f"{number}.png", rng.integers(1, 200, (8, 8, 3)).astype(np.uint8))
        write_png(folder / f"{number}_mask.png", rng.integers(1, 3, (8, 8)).astype(np.uint8))
    (folder / "classes.yaml").write_text(CLASSES)
    return folder


FLAT = {"images": "*.png", "masks": "*_mask.png"}
RATIO = {"train": 0.6, "val": 0.2, "test": 0.2}


def test_linked_split_folders_and_files_are_followed(tmp_path: Path) -> None:
    store = own_source(tmp_path / "store")
    source = tmp_path / "src"
    source.mkdir()
    (source / "train").symlink_to(store / "train")
    (source / "val/images").mkdir(parents=True)
    (source / "val/images/0.tif").symlink_to(store / "val/images/0.tif")
    (source / "val/masks").symlink_to("../../store/val/masks")
    shutil.copy(store / "classes.yaml", source)
    assert len(made(source, tmp_path / "out").items) == 4


def test_links_that_lead_back_end(tmp_path: Path) -> None:
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / one).mkdir()
        (tmp_path / one / "x.tif").touch()
        (tmp_path / one / "loop").symlink_to(tmp_path / other)
    (tmp_path / "a/self").symlink_to(tmp_path)
    (tmp_path / "a/broken").symlink_to("nowhere")
    assert list(list_files(tmp_path)) == ["a/loop/x.tif", "a/x.tif", "b/loop/x.tif", "b/x.tif"]


def vrt(path: Path, source: Path, relative: bool) -> None:
    name = Path("../..") / source.name
    band = "".join(
        f'<VRTRasterBand dataType="Byte" band="{b}"><SimpleSource><SourceFilename relativeToVRT="{int(relative)}">'
        f"{name if relative else source}</SourceFilename><SourceBand>{b}</SourceBand></SimpleSource></VRTRasterBand>"
        for b in (1, 2, 3)
    )
    path.write_text(f'<VRTDataset rasterXSize="20" rasterYSize="24"><SRS>EPSG:32631</SRS>{band}</VRTDataset>')


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("tile", [None, 8])
def test_vrt_images_become_files_of_their_own(tmp_path: Path, relative: bool, tile: int | None) -> None:
    source = own_source(tmp_path / "src")
    pixels = {}
    for file in source.rglob("*.tif"):
        with rasterio.open(file) as image:
            pixels[f"{file.parts[-3]}/{file.stem}"] = image.read()
        store = source / f"{file.parts[-3]}-{file.name}"
        file.rename(store)
        vrt(file.with_suffix(".vrt"), store, relative)
    index = made(source, tmp_path / "deep/er/out", folder={"images": "{split}/images/*.vrt"}, tile=tile)
    shutil.rmtree(source)
    assert verify(tmp_path / "deep/er/out").ok
    if tile is None:
        assert index.items[0].image == "train/images/0.vrt.tif"
        with rasterio.open(index.image_files(index.items[0])[0]) as image:
            np.testing.assert_array_equal(image.read(), pixels["train/0"])
            assert image.crs == CRS.from_epsg(32631)


def test_world_files_of_png_images_come_along(tmp_path: Path) -> None:
    source = flat(tmp_path / "src", 3)
    for number in range(3):
        (source / f"{number}.pgw").write_text(f"0.5\n0\n0\n-0.5\n{100 + number}.25\n99.75\n")
    for name in ("folder", "packed"):
        src = source
        if name == "packed":
            src = tmp_path / "src.zip"
            with zipfile.ZipFile(src, "w") as archive:
                for file in source.iterdir():
                    archive.write(file, file.name)
        options = own_options(source, tmp_path / name, folder=FLAT, split_ratio=RATIO)
        index = SegmentationIndex.load(prepare("folder", options.model_copy(update={"src": src}), quiet))
        with rasterio.open(index.image_files(index.items[1])[0]) as image:
            assert image.transform == from_origin(101, 100, 0.5, 0.5)


def test_side_files_are_no_images(tmp_path: Path) -> None:
    for name in ("i/a.tif", "i/a.tif.aux.xml", "i/a.tfw", "i/a.tif.ovr"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    layout = Layout("i/*", one_split="train", unlabeled=("train",))
    assert [item.image for item in layout.items(tmp_path)] == ["i/a.tif"]


def test_masks_beside_images_are_no_images(tmp_path: Path) -> None:
    source = flat(tmp_path / "src", 3)
    index = made(source, tmp_path / "out", folder=FLAT, split_ratio=RATIO)
    assert {(item.image, item.mask) for item in index.items} == {(f"{i}.png", f"{i}_mask.png") for i in range(3)}
    assert sorted(item.split for item in index.items) == ["test", "train", "val"]
    (source / "0.png").unlink()
    with pytest.raises(DataError, match=r"0_mask\.png.*mask pattern also matches it"):
        made(source, tmp_path / "b", folder=FLAT, split_ratio=RATIO)


def test_labels_beside_the_archive_that_they_came_from_are_taken_once(tmp_path: Path) -> None:
    source = potsdam(tmp_path / "src", kinds=("RGB",))
    packed = potsdam_zips(tmp_path)
    shutil.copy(next(packed.rglob("5_Labels_all.zip")), source)
    expected = contents(prepare("potsdam", PrepareOptions(src=source, out=tmp_path / "a", jobs=1), quiet) / "masks")
    for file in (source / "5_Labels_all").iterdir():
        file.rename(source / file.name)
    found = contents(prepare("potsdam", PrepareOptions(src=source, out=tmp_path / "b", jobs=1), quiet) / "masks")
    assert list(found.values()) == list(expected.values())


@pytest.mark.parametrize("unpacked", ["", "cloud", "wrapped"])
def test_an_archive_that_differs_from_what_lies_beside_it_is_an_error(tmp_path: Path, unpacked: str) -> None:
    source = tmp_path / "src"
    source.mkdir()
    archive = publisher_zip(tmp_path / "cloud.zip", "cloud").rename(source / "cloud.zip")
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path)
    shutil.copytree(tmp_path / "wrapped", source / unpacked, dirs_exist_ok=True)
    assert len(card("cloud", source, tmp_path / "a").items) == 6
    changed = source / unpacked / "ann_dir/val/a_1.png"
    write_png(changed, np.zeros((16, 16), np.uint8))
    with pytest.raises(DataError, match=r"ann_dir/val/a_1\.png differs from .*cloud\.zip"):
        card("cloud", source, tmp_path / "b")


def test_two_different_copies_of_a_dataset_are_an_error(tmp_path: Path) -> None:
    for name in ("old", "new"):
        deepglobe(tmp_path / "src" / name)
    assert len(card("deepglobe", tmp_path / "src", tmp_path / "a").items) == 6
    next((tmp_path / "src/new").rglob("*_mask.png")).unlink()
    with pytest.raises(DataError, match="both look like the dataset"):
        card("deepglobe", tmp_path / "src", tmp_path / "b")


def test_a_subset_of_scenes_is_prepared_on_request(tmp_path: Path) -> None:
    source = potsdam(tmp_path / "src", kinds=("RGB",))
    images = source / "2_Ortho_RGB"
    for file in images.iterdir():
        if "_2_1" not in file.name:
            file.unlink()
    with pytest.raises(DataError, match=r"mask\(s\) have no image.*--subset"):
        card("potsdam", source, tmp_path / "a")
    index = card("potsdam", source, tmp_path / "b", subset=True)
    assert {(item.scene, item.split) for item in index.items} == {
        ("2_10", "train"), ("2_11", "train"), ("2_12", "train"), ("2_13", "test"), ("2_14", "test"),
    }  # fmt: skip
    for file in images.iterdir():
        if file.name.split("_")[3] in ("10", "11", "12"):
            file.unlink()
    only_test = card("potsdam", source, tmp_path / "c", subset=True)
    assert only_test.splits() == ("test",)
    assert only_test.task.mean is not None


def test_a_ratio_splits_the_scenes_of_a_known_dataset(tmp_path: Path) -> None:
    packed = loveda_zips(tmp_path)
    for name in ("Val.zip", "Test.zip"):
        next(packed.rglob(name)).unlink()
    with pytest.raises(DataError, match=r"'val' has no images.*--subset.*--split-ratio"):
        card("loveda", packed, tmp_path / "a")
    index = card("loveda", packed, tmp_path / "b", split_ratio=RATIO)
    assert set(index.splits()) == {"train", "val", "test"}
    assert index.split_rule == "ratio"
    with pytest.raises(UsageError, match="exclude each other"):
        card("loveda", packed, tmp_path / "c", split_ratio=RATIO, split="official")
    with pytest.raises(UsageError, match="add up to 1"):
        card("loveda", packed, tmp_path / "c", split_ratio={"train": 0.5})


def test_unlabeled_images_keep_their_split_under_a_ratio(tmp_path: Path) -> None:
    index = card("loveda", loveda(tmp_path / "src"), tmp_path / "out", split_ratio={"train": 0.7, "val": 0.3})
    assert {item.split for item in index.items if item.mask is None} == {"test"}
    assert {item.split for item in index.items if item.mask is not None} == {"train", "val"}


def test_three_scenes_give_one_to_each_split_even_in_three_domains(tmp_path: Path) -> None:
    source = deepglobe(tmp_path / "src")
    kept = sorted(source.rglob("*_sat.jpg"))[:3]
    for file in source.rglob("*_sat.jpg"):
        if file not in kept:
            file.unlink()
            Path(str(file).replace("_sat.jpg", "_mask.png")).unlink()
    assert sorted(item.split for item in card("deepglobe", source, tmp_path / "a").items) == ["test", "train", "val"]


def test_a_dataset_may_be_for_scoring_only(tmp_path: Path) -> None:
    source = own_source(tmp_path / "src", dtype="uint16")
    shutil.rmtree(source / "train")
    (source / "val").rename(source / "test")
    index = made(source, tmp_path / "out")
    assert index.splits() == ("test",)
    assert index.task.mean is not None
    assert verify(tmp_path / "out").ok
    patterns = {"images": "*/images/*.tif", "masks": "*/masks/*.png"}
    assert made(source, tmp_path / "b", folder=patterns, split_ratio={"test": 1}).splits() == ("test",)


def test_training_masks_without_a_label_are_an_error_and_missing_classes_a_note(tmp_path: Path) -> None:
    source = own_source(tmp_path / "src")
    for file in source.glob("train/masks/*.png"):
        write_png(file, np.ones((24, 20), np.uint8))
    told: list[str] = []
    prepare("folder", own_options(source, tmp_path / "a"), lambda what, *_: told.append(what))
    assert "no labeled pixel in the split 'train': sea" in told
    for file in source.glob("train/masks/*.png"):
        write_png(file, np.zeros((24, 20), np.uint8))
    with pytest.raises(DataError, match=r"no labeled pixel in 3 mask\(s\) of the split 'train'"):
        made(source, tmp_path / "b")


@pytest.mark.parametrize("tile", [None, 12])
def test_class_areas_leave_out_pixels_without_data(tmp_path: Path, tile: int | None) -> None:
    source = own_source(tmp_path / "src")
    for file in source.rglob("*.tif"):
        pixels = np.full((4, 24, 24), 90, np.uint8)
        pixels[3, :5] = 0
        write_tif(file, pixels, photometric="RGB", ALPHA="YES")
        write_png(file.parents[1] / "masks" / f"{file.stem}.png", np.ones((24, 24), np.uint8))
    index = made(source, tmp_path / "out", tile=tile)
    assert sum(sum(item.classes or ()) for item in index.items) == 4 * 19 * 24
    for split in statistics(tmp_path / "out").splits:
        assert split.classes[0].pixels == split.pixels
        assert split.ignored.pixels == 0
    assert sum(split.pixels["land"] for split in verify(tmp_path / "out").splits) == 4 * 19 * 24


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_jpeg_masks_are_explained(tmp_path: Path, suffix: str) -> None:
    source = own_source(tmp_path / "src", size=(32, 32))
    for file in source.rglob("*.png"):
        mask = np.random.default_rng(0).integers(0, 3, (32, 32)).astype(np.uint8)
        if suffix == "jpg":
            Image.fromarray(mask).save(file.with_suffix(".jpg"))
        else:
            write_tif(file.with_suffix(".tif"), mask[None], compress="jpeg")
    with pytest.raises(DataError, match=rf"0\.{suffix}: JPEG compression changes values: export .* PNG or GeoTIFF"):
        made(source, tmp_path / "out", folder={"masks": f"{{split}}/masks/*.{suffix}"})


@pytest.mark.parametrize("suffix", ["geojson", "shp", "gpkg"])
def test_vector_masks_are_explained(tmp_path: Path, suffix: str) -> None:
    source = own_source(tmp_path / "src")
    for file in source.rglob("*.png"):
        file.with_suffix(f".{suffix}").write_text('{"type": "FeatureCollection", "features": []}')
    with pytest.raises(DataError, match=rf"0\.{suffix}: a vector file, but masks must be rasters.*prepare vectors"):
        made(source, tmp_path / "out", folder={"masks": f"{{split}}/masks/*.{suffix}"})


def test_an_unpacked_source_tree_prepares_without_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", unknown)
    assert made(own_source(tmp_path / "src"), tmp_path / "out").items


@pytest.mark.parametrize("tile", [None, 8])
def test_masks_are_compared_by_place_and_turned(tmp_path: Path, tile: int | None) -> None:
    source = own_source(tmp_path / "src", size=(16, 16))
    mask = np.repeat(np.array([1] * 10 + [2] * 6, np.uint8)[:, None], 16, axis=1)
    north, south = from_origin(500000, 4000000, 10, 10), from_origin(500000, 4000000 - 160, 10, -10)
    masks = [(file.parents[1] / "masks" / f"{file.stem}.tif", file) for file in source.rglob("*.tif")]
    for path, image in masks:
        write_tif(image, np.full((3, 16, 16), 90, np.uint8), transform=north)
        write_tif(path, mask[None, ::-1], transform=south)
    index = made(source, tmp_path / "a", tile=tile, folder={"masks": "{split}/masks/*.tif"})
    counts = np.sum([item.classes for item in index.items if item.split == "val"], axis=0)
    assert counts.tolist() == [160, 96]
    if tile:
        first = next(item for item in index.items if item.origin == (8, 0))
        assert first.classes == (2 * 8, 6 * 8)
    write_tif(masks[0][0], mask[None], transform=from_origin(500020, 4000000, 10, 10))
    with pytest.raises(DataError, match=r"the mask lies elsewhere than its image"):
        made(source, tmp_path / "b", tile=tile, folder={"masks": "{split}/masks/*.tif"})
