"""The one reader: valid masks, scales, several files, bands, and what it says about bad files."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.transform import Affine

from rsseg.errors import DataError
from rsseg.raster import Raster, Window, match_bands
from tests.conftest import write_png, write_tif


def test_palette_png_gives_indices(tmp_path: Path) -> None:
    indices = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3
    image = Image.fromarray(indices).convert("L").convert("P")
    image.putdata(indices.ravel().tolist())
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    image.save(tmp_path / "mask.png")
    with Raster(tmp_path / "mask.png") as raster:
        pixels, _ = raster.read()
        assert raster.info.colormap is not None
        assert raster.info.colormap[1] == (200, 0, 0, 255)
    np.testing.assert_array_equal(pixels, indices[None])


def test_window_is_the_same_as_slicing_the_whole(tmp_path: Path) -> None:
    file = write_tif(tmp_path / "a.tif", np.random.default_rng(0).integers(0, 9000, (3, 50, 70), dtype=np.uint16))
    with Raster(file) as raster:
        whole, _ = raster.read()
        part, valid = raster.read(Window(7, 11, 20, 30))
        with pytest.raises(ValueError, match="not inside"):
            raster.read(Window(40, 0, 11, 5))
    np.testing.assert_array_equal(part, whole[:, 7:27, 11:41])
    assert part.dtype == np.uint16
    assert valid.all()


def test_several_files_are_one_image_in_any_band_order(tmp_path: Path) -> None:
    bands = np.random.default_rng(0).integers(1, 200, (3, 8, 9), dtype=np.uint8)
    files = [write_tif(tmp_path / f"{i}.tif", band[None]) for i, band in enumerate(bands)]
    with Raster(files) as raster:
        np.testing.assert_array_equal(raster.read()[0], bands)
    with Raster(files, bands=(3, 1)) as raster:
        np.testing.assert_array_equal(raster.read()[0], bands[[2, 0]])
        assert (raster.info.count, raster.info.available) == (2, 3)
    files.append(write_tif(tmp_path / "other.tif", bands[:1, :4]))
    with pytest.raises(DataError, match=r"other\.tif: the file has 4 x 9 pixels .* the first file of its image 8 x 9"):
        Raster(files)


def test_unsigned_nodata_must_be_in_every_band_other_nodata_in_one(tmp_path: Path) -> None:
    unsigned = np.full((2, 2, 2), 7, np.uint8)
    unsigned[:, 0, 0], unsigned[0, 1, 1] = 0, 0
    signed = np.full((2, 2, 2), 7, np.float32)
    signed[:, 0, 0], signed[0, 1, 1] = -9999, -9999
    with Raster(write_tif(tmp_path / "u.tif", unsigned, nodata=0)) as raster:
        assert raster.read()[1].tolist() == [[False, True], [True, True]]
    with Raster(write_tif(tmp_path / "s.tif", signed, nodata=-9999)) as raster:
        pixels, valid = raster.read()
        assert valid.tolist() == [[False, True], [True, False]]
        assert (pixels[:, ~valid] == 0).all()


def test_explicit_nodata_and_zero_collar(tmp_path: Path) -> None:
    pixels = np.full((2, 2, 2), 7, np.uint16)
    pixels[:, 0, 0], pixels[:, 0, 1], pixels[0, 1, 1] = 0, 65535, 0
    file = write_tif(tmp_path / "a.tif", pixels)
    with Raster(file, nodata=65535) as raster:
        assert raster.read()[1].tolist() == [[True, False], [True, True]]
    with Raster(file, zero_collar=True) as raster:
        assert raster.read()[1].tolist() == [[False, True], [True, True]]
    with Raster(file, nodata=-1.5) as raster:
        assert raster.read()[1].all()


def test_alpha_is_validity_and_not_a_band(tmp_path: Path) -> None:
    pixels = np.full((4, 3, 3), 50, np.uint8)
    pixels[3, 0] = 0
    with Raster(write_tif(tmp_path / "a.tif", pixels, photometric="RGB", alpha="YES")) as raster:
        assert raster.info.count == 3
        assert raster.info.has_alpha
        assert raster.read()[1].sum() == 6
    with Raster(tmp_path / "a.tif", bands=(4, 1)) as raster:
        assert raster.read()[0][:, 0, 0].tolist() == [0, 50]
        assert raster.read()[1].all()


def test_mask_band_is_validity(tmp_path: Path) -> None:
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        file = write_tif(tmp_path / "a.tif", np.full((1, 3, 3), 50, np.uint8))
        with rasterio.open(file, "r+") as target:
            target.write_mask(np.eye(3, dtype=np.uint8) * 255)
    with Raster(file) as raster:
        assert raster.info.has_mask
        np.testing.assert_array_equal(raster.read()[1], np.eye(3, dtype=bool))


def test_alpha_or_mask_band_decides_alone_beside_a_declared_nodata_value(tmp_path: Path) -> None:
    pixels = np.full((4, 3, 3), 50, np.uint8)
    pixels[:3, 1] = 0
    pixels[3, 0] = 0
    file = write_tif(tmp_path / "a.tif", pixels, photometric="RGB", alpha="YES", nodata=0)
    with Raster(file) as raster, rasterio.open(file) as dataset:
        np.testing.assert_array_equal(raster.read()[1], dataset.dataset_mask() > 0)
    with Raster(file, nodata=0) as raster:
        assert raster.read()[1].tolist() == [[False] * 3, [False] * 3, [True] * 3]
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        file = write_tif(tmp_path / "b.tif", np.zeros((1, 3, 3), np.float32), nodata=0)
        with rasterio.open(file, "r+") as target:
            target.write_mask(np.eye(3, dtype=np.uint8) * 255)
    with Raster(file) as raster:
        np.testing.assert_array_equal(raster.read()[1], np.eye(3, dtype=bool))


@pytest.mark.parametrize("dtype", ["float32", "float64", "int16", "uint8"])
@pytest.mark.parametrize(
    "declared",
    [-3.4028234663852886e38, -3.40282e38, -3.4e38, 3.402823e38, -9999, -9999.001, 0.1, 1e20, 255, -32768, 0],
)
def test_nodata_values_are_compared_as_gdal_does(tmp_path: Path, dtype: str, declared: float) -> None:
    values = [-3.4028234663852886e38, 3.4028234663852886e38, -9999, -9998.99, 0, 0.1, 1e20, 255, 7, -32768, 100]
    limits = np.finfo(dtype) if dtype.startswith("f") else np.iinfo(dtype)
    pixels = np.array([v for v in values if limits.min <= v <= limits.max], np.float64).astype(dtype)[None, None]
    try:
        file = write_tif(tmp_path / "a.tif", pixels, nodata=declared)
    except ValueError:
        return  # rasterio does not write what the type cannot hold
    with Raster(file) as raster, rasterio.open(file) as dataset:
        np.testing.assert_array_equal(raster.read()[1], dataset.read_masks(1) > 0)


def test_nan_adds_to_the_declared_nodata_value(tmp_path: Path) -> None:
    pixels = np.array([[[1, -9999, np.nan, 2]]], np.float32)
    file = write_tif(tmp_path / "a.tif", pixels, nodata=-9999)
    with Raster(file) as raster, pytest.raises(DataError, match="--nodata nan"):
        raster.read()
    with Raster(file, nodata=np.nan) as raster:
        assert raster.read()[1].tolist() == [[True, False, False, True]]
        assert raster.info.nodata == -9999


def test_each_band_has_its_own_nodata_value(tmp_path: Path) -> None:
    one = write_tif(tmp_path / "1.tif", np.array([[[1, -1, 3, 4]]], np.int16), nodata=-1)
    two = write_tif(tmp_path / "2.tif", np.array([[[1, 2, -2, -1]]], np.int16), nodata=-2)
    with Raster([one, two]) as raster:
        assert raster.read()[1].tolist() == [[True, False, False, True]]
        assert raster.info.band_nodata == (-1, -2)


def test_bands_of_one_image_lie_on_one_grid(tmp_path: Path) -> None:
    bands = np.random.default_rng(0).integers(0, 255, (2, 6, 7), np.uint8)
    first = write_tif(tmp_path / "1.tif", bands[:1], transform=Affine(10, 0, 0, 0, -10, 600))
    south_up = write_tif(tmp_path / "2.tif", bands[1:, ::-1], transform=Affine(10, 0, 0, 0, 10, 540))
    with Raster([first, south_up]) as raster:
        np.testing.assert_array_equal(raster.read()[0], bands)
        np.testing.assert_array_equal(raster.read(Window(1, 2, 3, 4))[0], bands[:, 1:4, 2:6])
    shifted = write_tif(tmp_path / "3.tif", bands[1:], transform=Affine(10, 0, 10, 0, -10, 600))
    with pytest.raises(DataError, match=r"3\.tif: the file lies elsewhere than the first file of its image"):
        Raster([first, shifted])
    rounded = write_tif(tmp_path / "4.tif", bands[1:], transform=Affine(10.0001, 0, 2, 0, -10, 601))
    other_words = write_tif(tmp_path / "5.tif", bands[1:], transform=Affine(10, 0, 0, 0, -10, 600), crs=UTM_WKT)
    pixels = write_tif(tmp_path / "6.tif", bands[1:], crs=None, transform=Affine(1, 0, 0, 0, -1, 6))
    for file in (rounded, other_words, pixels, write_png(tmp_path / "7.png", bands[1])):
        with Raster([first, file]) as raster:
            np.testing.assert_array_equal(raster.read()[0], bands)


UTM_WKT = (
    'PROJCS["mine",GEOGCS["WGS 84",DATUM["WGS_1984",SPHEROID["WGS 84",6378137,298.257223563]],PRIMEM["Greenwich",0],'
    'UNIT["degree",0.0174532925199433]],PROJECTION["Transverse_Mercator"],PARAMETER["latitude_of_origin",0],'
    'PARAMETER["central_meridian",3],PARAMETER["scale_factor",0.9996],PARAMETER["false_easting",500000],'
    'PARAMETER["false_northing",0],UNIT["metre",1]]'
)
"""EPSG:32631 under another name."""


@pytest.mark.parametrize("dtype", ["complex64", "complex128", "complex_int16"])
def test_complex_pixels_are_refused(tmp_path: Path, dtype: str) -> None:
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", height=4, width=4, count=1, dtype=dtype) as file:
        file.write(np.ones((1, 4, 4), np.complex64))
    with pytest.raises(DataError, match=rf"pixels of type {dtype} cannot be used"):
        Raster(tmp_path / "a.tif")


def test_palette_image_without_a_table_and_crs_of_a_side_file_are_read(tmp_path: Path) -> None:
    file = write_tif(tmp_path / "a.tif", np.full((1, 4, 4), 3, np.uint8), crs="+proj=eqearth")
    assert (tmp_path / "a.tif.aux.xml").is_file()
    vrt = tmp_path / "a.vrt"
    vrt.write_text(
        '<VRTDataset rasterXSize="4" rasterYSize="4"><VRTRasterBand dataType="Byte" band="1">'
        "<ColorInterp>Palette</ColorInterp><SimpleSource><SourceFilename relativeToVRT='1'>a.tif</SourceFilename>"
        "<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    with Raster(file) as raster:
        assert raster.info.crs is not None
    with Raster(vrt) as raster:
        assert raster.info.colormap is None
        assert (raster.read()[0] == 3).all()


def test_undeclared_nan_is_an_error_naming_file_and_first_pixel(tmp_path: Path) -> None:
    pixels = np.ones((2, 5, 5), np.float32)
    pixels[1, 3, 2] = np.nan
    file = write_tif(tmp_path / "a.tif", pixels)
    with Raster(file) as raster:
        raster.read(Window(0, 0, 3, 5))
        with pytest.raises(DataError, match=r"a\.tif: the pixel at row 3, column 2 of band band_2 is nan"):
            raster.read(Window(2, 1, 3, 4))
    with Raster(file, nodata=float("nan")) as raster:
        values, valid = raster.read()
        assert not valid[3, 2]
        assert valid.sum() == 24
        assert np.isfinite(values).all()


def test_pixels_that_float32_cannot_hold_are_refused(tmp_path: Path) -> None:
    pixels = np.ones((1, 3, 4))
    pixels[0, 1, 2] = -1e302
    with (
        Raster(write_tif(tmp_path / "a.tif", pixels)) as raster,
        pytest.raises(DataError, match=r"row 1, column 2.*1e\+302"),
    ):
        raster.read()
    with Raster(write_tif(tmp_path / "b.tif", pixels, nodata=-1e302)) as raster:
        assert raster.read()[1].sum() == 11


def test_scale_and_offset_tags_are_applied_to_data_only(tmp_path: Path) -> None:
    stored = np.array([[[0, 100], [200, 300]]], np.int16)
    file = write_tif(tmp_path / "a.tif", stored, nodata=0)
    with rasterio.open(file, "r+") as target:
        target.scales, target.offsets = (0.01,), (-1.0,)
    with Raster(file) as raster:
        pixels, valid = raster.read()
        assert (raster.info.dtype, raster.info.stored_dtype) == ("float32", "int16")
        np.testing.assert_array_equal(raster.read_raw(), stored)
    np.testing.assert_allclose(pixels, [[[0, 0], [1, 2]]], atol=1e-6)
    assert valid.tolist() == [[False, True], [True, True]]


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_truncated_file_is_one_sentence(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = write_png(tmp_path / f"a.{suffix}", noise)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"a\.{suffix}: .*\.$"), Raster(file) as raster:
        raster.read()


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.tif: there is no such file"):
        Raster(tmp_path / "none.tif")
    (tmp_path / "text.tif").write_text("hello")
    with pytest.raises(DataError, match="not an image"):
        Raster(tmp_path / "text.tif")
    with pytest.raises(DataError, match="there is no band 4; the image has 3"):
        Raster(write_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8)), bands=(1, 4))


def test_bands_are_found_by_choice_name_colour_or_order(tmp_path: Path) -> None:
    pixels = np.zeros((4, 2, 2), np.uint8)
    with Raster(write_tif(tmp_path / "a.tif", pixels, descriptions=("nir", "Red", "green", "blue"))) as raster:
        named = raster.info
    with Raster(write_tif(tmp_path / "b.tif", pixels)) as raster:  # GDAL takes it for an image with alpha
        unnamed = raster.info
        assert (unnamed.count, unnamed.available, unnamed.has_alpha) == (3, 4, True)
    with Raster(write_tif(tmp_path / "c.tif", pixels[:3], photometric="RGB", descriptions=("a", "b", "c"))) as raster:
        colored = raster.info
    assert match_bands(named, ("red", "green", "blue")) == (2, 3, 4)
    assert match_bands(named, ("x", "y"), ("nir", "3")) == (1, 3)
    assert match_bands(colored, ("blue", "red")) == (3, 1)
    assert match_bands(unnamed, ("x", "y", "z")) == (1, 2, 3)
    assert match_bands(unnamed, ("red", "green", "blue", "nir"), ("1", "2", "3", "4")) == (1, 2, 3, 4)
    with pytest.raises(DataError, match=r"3 band\(s\) .*--bands 1,2,3,4"):
        match_bands(unnamed, ("red", "green", "blue", "nir"))
    with pytest.raises(DataError, match="no band 'swir'"):
        match_bands(named, ("red",), ("swir",))


def test_unnamed_bands_keep_their_number_in_the_file_when_some_are_chosen(tmp_path: Path) -> None:
    with Raster(
        write_tif(tmp_path / "a.tif", np.zeros((6, 2, 2), np.uint8), photometric="minisblack"), bands=(3, 2)
    ) as r:
        assert r.info.band_names == ("band_3", "band_2")


SCENES = {
    "bigtiff_float32_1band_lzw_nodata_nonearth.tif": (1, "float32", 0.098),
    "colorado_rgb_uint8_uncompressed_striped_utm.tif": (3, "uint8", 1),
    "drone_rgba_uint8_lzw_striped_utm.tif": (3, "uint8", 0.876),
    "int16_2band_scale_offset_deflate.tif": (2, "float32", 1),
    "landsat7_olinda_uint8_6band_deflate_striped_utm.tif": (6, "uint8", 1),
    "landsat_rgb_uint16_lzw_tiled_nodata0_epsg4326.tif": (3, "uint16", 0.657),
    "naip_rgbn_uint8_deflate_tiled_utm.tif": (4, "uint8", 1),
    "sar_uint16_gcps_only_no_transform.tif": (1, "uint16", 1),
    "sentinel1_spain_float32_2band_nan_deflate.tif": (2, "float32", 1),
    "sentinel2_spain_int16_13band_deflate_epsg4326.tif": (13, "int16", 1),
    "sentinel2_spain_water_label_int16.tif": (1, "int16", 1),
    "zurich_rgb_uint8_jpeg_ycbcr_tiled_epsg2056.tif": (3, "uint8", 1),
}


def test_every_real_scene_is_read_as_what_it_is(shared_data: Path) -> None:
    files = sorted((shared_data / "scenes").glob("*.tif"))
    assert [file.name for file in files] == sorted(SCENES)
    for file in files:
        count, dtype, share = SCENES[file.name]
        with Raster(file) as raster:
            pixels, valid = raster.read()
            assert (len(pixels), pixels.dtype) == (count, dtype) == (raster.info.count, raster.info.dtype), file.name
        assert valid.mean() == pytest.approx(share, abs=1e-3), file.name


def test_landsat_numbers_become_reflectance_by_their_tags(shared_data: Path) -> None:
    file = next((shared_data / "l8biome_cloud").rglob("images/*.tif"))
    with Raster(file) as raster:
        pixels, _ = raster.read()
        info = raster.info
        stored = raster.read_raw()
    assert (info.dtype, info.stored_dtype, info.count) == ("float32", "uint16", 8)
    np.testing.assert_allclose(pixels[0], stored[0] * info.scales[0] + info.offsets[0], atol=1e-6)
    assert -0.2 < pixels[:7].min() < pixels[:7].max() < 2
