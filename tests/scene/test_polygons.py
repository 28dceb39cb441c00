"""Class rasters as polygons."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_array_equal
from rasterio.features import rasterize
from rasterio.transform import Affine
from rasterio.warp import transform_geom

from rsseg.errors import DataError, UsageError
from rsseg.scene.predict import predict_scene
from rsseg.vector.polygons import PixelPolygon, trace_polygons
from rsseg.vector.write import write_polygons
from tests.conftest import write_tif
from tests.scene.helpers import files_in, options, read_classes
from tests.toys import ConvSegmenter, make_task

rasters = arrays(np.uint8, st.tuples(st.integers(1, 14), st.integers(1, 14)), elements=st.sampled_from([1, 2, 3, 255]))


def traced(raster: np.ndarray, band_rows: int, simplify: float = 0.0) -> list[PixelPolygon]:
    return list(trace_polygons(lambda a, b: raster[a:b], *raster.shape, band_rows=band_rows, simplify=simplify))


def burnt(polygons: list[PixelPolygon], shape: tuple[int, int]) -> np.ndarray:
    out = np.full(shape, 255, np.uint8)
    if polygons:
        rasterize([({"type": "Polygon", "coordinates": p.rings}, p.value) for p in polygons], out=out)
    return out


def sides_of(polygons: list[PixelPolygon]) -> list[tuple[object, ...]]:
    """What does not depend on where a ring begins."""
    return sorted((p.value, p.pixels, sorted(tuple(sorted(set(r))) for r in p.rings)) for p in polygons)


@given(raster=rasters, band_rows=st.integers(1, 15))
@settings(deadline=None, max_examples=60)
def test_polygons_rasterized_back_are_the_raster(raster: np.ndarray, band_rows: int) -> None:
    polygons = traced(raster, band_rows)
    assert_array_equal(burnt(polygons, raster.shape), raster)
    assert sum(p.pixels for p in polygons) == (raster != 255).sum()


@given(raster=rasters, simplify=st.sampled_from([0.0, 1.5]))
@settings(deadline=None, max_examples=60)
def test_polygons_do_not_depend_on_the_bands(raster: np.ndarray, simplify: float) -> None:
    first, *others = (sides_of(traced(raster, rows, simplify)) for rows in (1, 2, 5))
    assert all(other == first for other in others)


def test_polygon_across_many_bands_is_one_with_its_holes() -> None:
    raster = np.ones((20, 9), np.uint8)
    raster[2:18, 2:7] = 2
    raster[5:15, 4] = 1
    polygons = traced(raster, 3)
    assert sorted((p.value, p.pixels, len(p.rings)) for p in polygons) == [(1, 10, 1), (1, 100, 2), (2, 70, 2)]


def test_simplified_neighbours_keep_their_common_border() -> None:
    rows, cols = np.mgrid[:120, :120]
    raster = np.where((rows - 60) ** 2 + (cols - 50) ** 2 < 1200, 2, np.where(rows + cols // 3 > 70, 1, 3))
    plain, simple = (traced(raster.astype(np.uint8), 32, s) for s in (0.0, 2.0))
    assert sum(len(r) for p in simple for r in p.rings) < sum(len(r) for p in plain for r in p.rings) / 4
    used: dict[frozenset[tuple[int, int]], int] = {}
    for polygon in simple:
        for ring in polygon.rings:
            for start, end in pairwise(ring):
                used[frozenset((start, end))] = used.get(frozenset((start, end)), 0) + 1
    # Every side belongs to two polygons, or lies on the edge of the raster.
    edges = [side for side, count in used.items() if count == 1]
    assert all(any(len({p[axis] for p in side} & {0, 120}) == 1 for axis in (0, 1)) for side in edges)
    assert (burnt(simple, (120, 120)) != raster).mean() < 0.05


TURNED = Affine.translation(4e5, 5e6) @ Affine.rotation(30) @ Affine.scale(2, -3)


@pytest.fixture
def class_raster(tmp_path: Path) -> Path:
    raster = np.repeat(np.repeat(np.random.default_rng(1).choice([1, 11, 255], (1, 9, 8)), 5, 1), 6, 2)
    return write_tif(tmp_path / "classes.tif", raster.astype(np.uint8), nodata=255, transform=TURNED)


def features(path: Path) -> tuple[dict[str, object], np.ndarray, dict[str, list[object]]]:
    """What GDAL reads: metadata, polygons, and each field."""
    about, _, wkb, values = pyogrio.raw.read(path)
    fields = dict(zip(about["fields"], (v.tolist() for v in values), strict=True))
    return about, shapely.from_wkb(wkb), fields


@pytest.mark.parametrize("suffix", [".gpkg", ".fgb", ".shp"])
def test_vector_file_holds_the_raster_exactly(tmp_path: Path, class_raster: Path, suffix: str) -> None:
    count = write_polygons(class_raster, make_task(), tmp_path / f"out{suffix}")
    about, polygons, fields = features(tmp_path / f"out{suffix}")
    assert about["crs"] == "EPSG:32631"
    assert len(polygons) == count
    assert set(zip(fields["value"], fields["class"], strict=True)) == {(1, "water"), (11, "grass")}
    # On the ellipsoid, where the zone's projection makes pixels of 6 square metres a little larger.
    areas = np.array(fields["area_m2"]) / np.array(fields["pixels"])
    assert areas == pytest.approx(6 / 0.9996**2 * (1 - (100e3 / 6.381e6) ** 2), rel=1e-5)
    burnt = rasterize(zip(polygons, fields["value"], strict=True), (45, 48), fill=255, transform=TURNED)
    assert_array_equal(burnt, read_classes(class_raster))
    side = {"out.shx", "out.dbf", "out.prj", "out.cpg"} if suffix == ".shp" else set()
    assert set(files_in(tmp_path)) == {"classes.tif", f"out{suffix}"} | side


def test_replaced_shapefile_keeps_neither_the_coordinate_system_nor_an_index_of_the_old_one(
    tmp_path: Path, class_raster: Path
) -> None:
    output = tmp_path / "out.shp"
    write_polygons(class_raster, make_task(), output)
    assert features(output)[0]["crs"] == "EPSG:32631"
    output.with_suffix(".qix").write_bytes(b"index of other polygons")
    placeless = write_tif(tmp_path / "placeless.tif", read_classes(class_raster)[None], nodata=255, crs=None)
    write_polygons(placeless, make_task(), output, overwrite=True)
    assert features(output)[0]["crs"] is None
    assert not {"out.prj", "out.qix"} & set(files_in(tmp_path))


def test_geopackage_has_a_spatial_index_and_outer_rings_counterclockwise(tmp_path: Path, class_raster: Path) -> None:
    write_polygons(class_raster, make_task(), tmp_path / "out.gpkg")
    assert pyogrio.read_info(tmp_path / "out.gpkg")["capabilities"]["fast_spatial_filter"]
    _, polygons, _ = features(tmp_path / "out.gpkg")
    assert all(polygon.exterior.is_ccw for polygon in polygons)


def test_geojson_is_in_longitude_and_latitude(tmp_path: Path, class_raster: Path) -> None:
    write_polygons(class_raster, make_task(), tmp_path / "out.geojson")
    content = json.loads((tmp_path / "out.geojson").read_text())
    shapes = [
        (transform_geom("EPSG:4326", "EPSG:32631", f["geometry"]), f["properties"]["value"])
        for f in content["features"]
    ]
    raster = read_classes(class_raster)
    assert_array_equal(rasterize(shapes, raster.shape, fill=255, transform=TURNED), raster)


def test_geoparquet_holds_the_raster(tmp_path: Path, class_raster: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is an extra")
    write_polygons(class_raster, make_task(), tmp_path / "out.parquet")
    table = parquet.read_table(tmp_path / "out.parquet")
    about = json.loads(table.schema.metadata[b"geo"])["columns"]["geometry"]
    assert about["crs"]["id"] == {"authority": "EPSG", "code": 32631}
    rows = table.to_pylist()
    shapes = [(shapely.from_wkb(row["geometry"]), row["value"]) for row in rows]
    assert {row["class"] for row in rows} == {"water", "grass"}
    raster = read_classes(class_raster)
    assert_array_equal(rasterize(shapes, raster.shape, fill=255, transform=TURNED), raster)


def test_small_polygons_can_be_left_out(tmp_path: Path, class_raster: Path) -> None:
    task = make_task()
    every = write_polygons(class_raster, task, tmp_path / "a.gpkg")
    large = write_polygons(class_raster, task, tmp_path / "b.gpkg", min_area=200.0)
    areas = features(tmp_path / "b.gpkg")[2]["area_m2"]
    assert 0 < large < every
    assert min(areas) >= 200


def test_raster_of_another_planet_has_no_longitude(tmp_path: Path) -> None:
    raster = write_tif(
        tmp_path / "europa.tif", np.ones((1, 5, 5), np.uint8), crs="+proj=eqc +R=1560800 +units=m +no_defs"
    )
    with pytest.raises(DataError, match="cannot be transformed"):
        write_polygons(raster, make_task(), tmp_path / "out.geojson")
    assert not (tmp_path / "out.geojson").exists()
    assert write_polygons(raster, make_task(), tmp_path / "out.gpkg") == 1


def test_other_endings_and_existing_files_are_refused(tmp_path: Path, class_raster: Path) -> None:
    with pytest.raises(UsageError, match=r"\.gpkg"):
        write_polygons(class_raster, make_task(), tmp_path / "out.dxf")
    (tmp_path / "out.gpkg").write_text("precious")
    with pytest.raises(UsageError, match="--overwrite"):
        write_polygons(class_raster, make_task(), tmp_path / "out.gpkg")
    assert (tmp_path / "out.gpkg").read_text() == "precious"


DISK_FULL = """
import resource, signal, sys
from pathlib import Path
from rsseg.errors import MachineError
from rsseg.vector.write import write_polygons
from tests.toys import make_task

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
classes, output = Path(sys.argv[1]), Path(sys.argv[2])
for limit in map(int, sys.argv[3:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write_polygons(classes, make_task(), output)
    except MachineError:
        print("refused")
    assert not output.exists(), limit
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file sizes cannot be limited")
@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".fgb"])
def test_full_disk_leaves_no_incomplete_polygons(tmp_path: Path, suffix: str) -> None:
    raster = np.random.default_rng(0).choice([1, 11, 21], (1, 60, 60)).astype(np.uint8)
    classes, output = write_tif(tmp_path / "classes.tif", raster), tmp_path / f"out{suffix}"
    write_polygons(classes, make_task(), output)
    size = output.stat().st_size
    output.unlink()
    result = subprocess.run(
        [sys.executable, "-c", DISK_FULL, str(classes), str(output), "1000", str(size // 2), str(size - 20)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("refused") == 3
    assert files_in(tmp_path) == ["classes.tif"]


@pytest.mark.parametrize(
    "name", ["colorado_rgb_uint8_uncompressed_striped_utm.tif", "int16_2band_scale_offset_deflate.tif"]
)
def test_real_scene_as_polygons(tmp_path: Path, shared_data: Path, name: str) -> None:
    with rasterio.open(shared_data / "scenes" / name) as dataset:
        segmenter = ConvSegmenter(make_task(dataset.count))
    predict_scene(segmenter, shared_data / "scenes" / name, tmp_path / "out.tif", options())
    classes = read_classes(tmp_path / "out.tif")
    polygons = traced(classes, 256)
    assert_array_equal(burnt(polygons, classes.shape), classes)
    count = write_polygons(tmp_path / "out.tif", segmenter.task, tmp_path / "out.gpkg")
    assert count == len(polygons)
