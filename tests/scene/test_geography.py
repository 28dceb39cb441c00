"""Coordinates all over the globe: areas of interest, and polygons in longitude and latitude."""

import json
import sqlite3
import warnings
from pathlib import Path

import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
from numpy.testing import assert_array_equal
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.features import rasterize
from rasterio.transform import Affine, from_origin
from rasterio.warp import transform as warp_points

from rsseg.errors import DataError, RssegWarning
from rsseg.raster import Raster, Window
from rsseg.vector.aoi import read_region
from rsseg.vector.write import write_polygons
from tests.conftest import write_tif
from tests.scene.helpers import read_classes
from tests.toys import make_task

SIZE = (60, 80)
UTM = (from_origin(500000, 4000000, 10, 10), "EPSG:32631")


def scene_at(path: Path, transform: Affine, crs: object, size: tuple[int, int] = SIZE) -> Path:
    return write_tif(path / "scene.tif", np.ones((1, *size), np.uint8), transform=transform, crs=crs)


def write_area(path: Path, *shapes: object, crs: str = "EPSG:4326", layer: str | None = None) -> Path:
    """Shapes in a vector file of the format that the ending says."""
    geometry = np.array(shapes, np.object_)
    options = {"geometry_type": shapes[0].geom_type, "crs": crs}
    if layer is not None:
        options["layer"] = layer
    if path.suffix == ".kml":
        options["driver"] = "KML"
    pyogrio.raw.write(path, shapely.to_wkb(geometry), [np.arange(len(shapes))], ["id"], **options)
    return path


def mask_of(scene: Path, area: Path) -> NDArray[np.bool_]:
    with Raster(scene) as raster:
        return read_region(area, raster.info).mask(Window(0, 0, raster.info.height, raster.info.width))


def middle_of(scene: Path) -> NDArray[np.bool_]:
    """The middle half of a scene in each direction."""
    with rasterio.open(scene) as dataset:
        height, width = dataset.shape
    wanted = np.zeros((height, width), np.bool_)
    wanted[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
    return wanted


@pytest.mark.parametrize("suffix", [".geojson", ".gpkg", ".fgb", ".shp", ".kml"])
def test_areas_are_read_in_all_usual_formats(tmp_path: Path, suffix: str) -> None:
    scene = scene_at(tmp_path, from_origin(10, 50, 0.01, 0.01), "EPSG:4326")
    area = write_area(tmp_path / f"area{suffix}", shapely.box(10.2, 49.55, 10.6, 49.85))
    assert_array_equal(mask_of(scene, area), middle_of(scene))


def test_all_layers_of_an_area_count_and_points_do_not(tmp_path: Path) -> None:
    scene = scene_at(tmp_path, from_origin(10, 50, 0.01, 0.01), "EPSG:4326")
    area = write_area(tmp_path / "area.gpkg", shapely.box(10.2, 49.55, 10.4, 49.85), layer="west")
    write_area(area, shapely.MultiPolygon([shapely.box(10.4, 49.55, 10.6, 49.85)]), layer="east")
    write_area(area, shapely.Point(10.0, 50.0), layer="points")
    assert_array_equal(mask_of(scene, area), middle_of(scene))


def test_area_in_another_encoding_names_the_remedy(tmp_path: Path) -> None:
    scene = scene_at(tmp_path / "scene.tif", Affine(0.1, 0, 0, 0, -0.1, 4), "EPSG:4326", (40, 40))
    area = tmp_path / "area.geojson"
    area.write_bytes('{"type": "FeatureCollection", "name": "Gr\xfcn", "features": []}'.encode("cp1252"))
    with pytest.raises(DataError, match=r"area\.geojson: .*save it as UTF-8"):
        mask_of(scene, area)


def test_features_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    scene = scene_at(tmp_path / "scene.tif", Affine(0.1, 0, 0, 0, -0.1, 4), "EPSG:4326", (40, 40))
    square = json.loads(shapely.to_geojson(shapely.box(1, 1, 3, 3)))
    broken = [{"type": "Polygon", "coordinates": "x"}, {"type": "Polygone", "coordinates": []}, None]
    features = [{"type": "Feature", "properties": {}, "geometry": shape} for shape in (square, *broken)]
    area = tmp_path / "area.geojson"
    area.write_text(json.dumps({"type": "FeatureCollection", "features": [*features, "no feature"]}))
    with pytest.warns(RssegWarning, match=r"area\.geojson: 4 of 5 features have no polygon"):
        assert mask_of(scene, area).sum() == 400
    area.write_text(json.dumps({"type": "FeatureCollection", "features": features[:1]}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RssegWarning)
        mask_of(scene, area)


@pytest.mark.parametrize("suffix", [".geojson", ".gpkg"])
def test_empty_polygons_are_no_area(tmp_path: Path, suffix: str) -> None:
    scene = scene_at(tmp_path / "scene.tif", Affine(0.1, 0, 0, 0, -0.1, 4), "EPSG:4326", (40, 40))
    empty = shapely.from_wkt(["POLYGON EMPTY", "MULTIPOLYGON EMPTY"])
    with pytest.warns(RssegWarning, match="2 of 3 features have no polygon"):
        assert mask_of(scene, write_area(tmp_path / f"some{suffix}", shapely.box(1, 1, 3, 3), *empty)).sum() == 400
    with pytest.raises(DataError, match="the file has no polygon"):
        mask_of(scene, write_area(tmp_path / f"none{suffix}", *empty))


def test_area_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    scene = scene_at(tmp_path, from_origin(10, 50, 0.01, 0.01), "EPSG:4326")
    text = shapely.to_geojson(shapely.box(10.2, 49.55, 10.6, 49.85))
    (tmp_path / "area.geojson").write_bytes(("\ufeff" + text).encode())
    assert_array_equal(mask_of(scene, tmp_path / "area.geojson"), middle_of(scene))


def test_area_that_another_program_edits_is_read(tmp_path: Path) -> None:
    scene = scene_at(tmp_path, *UTM)
    area = write_area(tmp_path / "area.gpkg", shapely.box(2, 36, 4, 37))
    with sqlite3.connect(area, isolation_level=None) as database:
        database.execute("BEGIN EXCLUSIVE")
        assert mask_of(scene, area).all()
        database.execute("ROLLBACK")


@pytest.mark.parametrize("scene_west", [190.0, -170.0])
@pytest.mark.parametrize("area_west", [190.0, -170.0])
@pytest.mark.parametrize("crs", ["EPSG:4326", "OGC:CRS84", "EPSG:4269"])
def test_longitudes_may_go_to_180_or_to_360(tmp_path: Path, scene_west: float, area_west: float, crs: str) -> None:
    scene = scene_at(tmp_path, from_origin(scene_west, -15, 0.001, 0.001), "EPSG:4326")
    box = shapely.box(area_west + 0.02, -15.045, area_west + 0.06, -15.015)
    assert_array_equal(mask_of(scene, write_area(tmp_path / "area.gpkg", box, crs=crs)), middle_of(scene))


def test_area_in_another_zone_of_the_globe_finds_longitudes_to_360(tmp_path: Path) -> None:
    scene = scene_at(tmp_path, from_origin(190, -15, 0.001, 0.001), "EPSG:4326")
    x, y = warp_points(CRS.from_epsg(4326), CRS.from_epsg(32702), [-169.98, -169.94], [-15.045, -15.015])
    area = write_area(tmp_path / "area.gpkg", shapely.box(x[0], y[0], x[1], y[1]), crs="EPSG:32702")
    assert (mask_of(scene, area) == middle_of(scene)).mean() > 0.99


@pytest.mark.parametrize(
    ("transform", "crs"),
    [
        UTM,
        (from_origin(5e5, 9.9e6, 10, 10), "EPSG:32760"),
        (from_origin(-4e6, 4e6, 1e5, 1e5), "EPSG:3995"),
        (from_origin(-180, 90, 4.5, 3), "EPSG:4326"),
        (from_origin(0, 90, 4.5, 3), "EPSG:4326"),
        (from_origin(-2.0037e7, 2.0037e7, 5e5, 6.679e5), "EPSG:3857"),
        (from_origin(-5.5e6, 5.5e6, 1.375e5, 1.8333e5), "+proj=geos +h=35785831 +lon_0=0 +ellps=WGS84"),
    ],
    ids=["utm", "antimeridian", "pole", "globe", "globe-360", "mercator", "geostationary"],
)
def test_the_whole_world_is_all_of_any_scene(tmp_path: Path, transform: Affine, crs: str) -> None:
    scene = scene_at(tmp_path, transform, crs)
    world = write_area(tmp_path / "area.geojson", shapely.box(-180, -90, 180, 90))
    assert mask_of(scene, world).mean() > 0.98


def test_area_across_the_antimeridian_is_found_in_pieces(tmp_path: Path) -> None:
    x, y = warp_points(CRS.from_epsg(4326), CRS.from_epsg(32760), [180.0], [-17.0])
    scene = scene_at(tmp_path, from_origin(x[0] - 400, y[0] + 300, 10, 10), "EPSG:32760")
    both = [shapely.box(179, -18, 180, -16), shapely.box(-180, -18, -179, -16)]
    assert mask_of(scene, write_area(tmp_path / "both.geojson", *both)).all()
    west = mask_of(scene, write_area(tmp_path / "west.geojson", both[0]))
    assert west[:, :38].all()
    assert not west[:, 42:].any()


def test_straight_borders_of_a_large_area_are_curves_in_other_coordinates(tmp_path: Path) -> None:
    # A parallel, which is a line in longitude and latitude and an arc around the pole.
    scene = scene_at(tmp_path, from_origin(-4e6, 4e6, 1e5, 1e5), "EPSG:3995", (80, 80))
    mask = mask_of(scene, write_area(tmp_path / "area.geojson", shapely.box(-180, 70, 180, 90)))
    rows, cols = np.mgrid[:80, :80]
    (x,), (y,) = warp_points(CRS.from_epsg(4326), CRS.from_epsg(3995), [0.0], [70.0])
    circle = np.hypot(rows - 39.5, cols - 39.5) * 1e5 < np.hypot(x, y)
    assert (mask == circle).mean() > 0.995


def test_area_without_a_pixel_of_the_scene_is_an_error(tmp_path: Path) -> None:
    scene = scene_at(tmp_path, *UTM)
    for name, shape in (
        ("far", shapely.box(20, 36, 21, 37)),
        ("antipode", shapely.box(-178, -37, -176, -36)),
        ("tiny", shapely.Point(3.001, 36.14).buffer(1e-7)),
    ):
        with pytest.raises(DataError, match=f"{name}.gpkg: no pixel"):
            mask_of(scene, write_area(tmp_path / f"{name}.gpkg", shape))


def polygons_of(tmp_path: Path, transform: Affine, crs: object, values: NDArray[np.uint8]) -> list[dict[str, object]]:
    classes = write_tif(tmp_path / "classes.tif", values[None], transform=transform, crs=crs, nodata=255)
    write_polygons(classes, make_task(), tmp_path / "out.geojson")
    return list(json.loads((tmp_path / "out.geojson").read_text())["features"])


def blocks(seed: int = 0) -> NDArray[np.uint8]:
    values = np.random.default_rng(seed).choice([1, 11, 255], (12, 16))
    return np.repeat(np.repeat(values, 5, 0), 5, 1).astype(np.uint8)


def test_geojson_is_cut_at_the_antimeridian(tmp_path: Path) -> None:
    x, y = warp_points(CRS.from_epsg(4326), CRS.from_epsg(32760), [180.0], [-17.0])
    transform = from_origin(x[0] - 40000, y[0], 1000, 1000)
    values = np.ones(SIZE, np.uint8)
    values[20:40, 20:60] = 11
    features = polygons_of(tmp_path, transform, "EPSG:32760", values)
    shapes = [shapely.from_geojson(json.dumps(f["geometry"])) for f in features]
    assert len(shapes) == 2
    parts = shapely.get_parts(np.array(shapes))
    west, _, east, _ = shapely.bounds(parts).T
    assert len(parts) >= 4
    assert (east - west < 1).all()
    assert (np.abs(shapely.bounds(parts)[:, [0, 2]]) <= 180).all()


def test_geojson_of_longitudes_to_360_is_within_180(tmp_path: Path) -> None:
    values = blocks()
    features = polygons_of(tmp_path, from_origin(179.97, -15, 0.001, 0.001), "EPSG:4326", values)
    burnt = np.full(SIZE, 255, np.uint8)
    for feature in features:
        shape = shapely.from_geojson(json.dumps(feature["geometry"]))
        low, _, high, _ = shape.bounds
        assert -180 <= low <= high <= 180
        eastern = shapely.transform(shape, lambda points: points + np.where(points[:, :1] < 0, (360, 0), (0, 0)))
        place = from_origin(179.97, -15, 0.001, 0.001)
        rasterize([(eastern, feature["properties"]["value"])], out=burnt, transform=place)
    assert_array_equal(burnt, values)


@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".fgb", ".shp"])
def test_raster_without_any_class_gives_an_empty_layer(tmp_path: Path, suffix: str) -> None:
    classes = write_tif(tmp_path / "classes.tif", np.full((1, 9, 9), 255, np.uint8), nodata=255)
    assert write_polygons(classes, make_task(), tmp_path / f"out{suffix}") == 0
    assert pyogrio.read_info(tmp_path / f"out{suffix}", force_feature_count=True)["features"] == 0


def test_polygons_are_streamed_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsseg.vector.write._BATCH", 7)
    classes = write_tif(tmp_path / "classes.tif", blocks()[None], nodata=255)
    for suffix in (".gpkg", ".fgb", ".geojson"):
        count = write_polygons(classes, make_task(), tmp_path / f"out{suffix}")
        about, _, geometry, (values, *_) = pyogrio.raw.read(tmp_path / f"out{suffix}", columns=["value"])
        assert len(values) == count > 20
        if suffix != ".geojson":
            shapes = zip(shapely.from_wkb(geometry), values.tolist(), strict=True)
            with rasterio.open(classes) as dataset:
                burnt = rasterize(shapes, SIZE, fill=255, transform=dataset.transform)
            assert_array_equal(burnt, read_classes(classes))
            assert about["crs"] == "EPSG:32631"
