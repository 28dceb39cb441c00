"""Reading samples: bands, labels, sizes, and the cache of decoded images."""

import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from rasterio.transform import Affine

from rsseg.data.dataset import CACHE_NAME, ArrayCache, Page, SampleReader, _remember
from rsseg.data.index import IndexItem, LabelMap, SegmentationIndex
from rsseg.data.labels import LabelTable
from rsseg.errors import DataError, RssegWarning
from rsseg.raster import Raster, Window
from tests.conftest import rgb_task, write_png, write_tif


def reader_of(root: Path, *, cache: bool = True, bands: tuple[str, ...] | None = None) -> SampleReader:
    index = SegmentationIndex.load(root)
    return SampleReader(index, bands or index.task.bands, cache=cache)


@pytest.mark.parametrize("fixture", ["rgb_dataset", "uint16_dataset", "color_mask_dataset"])
def test_cached_samples_equal_direct_reads(fixture: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(fixture)
    index = SegmentationIndex.load(root)
    cached, direct = reader_of(root), reader_of(root, cache=False)
    for item in index.items[:3]:
        for window in (None, Window(1, 2, 30, 20)):
            for a, b in zip(cached.sample(item, window), direct.sample(item, window), strict=True):
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)
        assert cached.size(item) == direct.size(item)
    assert not any(path.suffix == ".tmp" for path in (root / CACHE_NAME).iterdir())


def test_pixels_without_data_are_ignored_in_the_mask(uint16_dataset: Path) -> None:
    index = SegmentationIndex.load(uint16_dataset)
    pixels, valid, mask = reader_of(uint16_dataset).sample(index.items[0])
    assert not valid[:2].any()
    assert valid[2:].all()
    assert (mask[:2] == 255).all()
    assert (mask[2:] < 3).all()
    assert pixels.dtype == np.uint16


def test_bands_come_in_the_order_asked_for(uint16_dataset: Path) -> None:
    index = SegmentationIndex.load(uint16_dataset)
    whole, _ = reader_of(uint16_dataset).image(index.items[0])
    part, _ = reader_of(uint16_dataset, bands=("nir", "red")).image(index.items[0])
    np.testing.assert_array_equal(part, whole[[3, 0]])
    with pytest.raises(DataError, match="band 'swir'"):
        reader_of(uint16_dataset, bands=("swir",))


def test_colour_masks_and_their_palette_form_give_the_same_classes(color_mask_dataset: Path, tmp_path: Path) -> None:
    table = LabelTable(SegmentationIndex.load(color_mask_dataset).label_map, 3)
    stored = np.random.default_rng(0).integers(0, 3, (1, 5, 6), dtype=np.uint8)
    palette = {0: (255, 0, 0, 255), 1: (0, 255, 0, 255), 2: (0, 0, 255, 255)}
    colors = np.array([color[:3] for color in palette.values()], np.uint8)[stored[0]].transpose(2, 0, 1)
    np.testing.assert_array_equal(table.indices(stored, palette, name="m"), stored[0])
    np.testing.assert_array_equal(table.indices(colors, None, name="m"), stored[0])
    colors[:, 2, 3] = 9, 8, 7
    with pytest.raises(DataError, match=r"m: 1 undeclared .* \(9, 8, 7\) \(1 pixels\)"):
        table.indices(colors, None, name="m")


@pytest.mark.parametrize("cache", [True, False])
def test_undeclared_mask_value_names_value_count_and_file(rgb_dataset: Path, cache: bool) -> None:
    index = SegmentationIndex.load(rgb_dataset)
    with Raster(rgb_dataset / "masks" / "00.png") as raster:
        mask = raster.read_raw()[0]
    mask[:1, :5] = 77
    write_png(rgb_dataset / "masks" / "00.png", mask)
    with pytest.raises(DataError, match=r"00\.png: 1 undeclared mask value\(s\): 77 \(5 pixels\)"):
        reader_of(rgb_dataset, cache=cache).mask(index.items[0])


def test_negative_and_16_bit_mask_values_can_be_declared(tmp_path: Path) -> None:
    table = LabelTable(LabelMap(values={-1: 255, 300: 0, 2: 1}), 2)
    stored = np.array([[[-1, 300, 2]]], np.int16)
    assert table.indices(stored, None, name="m").tolist() == [[255, 0, 1]]
    with pytest.raises(DataError, match=r"undeclared .* 0 \(1 pixels\)"):
        table.indices(np.array([[[0, 300]]], np.int16), None, name="m")


def test_label_map_must_fit_the_task() -> None:
    with pytest.raises(DataError, match="class 5"):
        LabelTable(LabelMap(values={1: 5}), 3)
    with pytest.raises(DataError, match="values or colors"):
        LabelTable(LabelMap(), 3)


def test_wrong_bands_type_and_mask_size_are_errors(rgb_dataset: Path) -> None:
    items = SegmentationIndex.load(rgb_dataset).items
    write_png(rgb_dataset / items[0].image, np.zeros((9, 9), np.uint8))
    write_tif(rgb_dataset / items[1].image, np.zeros((3, 9, 9), np.uint16))
    write_png(rgb_dataset / str(items[2].mask), np.zeros((9, 9), np.uint8))
    reader = reader_of(rgb_dataset)
    with pytest.raises(DataError, match=r"00\.png: the image has 1 bands, the dataset 3"):
        reader.image(items[0])
    with pytest.raises(DataError, match=r"01\.png: the pixels are uint16"):
        reader.image(items[1])
    with pytest.raises(DataError, match=r"masks/02\.png: the mask has 9 x 9 pixels"):
        reader.mask(items[2])
    (rgb_dataset / items[3].image).unlink()
    with pytest.raises(DataError, match=r"03\.png: there is no such file"):
        reader.image(items[3])


def test_changed_image_is_converted_again(rgb_dataset: Path) -> None:
    item = SegmentationIndex.load(rgb_dataset).items[0]
    reader_of(rgb_dataset).image(item)
    write_png(rgb_dataset / item.image, np.full((5, 4, 3), 9, np.uint8))
    pixels, _ = reader_of(rgb_dataset).image(item)
    assert pixels.shape == (3, 5, 4)


def test_unwritable_cache_warns_once_and_reads_directly(rgb_dataset: Path) -> None:
    (rgb_dataset / CACHE_NAME).write_text("a file where the folder should be")
    items = SegmentationIndex.load(rgb_dataset).items
    with pytest.warns(RssegWarning, match="cannot be cached"):
        reader = reader_of(rgb_dataset)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RssegWarning)
        assert all(reader.image(item)[0].any() for item in items[:2])


def test_full_disk_while_converting_leaves_no_file_and_reads_directly(
    rgb_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tifffile.TiffWriter.write", full)
    item = SegmentationIndex.load(rgb_dataset).items[0]
    reader = reader_of(rgb_dataset)
    with pytest.warns(RssegWarning, match="No space left"):
        assert reader.image(item)[0].any()
    assert list((rgb_dataset / CACHE_NAME).iterdir()) == []


def test_cached_mask_follows_the_location_of_its_image(uint16_dataset: Path) -> None:
    item = SegmentationIndex.load(uint16_dataset).items[0]
    before = reader_of(uint16_dataset).mask(item).copy()
    with rasterio.open(uint16_dataset / item.image, "r+") as file:
        file.transform = file.transform * Affine(1, 0, 0, 0, -1, file.height)  # south-up
    assert np.array_equal(reader_of(uint16_dataset).mask(item), before[::-1])
    with rasterio.open(uint16_dataset / item.image, "r+") as file:
        file.transform = file.transform * Affine.translation(5, 0)
    with pytest.raises(DataError, match="lies elsewhere than its image"):
        reader_of(uint16_dataset).mask(item)


@pytest.mark.parametrize("name", ["00.tif.aux.xml", "00.tfw", "00.wld"])
def test_cache_follows_side_files(uint16_dataset: Path, tmp_path: Path, name: str) -> None:
    image, cache = uint16_dataset / "images" / "00.tif", ArrayCache(tmp_path / "cache")
    before = cache.path([image], "")
    (image.parent / name).write_text("1\n")
    assert cache.path([image], "") != before


def test_half_a_cache_file_is_made_again(rgb_dataset: Path) -> None:
    item = SegmentationIndex.load(rgb_dataset).items[0]
    expected, _ = reader_of(rgb_dataset).image(item)
    expected = expected.copy()
    (file,) = (rgb_dataset / CACHE_NAME).iterdir()
    file.write_bytes(file.read_bytes()[:600])
    np.testing.assert_array_equal(reader_of(rgb_dataset).image(item)[0], expected)


def test_pickled_reader_reads_the_same(rgb_dataset: Path) -> None:
    item = SegmentationIndex.load(rgb_dataset).items[0]
    reader = reader_of(rgb_dataset)
    pixels, _ = reader.image(item)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(reader)).image(item)[0], pixels)


def test_strips_of_a_large_image_are_stored_in_order(tmp_path: Path) -> None:
    array = np.arange(7 * 4 * 2, dtype=np.int16).reshape(7, 4, 2)
    cache = ArrayCache(tmp_path / "cache")
    strips: list[NDArray[Any]] = [array[:3], array[3:6], array[6:]]
    path = tmp_path / "cache" / "x.tif"
    cache.store(path, [Page(iter(strips), (7, 4, 2), np.int16, 3)])
    loaded = cache.load(path)
    assert loaded is not None
    np.testing.assert_array_equal(loaded[0], array)
    shutil.rmtree(tmp_path / "cache")
    assert cache.load(path) is None


MANY_IMAGES = """
import resource, sys
from pathlib import Path
from rsseg.config import DataConfig, SelectConfig
from rsseg.data.sources import Datasets
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
datasets = Datasets(DataConfig(path=Path(sys.argv[1])))
source = datasets.open(SelectConfig(), "train", datasets.task, masks=True)
kept = [source.reader.sample(item) for _ in range(2) for item in source.items]
assert len(kept) == 1400
for i, (pixels, _, mask) in enumerate(kept):
    assert (pixels == i % 700 % 256).all() and (mask == 2).all()
"""


def test_seven_hundred_images_are_read_with_few_file_descriptors(tmp_path: Path) -> None:
    write_png(tmp_path / "mask.png", np.full((8, 8), 2, np.uint8))
    items = []
    for number in range(700):
        write_png(tmp_path / f"images/{number}.png", np.full((8, 8, 3), number % 256, np.uint8))
        items.append(IndexItem(image=f"images/{number}.png", mask="mask.png", split="train"))
    label_map = LabelMap(values={0: 0, 1: 1, 2: 2})
    SegmentationIndex(task=rgb_task(), label_map=label_map, items=tuple(items)).save(tmp_path)
    subprocess.run([sys.executable, "-c", MANY_IMAGES, str(tmp_path)], check=True, timeout=300)


def test_maps_stay_bounded_whatever_the_number_of_images() -> None:
    table: dict[str, int] = {}
    for number in range(100_000):
        _remember(table, str(number), number)
    assert list(table.values()) == list(range(100_000 - len(table), 100_000))
    # image and mask of up to eight readers, well under the 65530 maps of a Linux process
    assert 2 * 8 * len(table) < 65_530 / 2


def test_what_killed_processes_left_in_the_cache_is_removed(tmp_path: Path) -> None:
    old, new = tmp_path / "a.0.tmp", tmp_path / "b.1.tmp"
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (1, 1))
    ArrayCache(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [new.name]
