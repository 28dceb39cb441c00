"""Features of vector files, drawn on the grid of a scene."""

import sqlite3
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
from rasterio.crs import CRS
from rasterio.features import rasterize
from rasterio.transform import Affine, from_origin
from rasterio.warp import transform as warp_points

from benchmarks import rasterize as rasterize_benchmark
from rsseg.errors import DataError, UsageError
from rsseg.raster import Raster, RasterInfo, Window
from rsseg.vector.labels import Burning, Features, place_labels, read_features
from rsseg.vector.read import split_layer

UTM = "EPSG:25832"
EAST, NORTH, GSD = 500_000.0, 5_700_000.0, 2.0


def scene(path: Path, *, size: tuple[int, int] = (60, 80), crs: str | None = UTM, place: Affine | None = None) -> Path:
    profile = {"driver": "GTiff", "height": size[0], "width": size[1], "count": 3, "dtype": "uint8", "crs": crs}
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", transform=place or from_origin(EAST, NORTH, GSD, GSD), **profile) as file:
        file.write(np.random.default_rng(len(path.name)).integers(1, 255, (3, *size)).astype(np.uint8))
    return path


def info_of(path: Path) -> RasterInfo:
    with Raster(path) as raster:
        return raster.info


def ground(col: float, row: float, width: float, height: float) -> shapely.Polygon:
    """A rectangle of pixels, on the ground."""
    return shapely.box(EAST + col * GSD, NORTH - (row + height) * GSD, EAST + (col + width) * GSD, NORTH - row * GSD)


def in_crs(shape: Any, crs: str) -> Any:
    def move(points: np.ndarray) -> np.ndarray:
        return np.stack(warp_points(CRS.from_user_input(UTM), CRS.from_user_input(crs), *points.T), axis=1)

    return shapely.transform(shape, move)


def write_vector(
    path: Path,
    shapes: list[Any],
    values: list[Any],
    *,
    crs: str | None = UTM,
    layer: str = "labels",
    append: bool = False,
    **more: list[Any],
) -> Path:
    """A vector file with the attribute `class`, and further ones."""
    columns = {"class": values, **more}
    arrays = [np.array(c, None if all(isinstance(v, int | float) for v in c) else object) for c in columns.values()]
    options = {} if path.suffix == ".shp" else {"layer": layer}
    path.parent.mkdir(parents=True, exist_ok=True)
    pyogrio.raw.write(
        path, shapely.to_wkb(np.array(shapes, object)), arrays, list(columns), geometry_type="Unknown", crs=crs,
        append=append, **options,
    )  # fmt: skip
    return path


def drawn(features: Features, known: dict[str, int], info: RasterInfo, how: Burning | None = None, **more: Any) -> Any:
    how = how or Burning()
    classes, _ = features.classes(known)
    labels = place_labels(features, classes, info, how, **more)
    return labels.burn(Window(0, 0, info.height, info.width), fill=255, touched=how.touched)


def expected(*rectangles: tuple[int, int, int, int, int], size: tuple[int, int] = (60, 80)) -> np.ndarray:
    pixels = np.full(size, 255, np.uint8)
    for col, row, width, height, value in rectangles:
        pixels[row : row + height, col : col + width] = value
    return pixels


@pytest.mark.parametrize(
    ("suffix", "crs"),
    [
        *product((".gpkg", ".geojson", ".fgb", ".shp"), (UTM, "EPSG:4326", "EPSG:3857")),
        (".kml", "EPSG:4326"),  # always longitude and latitude
    ],
)
def test_any_format_and_coordinate_system_gives_the_same_pixels(tmp_path: Path, suffix: str, crs: str) -> None:
    shapes = [in_crs(ground(4, 6, 10, 20), crs), in_crs(ground(30, 10, 25, 5), crs)]
    labels = tmp_path / f"labels{suffix}"
    if suffix in (".shp", ".kml", ".fgb"):
        pyogrio.raw.write(
            labels, shapely.to_wkb(np.array(shapes)), [np.array(["water", "road"], object)], ["class"],
            geometry_type="Polygon", crs=crs, driver="KML" if suffix == ".kml" else None,
        )  # fmt: skip
    else:
        write_vector(labels, shapes, ["water", "road"], crs=crs)
    features = read_features(labels, None, "class")
    found = drawn(features, {"road": 0, "water": 1}, info_of(scene(tmp_path / "s.tif")))
    np.testing.assert_array_equal(found, expected((4, 6, 10, 20, 1), (30, 10, 25, 5, 0)))


@pytest.mark.parametrize("touched", [False, True])
def test_windows_together_are_what_rasterio_burns_at_once(tmp_path: Path, touched: bool) -> None:
    rng = np.random.default_rng(0)
    angle = np.linspace(0, 2 * np.pi, 9)[:-1]
    shapes, values = [], []
    for number in range(40):
        centre, radius = rng.uniform((0, 0), (160, 120)), rng.uniform(4, 25, 8)
        ring = centre[:, None] + radius * np.stack([np.cos(angle), np.sin(angle)])
        hole = centre[:, None] + 3 * np.stack([np.cos(angle), np.sin(angle)])
        polygon = shapely.Polygon(ring.T, [hole.T])
        shapes.append(shapely.transform(polygon, lambda p: np.stack([EAST + p[:, 0], NORTH - p[:, 1]], axis=1)))
        values.append(f"c{number % 3}")
    features = read_features(write_vector(tmp_path / "l.gpkg", shapes, values), None, "class")
    info = info_of(scene(tmp_path / "s.tif"))
    classes, _ = features.classes({"c0": 0, "c1": 1, "c2": 2})
    labels = place_labels(features, classes, info, Burning(touched))
    whole = np.full((60, 80), 255, np.uint8)
    burnt = zip(shapes, (int(v[1]) for v in values), strict=True)
    rasterize(burnt, out=whole, transform=info.transform, all_touched=touched)
    for row, col in np.ndindex(4, 5):
        window = Window(row * 15, col * 16, 15, 16)
        part = labels.burn(window, fill=255, touched=touched)
        np.testing.assert_array_equal(part, whole[row * 15 : row * 15 + 15, col * 16 : col * 16 + 16])


@pytest.mark.parametrize("touched", [False, True])
def test_polygons_of_many_corners_are_drawn_as_a_whole(tmp_path: Path, touched: bool) -> None:
    angle = np.linspace(0, 2 * np.pi, 20_001)[:-1]
    radius = 45 + 6 * np.sin(37 * angle) + np.sin(1501 * angle)
    ring = np.stack([EAST + 80 + radius * np.cos(angle), NORTH - 60 + radius * np.sin(angle)], axis=1)
    holes = [shapely.Point(EAST + 50 + 9 * i, NORTH - 60).buffer(3, quad_segs=400).exterior for i in range(7)]
    polygon = shapely.Polygon(ring, holes)
    features = read_features(write_vector(tmp_path / "l.gpkg", [polygon], ["a"]), None, "class")
    info = info_of(scene(tmp_path / "s.tif"))
    whole = np.full((60, 80), 255, np.uint8)
    rasterize([(polygon, 0)], out=whole, transform=info.transform, all_touched=touched)
    labels = place_labels(features, np.zeros(1, np.int64), info, Burning(touched))
    assert len(labels.polygons) > 10
    np.testing.assert_array_equal(labels.burn(Window(0, 0, 60, 80), fill=255, touched=touched), whole)


def test_values_match_names_in_any_case_and_numbers(tmp_path: Path) -> None:
    box = [ground(0, 0, 5, 5)] * 3
    features = read_features(write_vector(tmp_path / "l.gpkg", box, ["Water", " road ", "WATER"]), None, "class")
    assert features.classes({"water": 1, "road": 0})[0].tolist() == [1, 0, 1]
    features = read_features(write_vector(tmp_path / "n.gpkg", box, [1.0, 3.0, float("nan")]), None, "class")
    found, issues = features.classes({"grass": 5, "1": 5, "3": 2})
    assert found.tolist() == [5, 2, -1]
    assert issues[0].fids == (3,)


def test_values_without_a_class_are_named_with_their_features_and_the_nearest_class(tmp_path: Path) -> None:
    path = write_vector(tmp_path / "l.gpkg", [ground(0, 0, 5, 5)] * 3, ["water", "waater", "waater"])
    with pytest.raises(DataError, match=r"'waater' \(feature\(s\) 2, 3; did you mean 'water'\?"):
        read_features(path, None, "class").classes({"water": 0, "road": 1})


def test_two_names_that_differ_by_case_only_are_told_apart(tmp_path: Path) -> None:
    features = read_features(write_vector(tmp_path / "l.gpkg", [ground(0, 0, 5, 5)] * 2, ["a", "A"]), None, "class")
    assert features.classes({"a": 0, "A": 1})[0].tolist() == [0, 1]
    other = read_features(write_vector(tmp_path / "m.gpkg", [ground(0, 0, 5, 5)], ["Ab"]), None, "class")
    with pytest.raises(DataError, match="without a class"):
        other.classes({"ab": 0, "AB": 1})


def test_unknown_layers_and_fields_name_those_that_exist(tmp_path: Path) -> None:
    path = write_vector(tmp_path / "l.gpkg", [ground(0, 0, 5, 5)], ["a"], layer="roads", kind=["x"])
    write_vector(path, [ground(0, 0, 5, 5)], ["a"], layer="lakes", append=True, kind=["x"])
    with pytest.raises(DataError, match=r"has several layers: roads, lakes.*l\.gpkg:roads"):
        read_features(path, None, "class")
    with pytest.raises(DataError, match=r"no layer 'laces'; did you mean 'lakes'"):
        read_features(path, "laces", "class")
    with pytest.raises(DataError, match=r"--field clas: .*did you mean 'class'.* There are class, kind"):
        read_features(path, "lakes", "clas")
    with pytest.raises(DataError, match=r"--split-field splt: .* there are class, kind"):
        read_features(path, "lakes", "class", split_field="splt")
    with pytest.raises(UsageError, match=r"--field is missing.*There are class, kind"):
        read_features(path, "lakes", None)


def test_the_layer_follows_the_last_colon_of_a_file_name(tmp_path: Path) -> None:
    assert split_layer("a/b.gpkg:roads") == (Path("a/b.gpkg"), "roads")
    assert split_layer("a/b.gpkg") == (Path("a/b.gpkg"), None)
    assert split_layer("C:\\data\\b.gpkg") == (Path("C:\\data\\b.gpkg"), None)
    assert split_layer("a:b/c.gpkg") == (Path("a:b/c.gpkg"), None)
    odd = tmp_path / "odd:name"
    odd.touch()
    assert split_layer(str(odd)) == (odd, None)


def test_a_file_without_a_coordinate_system_needs_one(tmp_path: Path) -> None:
    path = tmp_path / "l.shp"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pyogrio.raw.write(
            path, shapely.to_wkb(np.array([in_crs(ground(4, 6, 10, 20), "EPSG:4326")])), [np.array(["a"], object)],
            ["class"], geometry_type="Polygon", crs=None,
        )  # fmt: skip
    info = info_of(scene(tmp_path / "s.tif"))
    with pytest.raises(DataError, match=r"no coordinate system\. Name it with --labels-crs"):
        drawn(read_features(path, None, "class"), {"a": 0}, info)
    features = read_features(path, None, "class", crs="EPSG:4326")
    np.testing.assert_array_equal(drawn(features, {"a": 0}, info), expected((4, 6, 10, 20, 0)))
    with pytest.raises(UsageError, match="--labels-crs nonsense"):
        read_features(path, None, "class", crs="nonsense")
    other = write_vector(tmp_path / "m.gpkg", [ground(0, 0, 5, 5)], ["a"])
    with pytest.raises(UsageError, match="states EPSG:25832"):
        read_features(other, None, "class", crs="EPSG:4326")


def test_unreadable_and_missing_files_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        read_features(tmp_path / "none.gpkg", None, "class")
    (tmp_path / "text.gpkg").write_text("no database", encoding="utf-8")
    with pytest.raises(DataError, match="not a readable vector file"):
        read_features(tmp_path / "text.gpkg", None, "class")
    pyogrio.raw.write(tmp_path / "t.gpkg", None, [np.array(["a"], object)], ["class"], layer="t", crs=None)
    with pytest.raises(DataError, match="the file has no layer with geometries"):
        read_features(tmp_path / "t.gpkg", None, "class")


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_file_that_another_program_edits_is_read(tmp_path: Path, mode: str) -> None:
    path = write_vector(tmp_path / "l.gpkg", [ground(0, 0, 5, 5)], ["a"])
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA journal_mode = {mode}")
    connection.execute("BEGIN EXCLUSIVE")
    try:
        assert read_features(path, None, "class").values == ("a",)
    finally:
        connection.close()


def test_a_read_only_file_in_a_read_only_folder_is_read(tmp_path: Path) -> None:
    path = write_vector(tmp_path / "ro" / "l.gpkg", [ground(0, 0, 5, 5)], ["a"])
    before = path.read_bytes()
    path.chmod(0o444)
    path.parent.chmod(0o555)
    try:
        assert len(read_features(path, None, "class").shapes) == 1
    finally:
        path.parent.chmod(0o755)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["l.gpkg"]


def test_empty_and_invalid_geometries_are_reported_and_the_latter_repaired(tmp_path: Path) -> None:
    bow_tie = shapely.Polygon([(EAST, NORTH), (EAST + 40, NORTH - 40), (EAST + 40, NORTH), (EAST, NORTH - 40)])
    shapes = [ground(40, 30, 5, 5), None, shapely.Polygon(), bow_tie]
    features = read_features(write_vector(tmp_path / "l.gpkg", shapes, ["a"] * 4), None, "class")
    assert [(issue.fids, issue.reason.split(" (")[0]) for issue in features.issues] == [
        ((2, 3), "without a geometry, not drawn"),
        ((4,), "with an invalid geometry"),
    ]
    found = drawn(features, {"a": 0}, info_of(scene(tmp_path / "s.tif")))
    assert 180 <= (found[:20, :20] == 0).sum() <= 220  # half of the square that the bow tie spans
    assert (found[30:35, 40:45] == 0).all()


def test_a_layer_in_which_nothing_can_be_drawn_is_an_error(tmp_path: Path) -> None:
    path = write_vector(tmp_path / "l.gpkg", [None, shapely.Polygon()], ["a", "a"])
    with pytest.raises(DataError, match=r"no feature can be drawn: 2 feature\(s\) without a geometry.*: 1, 2"):
        read_features(path, None, "class")


@pytest.mark.parametrize("crs", [UTM, "EPSG:3857", "EPSG:4326"])
def test_buffers_and_widths_are_metres_on_the_ground_in_any_coordinate_system(tmp_path: Path, crs: str) -> None:
    """Web Mercator stretches lengths by 1.6 at 51 degrees north, and degrees are no lengths at all."""
    target = scene(tmp_path / "s.tif")
    if crs != UTM:
        x, y = warp_points(CRS.from_user_input(UTM), CRS.from_user_input(crs), [EAST, EAST + 160], [NORTH, NORTH - 120])
        step = from_origin(x[0], y[0], (x[1] - x[0]) / 80, (y[0] - y[1]) / 60)
        target = scene(tmp_path / "other.tif", crs=crs, place=step)
    info = info_of(target)
    path = write_vector(tmp_path / "l.gpkg", [ground(10, 10, 40, 30)], ["a"])
    features = read_features(path, None, "class")
    plain = int((drawn(features, {"a": 0}, info) == 0).sum())
    narrow = int((drawn(features, {"a": 0}, info, Burning(buffer=-6.0)) == 0).sum())
    assert (plain, narrow) == (pytest.approx(1200, rel=0.02), pytest.approx(34 * 24, rel=0.04))
    line = shapely.LineString([(EAST + 20, NORTH - 60), (EAST + 120, NORTH - 60)])
    thin = [line, shapely.Point(EAST + 60, NORTH - 20)]
    features = read_features(write_vector(tmp_path / "t.gpkg", thin, ["a", "b"]), None, "class", width=12)
    found = drawn(features, {"a": 0, "b": 1}, info, Burning(width=12))
    assert int((found == 0).sum()) == pytest.approx(50 * 6 + np.pi * 9, rel=0.06)  # round ends
    assert int((found == 1).sum()) == pytest.approx(np.pi * 9, rel=0.2)


def test_points_and_lines_without_a_width_are_refused(tmp_path: Path) -> None:
    shapes = [ground(0, 0, 5, 5), shapely.Point(EAST, NORTH)]
    with pytest.raises(UsageError, match=r"1 feature\(s\) are points or lines \(2\)\. .* --width METRES"):
        read_features(write_vector(tmp_path / "l.gpkg", shapes, ["a", "a"]), None, "class")


def test_later_features_and_classes_of_priority_lie_above_others(tmp_path: Path) -> None:
    shapes = [ground(0, 0, 20, 20), ground(10, 0, 20, 20), ground(15, 0, 20, 20)]
    features = read_features(write_vector(tmp_path / "l.gpkg", shapes, ["a", "b", "c"]), None, "class")
    info, known = info_of(scene(tmp_path / "s.tif")), {"a": 0, "b": 1, "c": 2}
    assert drawn(features, known, info)[5, [5, 12, 17, 25, 32]].tolist() == [0, 1, 2, 2, 2]
    assert drawn(features, known, info, priority=(0, 1))[5, [5, 12, 17, 25, 32]].tolist() == [0, 0, 0, 1, 2]


def test_overlaps_of_two_classes_are_found_but_not_common_borders(tmp_path: Path) -> None:
    shapes = [ground(0, 0, 20, 20), ground(20, 0, 20, 20), ground(35, 0, 20, 20), ground(50, 0, 10, 10)]
    features = read_features(write_vector(tmp_path / "l.gpkg", shapes, ["a", "b", "a", "a"]), None, "class")
    classes, _ = features.classes({"a": 0, "b": 1})
    labels = place_labels(features, classes, info_of(scene(tmp_path / "s.tif")), Burning())
    lower, upper, shared = labels.overlaps()
    assert (labels.owner[lower].tolist(), labels.owner[upper].tolist()) == ([1], [2])
    assert shared.tolist() == pytest.approx([100])


def test_labels_follow_a_scene_across_the_antimeridian(tmp_path: Path) -> None:
    target = scene(tmp_path / "s.tif", crs="EPSG:4326", place=from_origin(179.9, -16, 0.005, 0.005))
    west = shapely.box(-179.95, -16.2, -179.85, -16.1)  # columns 30 to 50
    features = read_features(write_vector(tmp_path / "l.gpkg", [west], ["a"], crs="EPSG:4326"), None, "class")
    found = drawn(features, {"a": 0}, info_of(target))
    np.testing.assert_array_equal(found, expected((30, 20, 20, 20, 0)))


def test_scenes_without_coordinates_are_refused(tmp_path: Path) -> None:
    with rasterio.open(tmp_path / "s.tif", "w", driver="GTiff", height=8, width=8, count=1, dtype="uint8") as file:
        file.write(np.ones((1, 8, 8), np.uint8))
    features = read_features(write_vector(tmp_path / "l.gpkg", [ground(0, 0, 5, 5)], ["a"]), None, "class")
    with pytest.raises(DataError, match="the scene has no coordinates"):
        drawn(features, {"a": 0}, info_of(tmp_path / "s.tif"))


def test_the_benchmark_draws_the_pixels_of_rasterio(tmp_path: Path) -> None:
    rasterize_benchmark.make_source(tmp_path, 300, 300)
    plain, ours = rasterize_benchmark.plain(tmp_path, 128), rasterize_benchmark.ours(tmp_path, 128)
    assert plain == ours
    assert len(set(plain)) == 9
    rasterize_benchmark.whole(tmp_path, 128)
    with rasterio.open(tmp_path / "mask.tif") as mask, rasterio.open(tmp_path / "scene.tif") as image:
        assert (mask.transform, mask.shape) == (image.transform, image.shape)
        assert set(np.unique(mask.read(1)).tolist()) == {0, 1, 2, 3, 4, 255}
