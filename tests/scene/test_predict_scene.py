"""Whole scenes through the real pipeline: what lies on the disk afterwards."""

from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pytest
import rasterio
import rasterio.rpc
import rasterio.shutil
import torch
from numpy.testing import assert_array_equal
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.transform import Affine
from rio_cogeo import cog_validate

from rsseg.scene.predict import predict_scene
from tests.conftest import write_png, write_tif
from tests.scene.helpers import (
    expected_values,
    files_in,
    options,
    plan_scene,
    random_pixels,
    read_classes,
)
from tests.toys import ConvSegmenter, make_task

FILES = {
    "bigtiff_float32_1band_lzw_nodata_nonearth.tif": 1,
    "colorado_rgb_uint8_uncompressed_striped_utm.tif": 3,
    "drone_rgba_uint8_lzw_striped_utm.tif": 3,
    "int16_2band_scale_offset_deflate.tif": 2,
    "landsat7_olinda_uint8_6band_deflate_striped_utm.tif": 6,
    "landsat_rgb_uint16_lzw_tiled_nodata0_epsg4326.tif": 3,
    "naip_rgbn_uint8_deflate_tiled_utm.tif": 4,
    "sar_uint16_gcps_only_no_transform.tif": 1,
    "sentinel1_spain_float32_2band_nan_deflate.tif": 2,
    "sentinel2_spain_int16_13band_deflate_epsg4326.tif": 13,
    "sentinel2_spain_water_label_int16.tif": 1,
    "zurich_rgb_uint8_jpeg_ycbcr_tiled_epsg2056.tif": 3,
}


def assert_same_grid(first: Path | str, second: Path) -> None:
    with rasterio.open(first) as a, rasterio.open(second) as b:
        assert (a.height, a.width, a.crs) == (b.height, b.width, b.crs)
        assert a.transform.almost_equals(b.transform, precision=1e-12)
        assert a.gcps[1] == b.gcps[1]
        points = [[(p.row, p.col, p.x, p.y, p.z) for p in d.gcps[0]] for d in (a, b)]
        assert len(points[0]) == len(points[1])
        for p, q in zip(*points, strict=True):
            assert p == pytest.approx(q, abs=1e-9)
        assert a.tags().get("AREA_OR_POINT") == b.tags().get("AREA_OR_POINT")
        assert a.rpcs == b.rpcs


@pytest.mark.parametrize("size", [(1, 1), (1, 130), (130, 1), (63, 65), (64, 64), (100, 530), (530, 90)])
@pytest.mark.parametrize("file_format", ["cog", "gtiff"])
def test_file_read_back_equals_the_prediction_of_the_image(
    tmp_path: Path, size: tuple[int, int], file_format: str
) -> None:
    segmenter, pixels = ConvSegmenter(make_task()), random_pixels(*size)
    scene = write_tif(tmp_path / "scene.tif", pixels)
    result = predict_scene(segmenter, scene, tmp_path / "out.tif", options(format=file_format))
    classes = read_classes(tmp_path / "out.tif")
    assert_array_equal(classes, expected_values(segmenter, pixels))
    assert_same_grid(scene, tmp_path / "out.tif")
    assert [a.pixels for a in result.areas] == [int((classes == a.value).sum()) for a in result.areas]
    assert files_in(tmp_path) == ["out.tif", "out.tif.aux.xml", "scene.tif"]


@pytest.mark.parametrize("blend", ["crop", "hann", "mean"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_blend_and_batch_size_agree_with_the_prediction_of_the_image(
    tmp_path: Path, blend: str, batch_size: int
) -> None:
    segmenter, pixels = ConvSegmenter(make_task()), random_pixels(150, 170)
    scene = write_tif(tmp_path / "scene.tif", pixels, tiled=True, blockxsize=32, blockysize=16)
    predict_scene(segmenter, scene, tmp_path / "out.tif", options(blend=blend, batch_size=batch_size))
    # The overlap covers the convolution's reach, so every merge gives the same classes but for rounding.
    assert (read_classes(tmp_path / "out.tif") == expected_values(segmenter, pixels)).mean() > (
        0.9999 if blend == "crop" else 0.98
    )


def test_nodata_of_the_scene_is_nodata_of_the_output_and_hidden_from_the_network(tmp_path: Path) -> None:
    segmenter, pixels = ConvSegmenter(make_task()), random_pixels(90, 200)
    pixels[:, 20:40, 150:] = 0
    pixels[:, :, :70] = 0
    scene = write_tif(tmp_path / "scene.tif", pixels, nodata=0)
    result = predict_scene(segmenter, scene, tmp_path / "out.tif", options())
    valid = (pixels != 0).any(0)
    assert_array_equal(read_classes(tmp_path / "out.tif"), expected_values(segmenter, pixels, valid))
    assert result.valid_share == pytest.approx(valid.mean())
    with rasterio.open(tmp_path / "out.tif") as dataset:
        assert dataset.nodata == 255
        assert_array_equal(dataset.dataset_mask() > 0, valid)


def test_scene_without_any_data_gives_an_empty_product(tmp_path: Path) -> None:
    scene = write_tif(tmp_path / "scene.tif", np.zeros((3, 100, 70), np.uint8), nodata=0)
    result = predict_scene(ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options())
    assert (read_classes(tmp_path / "out.tif") == 255).all()
    assert result.valid_share == 0
    assert all(area.pixels == 0 and area.share == 0 for area in result.areas)


def test_colours_names_and_tags_are_in_the_output(tmp_path: Path) -> None:
    segmenter = ConvSegmenter(make_task())
    scene = write_tif(tmp_path / "scene.tif", random_pixels(70, 80))
    predict_scene(segmenter, scene, tmp_path / "out.tif", options())
    with rasterio.open(tmp_path / "out.tif") as dataset:
        colors = dataset.colormap(1)
        assert all(colors[c.value][:3] == c.color for c in segmenter.task.classes)
        assert dataset.tags(1)["class_21"] == "roof & wall"
        assert dataset.colorinterp[0].name == "palette"
    # GDAL itself must find the names: a VRT repeats them.
    rasterio.shutil.copy(tmp_path / "out.tif", tmp_path / "out.vrt", driver="VRT")
    text = (tmp_path / "out.vrt").read_text()
    assert text.count("<Category>") + text.count("<Category />") + text.count("<Category/>") == 22
    for name in ("water", "grass", "roof &amp; wall"):
        assert f"<Category>{name}</Category>" in text


def test_cog_is_valid_and_has_overviews_of_its_classes(tmp_path: Path) -> None:
    scene = write_tif(tmp_path / "scene.tif", random_pixels(700, 1100))
    predict_scene(ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options(tile=512))
    assert cog_validate(tmp_path / "out.tif", strict=True) == (True, [], [])
    with rasterio.open(tmp_path / "out.tif") as dataset:
        assert dataset.overviews(1)
        assert set(np.unique(dataset.read(1, out_shape=(350, 550)))) <= {1, 11, 21}


@pytest.mark.parametrize(
    "grid",
    [
        {"transform": Affine.translation(4e5, 5e6) @ Affine.rotation(30) @ Affine.scale(2, -3)},
        {"crs": CRS.from_string("+proj=eqc +R=1560800 +units=m"), "transform": Affine(282, 0, -9e4, 0, -282, 3e5)},
        {"crs": "EPSG:4326", "transform": Affine(0.01, 0, 10, 0, -0.02, 50)},
        {"crs": None, "transform": Affine(2, 0, 10, 0, -2, 50)},
        {"gcps": True, "transform": None, "crs": None},
        {"point": True},
        {"rpcs": True, "transform": None, "crs": None},
    ],
    ids=["rotated", "no EPSG code", "oblong degrees", "no CRS", "GCPs", "PixelIsPoint", "RPCs"],
)
@pytest.mark.parametrize("file_format", ["cog", "gtiff"])
def test_grid_of_the_output_is_the_grid_of_the_scene(tmp_path: Path, grid: dict[str, Any], file_format: str) -> None:
    gcps, point, rpcs = (grid.get(key) for key in ("gcps", "point", "rpcs"))
    plain = {key: value for key, value in grid.items() if key in ("crs", "transform")}
    scene = write_tif(tmp_path / "scene.tif", random_pixels(40, 50), **plain)
    with rasterio.open(scene, "r+") as dataset:
        if gcps:
            corners = [(0, 0, 10.0, 50.0), (0, 50, 10.5, 50.1), (40, 0, 10.1, 49.5), (40, 50, 10.6, 49.6)]
            points = [GroundControlPoint(r, c, x, y, 7.0, id=str(i)) for i, (r, c, x, y) in enumerate(corners)]
            dataset.gcps = (points, CRS.from_epsg(4326))
        if point:
            dataset.update_tags(AREA_OR_POINT="Point")
        if rpcs:
            dataset.rpcs = toy_rpcs()
    predict_scene(ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options(format=file_format))
    assert_same_grid(scene, tmp_path / "out.tif")


def toy_rpcs() -> Any:
    coefficients = [0.5 / (i + 1) for i in range(20)]
    return rasterio.rpc.RPC(
        height_off=100.0,
        height_scale=500.0,
        lat_off=50.0,
        lat_scale=0.1,
        line_den_coeff=coefficients,
        line_num_coeff=coefficients,
        line_off=20.0,
        line_scale=20.0,
        long_off=10.0,
        long_scale=0.1,
        samp_den_coeff=coefficients,
        samp_num_coeff=coefficients,
        samp_off=25.0,
        samp_scale=25.0,
        err_bias=None,
        err_rand=None,
    )


TURNED = Affine.translation(4e5, 5e6) @ Affine.rotation(30) @ Affine.scale(2, -3)
MERIDIAN, PARALLEL = 6335439.327, 6378137.0
"""Metres per radian along a meridian and along the equator, both at the equator (WGS 84)."""


@pytest.mark.parametrize(
    ("crs", "transform", "area", "tolerance"),
    [
        # 100 km from the central meridian of its zone, where the projection shrinks lengths by 0.9996.
        ("EPSG:32631", TURNED, 6 / 0.9996**2 * (1 - (100e3 / 6.381e6) ** 2), 1e-5),
        ("EPSG:2263", Affine(2, 0, 1e6, 0, -3, 2e5), 6 * 0.3048006096**2, 1e-4),
        # Web Mercator at 60 degrees north.
        ("EPSG:3857", Affine(2, 0, 1113194.9, 0, -3, 8399737.9), 6 * 0.25, 5e-3),
        ("EPSG:4326", Affine(1e-3, 0, 10, 0, -1e-3, 0.02), np.radians(1e-3) ** 2 * MERIDIAN * PARALLEL, 1e-5),
        ("+proj=eqc +R=1560800 +units=m", Affine(20, 0, 0, 0, -30, 600), 600, 1e-5),
    ],
    ids=["metres", "feet", "web-mercator", "degrees", "another-planet"],
)
def test_areas_are_those_on_the_ellipsoid(
    tmp_path: Path, crs: str, transform: Affine, area: float, tolerance: float
) -> None:
    scene = write_tif(tmp_path / "scene.tif", random_pixels(40, 50), crs=crs, transform=transform)
    result = predict_scene(ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options(min_area=0))
    assert sum(a.square_meters or 0 for a in result.areas) == pytest.approx(40 * 50 * area, rel=tolerance)
    assert result.areas[0].hectares == pytest.approx(result.areas[0].pixels * area / 1e4, rel=tolerance)


def test_areas_of_the_whole_globe_are_its_surface(tmp_path: Path) -> None:
    globe = Affine(2, 0, 0, 0, -2, 90)
    scene = write_tif(tmp_path / "scene.tif", random_pixels(90, 180), crs="EPSG:4326", transform=globe)
    wanted = options(polygons=tmp_path / "p.gpkg")
    result = predict_scene(ConvSegmenter(make_task()), scene, tmp_path / "out.tif", wanted)
    assert sum(a.square_meters or 0 for a in result.areas) == pytest.approx(5.1006562e14, rel=2e-4)
    about, _, _, values = pyogrio.raw.read(tmp_path / "p.gpkg")
    fields = dict(zip(about["fields"], values, strict=True))
    for a in result.areas:
        assert fields["area_m2"][fields["value"] == a.value].sum() == pytest.approx(a.square_meters)


@pytest.mark.parametrize("crs", [None, "EPSG:4326"])
def test_scene_without_coordinates_on_the_globe_has_no_areas(tmp_path: Path, crs: str | None) -> None:
    scene = write_tif(tmp_path / "scene.tif", random_pixels(40, 50), crs=crs, transform=TURNED)
    result = predict_scene(ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options())
    assert result.areas[0].hectares is None


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_plain_pictures_give_a_geotiff_without_coordinates(tmp_path: Path, suffix: str) -> None:
    segmenter, pixels = ConvSegmenter(make_task()), random_pixels(70, 90)
    scene = write_png(tmp_path / f"scene.{suffix}", pixels.transpose(1, 2, 0))
    predict_scene(segmenter, scene, tmp_path / "out.tif", options())
    with rasterio.open(scene) as dataset:
        pixels = dataset.read()
    assert_array_equal(read_classes(tmp_path / "out.tif"), expected_values(segmenter, pixels))
    with rasterio.open(tmp_path / "out.tif") as dataset:
        assert dataset.crs is None
        assert dataset.transform == Affine.identity()


def test_bands_are_taken_by_name_wherever_they_lie(tmp_path: Path) -> None:
    segmenter, pixels = ConvSegmenter(make_task()), random_pixels(50, 60, bands=4)
    scene = write_tif(tmp_path / "scene.tif", pixels, descriptions=("b3", "pan", "b1", "b2"))
    predict_scene(segmenter, scene, tmp_path / "out.tif", options())
    assert_array_equal(read_classes(tmp_path / "out.tif"), expected_values(segmenter, pixels[[2, 3, 0]]))
    predict_scene(segmenter, scene, tmp_path / "chosen.tif", options(bands=("1", "pan", "3")))
    assert_array_equal(read_classes(tmp_path / "chosen.tif"), expected_values(segmenter, pixels[:3]))
    plan = plan_scene(segmenter, scene, tmp_path / "plan.tif", options())
    assert plan.bands == (("b1", "b1"), ("b2", "b2"), ("b3", "b3"))
    assert "1 tile of 60 x 50" in plan.text()


def test_progress_counts_the_tiles_up_to_all(tmp_path: Path) -> None:
    scene, seen = write_tif(tmp_path / "scene.tif", random_pixels(130, 100)), []
    result = predict_scene(
        ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options(), progress=lambda *now: seen.append(now)
    )
    assert seen == [(i + 1, result.tiles) for i in range(result.tiles)]


def test_segmenter_is_not_changed_by_a_prediction_in_another_precision(tmp_path: Path) -> None:
    segmenter, pixels = ConvSegmenter(make_task()).train(), random_pixels(64, 64)
    before = {name: tensor.clone() for name, tensor in segmenter.state_dict().items()}
    scene = write_tif(tmp_path / "scene.tif", pixels)
    result = predict_scene(segmenter, scene, tmp_path / "out.tif", options(dtype="bfloat16"))
    assert result.dtype == "bfloat16"
    assert segmenter.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in segmenter.state_dict().items())
    assert (read_classes(tmp_path / "out.tif") == expected_values(segmenter, pixels)).mean() > 0.95


class UnmixableSegmenter(ConvSegmenter):
    """Uses an operation that does not mix types."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = super().forward(images)
        classes = torch.arange(self.task.num_classes)
        return torch.zeros(logits.shape).index_add(1, classes, logits)


def test_network_that_cannot_compute_in_bfloat16_stays_in_float32(tmp_path: Path) -> None:
    segmenter, pixels = UnmixableSegmenter(make_task()), random_pixels(70, 80)
    scene = write_tif(tmp_path / "scene.tif", pixels)
    result = predict_scene(segmenter, scene, tmp_path / "out.tif", options(dtype="bfloat16"))
    assert result.dtype == "float32"
    assert_array_equal(read_classes(tmp_path / "out.tif"), expected_values(segmenter, pixels))


@pytest.mark.parametrize(("name", "bands"), FILES.items())
def test_real_scene_keeps_its_grid_and_is_a_valid_cog(tmp_path: Path, shared_data: Path, name: str, bands: int) -> None:
    scene, output = shared_data / "scenes" / name, tmp_path / "out.tif"
    segmenter = ConvSegmenter(make_task(bands))
    result = predict_scene(segmenter, scene, output, options(tile=256, overlap=32))
    assert_same_grid(scene, output)
    assert cog_validate(output, strict=True) == (True, [], [])
    with rasterio.open(output) as dataset:
        classes = dataset.read(1)
        assert dataset.nodata == 255
        assert dataset.colormap(1)[11] == (*segmenter.task.classes[1].color, 255)
        assert dataset.colormap(1)[255][3] == 0
    assert set(np.unique(classes)) <= {1, 11, 21, 255}
    assert result.valid_share == pytest.approx((classes != 255).mean())
    with rasterio.open(scene) as dataset:
        if dataset.count == 1 or "rgba" in name:
            assert_array_equal(classes != 255, dataset.dataset_mask() > 0)


def test_eight_band_images_without_coordinates_are_predicted(tmp_path: Path, shared_data: Path) -> None:
    scene = next((shared_data / "l8biome_cloud").rglob("*.tif"))
    with rasterio.open(scene) as dataset:
        segmenter = ConvSegmenter(make_task(dataset.count))
    predict_scene(segmenter, scene, tmp_path / "out.tif", options())
    assert_same_grid(scene, tmp_path / "out.tif")
