"""What mask files mean: place, palettes, transparency, nodata, floats."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from rasterio.transform import Affine

from rsseg.data.dataset import SampleReader
from rsseg.data.index import LabelMap, SegmentationIndex
from rsseg.data.labels import LabelTable
from rsseg.datasets.prepare.options import FolderOptions, PrepareOptions
from rsseg.datasets.prepare.run import prepare
from rsseg.datasets.verify import statistics, verify
from rsseg.errors import DataError
from rsseg.raster import Raster
from tests.conftest import write_png, write_tif

SIZE = 24, 20
TRUTH: NDArray[np.uint8] = np.random.default_rng(5).integers(0, 3, SIZE).astype(np.uint8)
NORTH_UP = Affine(10, 0, 500000, 0, -10, 4000000)
SOUTH_UP = Affine(10, 0, 500000, 0, 10, 4000000 - 10 * SIZE[0])
WriteMask = Callable[[Path, NDArray[np.uint8]], Any]


def prepared(
    folder: Path,
    write_mask: WriteMask,
    *,
    suffix: str = "tif",
    pixels: NDArray[Any] | None = None,
    image: dict[str, Any] | None = None,
    extra: str = "",
    values: tuple[int, int, int] = (0, 1, 2),
    **options: Any,
) -> SegmentationIndex:
    """One training image whose mask shows `TRUTH`, prepared; classes "a", "b" and "c" are stored as `values`."""
    if pixels is None:
        pixels = np.random.default_rng(6).integers(1, 255, (3, *SIZE), np.uint8)
    write_tif(folder / "src/train/images/0.tif", pixels, **{"transform": NORTH_UP} | (image or {}))
    mask = folder / f"src/train/masks/0.{suffix}"
    mask.parent.mkdir(parents=True)
    write_mask(mask, np.array(values, np.uint8)[TRUTH])
    entries = ", ".join(
        f"{{name: {n}, value: {v}, color: '#{i}0{i}0{i}0'}}" for i, (n, v) in enumerate(zip("abc", values, strict=True))
    )
    (folder / "classes.yaml").write_text(f"name: mine\nclasses: [{entries}]\n{extra}\n")
    choices = FolderOptions(
        classes=folder / "classes.yaml", images="{split}/images/*.tif", masks=f"{{split}}/masks/*.{suffix}"
    )
    made = PrepareOptions(src=folder / "src", out=folder / "out", folder=choices, jobs=1, **options)
    return SegmentationIndex.load(prepare("folder", made, lambda what, done, total: None))


def labels_of(index: SegmentationIndex, *, cache: bool = False) -> NDArray[np.uint8]:
    """The mask as training reads it; the class counts of index and statistics must agree with it."""
    (item,) = index.items
    mask = SampleReader(index, index.task.bands, cache=cache).sample(item)[2]
    counted = tuple(int((mask == k).sum()) for k in range(3))
    assert item.classes == counted
    assert tuple(area.pixels for area in statistics(index.root).splits[0].classes) == counted
    assert verify(index.root).ok
    return mask


@pytest.mark.parametrize("tile", [None, 16])
@pytest.mark.parametrize("cache", [False, True])
def test_mask_stored_upside_down_is_turned(tmp_path: Path, cache: bool, tile: int | None) -> None:
    index = prepared(tmp_path, lambda p, m: write_tif(p, m[None, ::-1], transform=SOUTH_UP), tile=tile)
    if tile is None:
        np.testing.assert_array_equal(labels_of(index, cache=cache), TRUTH)
    else:
        reader = SampleReader(index, index.task.bands, cache=cache)
        for item in index.items:
            (row, col), mask = item.origin or (0, 0), reader.mask(item)
            part = TRUTH[row : row + 16, col : col + 16]
            np.testing.assert_array_equal(mask[: part.shape[0], : part.shape[1]], part)


@pytest.mark.parametrize("mirror", [(1, -1), (-1, -1)])
def test_mask_mirrored_left_to_right_is_turned(tmp_path: Path, mirror: tuple[int, int]) -> None:
    rows, cols = mirror
    place = Affine(-10, 0, 500000 + 10 * SIZE[1], 0, -10 * rows, 4000000 if rows > 0 else SOUTH_UP.f)
    index = prepared(tmp_path, lambda p, m: write_tif(p, m[None, ::rows, ::cols], transform=place))
    np.testing.assert_array_equal(labels_of(index), TRUTH)


@pytest.mark.parametrize(
    "options", [{"transform": NORTH_UP * Affine.translation(2, 0)}, {"transform": NORTH_UP, "crs": "EPSG:32632"}]
)
def test_mask_on_another_grid_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"masks/0\.tif: the mask lies elsewhere than its image"):
        prepared(tmp_path, lambda p, m: write_tif(p, m[None], **options))


def test_mask_moved_after_preparation_is_found_by_verify_and_reading(tmp_path: Path) -> None:
    index = prepared(tmp_path, lambda p, m: write_tif(p, m[None]))
    (item,) = index.items
    (index.root / str(item.mask)).unlink()  # it is linked to its source
    write_tif(index.root / str(item.mask), TRUTH[None], transform=NORTH_UP * Affine.translation(0, 3))
    assert [problem.file for problem in verify(index.root).problems] == [item.mask]
    with pytest.raises(DataError, match="lies elsewhere"):
        SampleReader(index, index.task.bands, cache=True).mask(item)


def test_pixels_without_image_data_are_counted_nowhere(tmp_path: Path) -> None:
    alpha = np.full((1, *SIZE), 255, np.uint8)
    alpha[0, :5] = 0
    pixels = np.concatenate([np.full((3, *SIZE), 9, np.uint8), alpha])
    options = {"photometric": "RGB", "alpha": "YES"}
    mask = labels_of(prepared(tmp_path, lambda p, m: write_tif(p, m[None]), pixels=pixels, image=options))
    assert (mask[:5] == 255).all()
    np.testing.assert_array_equal(mask[5:], TRUTH[5:])


@pytest.mark.parametrize("tile", [None, 24])
def test_each_band_keeps_its_nodata_value_through_tiles(tmp_path: Path, tile: int | None) -> None:
    pixels = np.full((2, *SIZE), 5, np.int16)
    pixels[0, 0], pixels[1, 1], pixels[1, 2] = -1, -2, -1

    def write_image(folder: Path) -> None:
        for band, value in ((0, -1), (1, -2)):
            write_tif(folder / f"{band}.tif", pixels[band : band + 1], nodata=value, transform=NORTH_UP)
        parts = "".join(
            f'<VRTRasterBand dataType="Int16" band="{band + 1}"><NoDataValue>{value}</NoDataValue><SimpleSource>'
            f'<SourceFilename relativeToVRT="0">{folder}/{band}.tif</SourceFilename></SimpleSource></VRTRasterBand>'
            for band, value in ((0, -1), (1, -2))
        )
        place = ", ".join(map(str, NORTH_UP.to_gdal()))
        (folder / "0.vrt").write_text(
            f'<VRTDataset rasterXSize="{SIZE[1]}" rasterYSize="{SIZE[0]}"><GeoTransform>{place}</GeoTransform>'
            f"{parts}</VRTDataset>"
        )

    source = tmp_path / "src/train"
    (source / "images").mkdir(parents=True)
    write_image(source / "images")
    write_tif(source / "masks/0.tif", TRUTH[None], crs=None, transform=NORTH_UP)
    entries = ", ".join(f"{{name: {n}, value: {v}, color: '#{v}0{v}0{v}0'}}" for v, n in enumerate("abc"))
    (tmp_path / "classes.yaml").write_text(f"name: mine\nclasses: [{entries}]\n")
    choices = FolderOptions(
        classes=tmp_path / "classes.yaml", images="{split}/images/*.vrt", masks="{split}/masks/*.tif"
    )
    options = PrepareOptions(src=tmp_path / "src", out=tmp_path / "out", folder=choices, jobs=1, tile=tile)
    index = SegmentationIndex.load(prepare("folder", options, lambda what, done, total: None))
    valid = SampleReader(index, index.task.bands, cache=False).image(index.items[0])[1]
    assert valid[: SIZE[0], : SIZE[1]].all(1).tolist() == [False, False] + [True] * (SIZE[0] - 2)


def write_transparent(path: Path, mask: NDArray[np.uint8]) -> None:
    alpha = np.full(mask.shape, 255, np.uint8)
    alpha[:3] = 0
    Image.fromarray(np.stack([mask, alpha], axis=2)).save(path)


@pytest.mark.parametrize("tile", [None, 24])
def test_transparent_pixels_of_a_mask_have_no_label(tmp_path: Path, tile: int | None) -> None:
    index = prepared(tmp_path, write_transparent, suffix="png", tile=tile)
    mask = SampleReader(index, index.task.bands, cache=False).mask(index.items[0])[:, : SIZE[1]]
    assert (mask[:3] == 255).all()
    np.testing.assert_array_equal(mask[3:], TRUTH[3:])


def test_nodata_of_a_mask_is_ignored_unless_it_is_a_class(tmp_path: Path) -> None:
    def with_nodata(value: float, dtype: str) -> WriteMask:
        def write(path: Path, mask: NDArray[np.uint8]) -> None:
            stored = mask.astype(dtype)
            stored[:2] = value
            write_tif(path, stored[None], nodata=value)

        return write

    for number, (value, dtype) in enumerate(((9, "uint8"), (-1, "int16"), (np.nan, "float32"), (-9999, "float32"))):
        mask = labels_of(prepared(tmp_path / str(number), with_nodata(value, dtype)))
        assert (mask[:2] == 255).all()
        np.testing.assert_array_equal(mask[2:], TRUTH[2:])
    mask = labels_of(prepared(tmp_path / "class", with_nodata(0, "uint8")))
    assert (mask[:2] == 0).all()


@pytest.mark.parametrize(("value", "shown"), [(0.5, "0.5"), (np.nan, "nan")])
def test_floats_that_are_no_class_are_named_with_a_remedy_that_works(tmp_path: Path, value: float, shown: str) -> None:
    def write(path: Path, mask: NDArray[np.uint8]) -> None:
        stored = mask.astype(np.float32)
        stored[4, 5:7] = value
        write_tif(path, stored[None])

    expected = rf"masks/0\.tif: .*: {shown} \(2 pixels\), first at row 4, column 5; .*whole numbers: round or threshold"
    with pytest.raises(DataError, match=expected):
        prepared(tmp_path, write)


def test_value_255_can_be_a_class(tmp_path: Path) -> None:
    index = prepared(tmp_path, lambda p, m: write_png(p, m), suffix="png", values=(0, 128, 255))
    np.testing.assert_array_equal(labels_of(index), TRUTH)
    assert [info.value for info in index.task.classes] == [0, 1, 2]


def test_masks_saved_as_jpeg_are_not_to_be_ignored_value_by_value(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="JPEG compression changes values: export the masks as PNG or GeoTIFF"):
        prepared(tmp_path, lambda p, m: Image.fromarray(m).save(p), suffix="jpg", values=(0, 100, 200))


@pytest.mark.parametrize(
    ("palette", "values", "expected"),
    [
        ({0: 0, 1: 1, 2: 2}, (0, 1, 2), [0, 1, 2]),
        ({0: 0, 1: 128, 2: 255}, (0, 1, 2), [0, 1, 2]),  # stretched to be seen; positions are the classes
        ({0: 0, 1: 128, 2: 255}, (0, 128, 255), [0, 1, 2]),  # a writer kept only the grey levels that occur
        ({0: 255, 1: 128, 2: 0}, (0, 128, 255), [2, 1, 0]),  # in any order
        ({0: 0, 1: 255}, (0, 255), [0, 1]),  # one bit
        ({0: 0, 1: 255}, (0, 1, 255), [0, 1]),
        ({0: 0, 1: 2, 2: 1}, (0, 1, 2), None),
        ({0: 0, 1: 2}, (0, 1, 2), None),
    ],
)
def test_grey_palette_shows_values_or_decorates_positions(
    palette: dict[int, int], values: tuple[int, ...], expected: list[int] | None
) -> None:
    colors = {position: (gray, gray, gray, 255) for position, gray in palette.items()}
    colors |= dict.fromkeys(range(len(palette), 256), (0, 0, 0, 255))
    table = LabelTable(LabelMap(values={value: i for i, value in enumerate(values)}), 3)
    stored = np.array([[list(palette)]], np.uint8)
    if expected is None:
        with pytest.raises(DataError, match="m: positions in the palette and the grey levels"):
            table.indices(stored, colors, name="m")
    else:
        assert table.indices(stored, colors, name="m")[0].tolist() == expected


@pytest.mark.parametrize("values", [(0, 1), (0, 255)])
def test_masks_of_one_bit_hold_0_and_1_and_show_0_and_255(tmp_path: Path, values: tuple[int, int]) -> None:
    Image.fromarray(np.where(TRUTH > 0, 255, 0).astype(np.uint8)).convert("1").save(tmp_path / "m.png")
    write_tif(tmp_path / "m.tif", (TRUTH > 0).astype(np.uint8)[None], nbits=1)
    table = LabelTable(LabelMap(values={value: i for i, value in enumerate(values)}), 2)
    for name in ("m.png", "m.tif"):
        with Raster(tmp_path / name) as raster:
            np.testing.assert_array_equal(table.read(raster), TRUTH > 0)


def test_colored_palette_decorates_positions() -> None:
    table = LabelTable(LabelMap(values={0: 0, 1: 1, 2: 2}), 3)
    palette = {0: (0, 0, 0, 255), 1: (2, 2, 2, 255), 2: (255, 0, 0, 255)}
    assert table.indices(np.array([[[0, 1, 2]]], np.uint8), palette, name="m").tolist() == [[0, 1, 2]]
