"""Accuracy and area from a stratified sample: the worked examples of the two papers, and sampling from real files."""

import json
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
from numpy.typing import NDArray
from rasterio.transform import from_origin

from rsseg.cli import run
from rsseg.errors import DataError, UsageError
from rsseg.evaluation.assessment import Sample, Strata, allocate, assess, sample_size
from rsseg.evaluation.points import SampleSize, assess_points, draw_points
from tests.conftest import write_tif

NAMES = {0: "water", 1: "forest", 4: "road"}


def sample_of(matrix: Sequence[Sequence[int]]) -> Sample:
    """Points of an error matrix [map, reference] whose strata are the classes of the map."""
    counts = np.array(matrix)
    mapped = np.repeat(np.arange(len(counts)), counts.sum(1))
    truth = np.concatenate([np.repeat(np.arange(len(counts)), row) for row in counts])
    return Sample(mapped, mapped, truth, np.ones(len(mapped)))


def test_estimates_equal_the_example_of_olofsson_2014() -> None:
    # Table 8 and section 5: deforestation, forest gain, stable forest, stable non-forest; 10 million Landsat pixels.
    matrix = [[66, 0, 5, 4], [0, 55, 8, 12], [1, 0, 153, 11], [2, 1, 9, 313]]
    strata = Strata(("loss", "gain", "forest", "other"), (200_000, 150_000, 3_200_000, 6_450_000))
    result = assess(sample_of(matrix), strata, strata.names, total_ha=900_000)
    assert result.overall_accuracy.value == pytest.approx(0.95, abs=0.005)
    assert result.overall_accuracy.half_width == pytest.approx(0.02, abs=0.005)
    users = np.array([(c.users_accuracy.value, c.users_accuracy.half_width) for c in result.classes])
    assert users == pytest.approx(np.array([(0.88, 0.07), (0.73, 0.10), (0.93, 0.04), (0.96, 0.02)]), abs=0.005)
    producers = [c.producers_accuracy.value for c in result.classes]
    assert producers == pytest.approx([0.75, 0.85, 0.93, 0.96], abs=0.005)
    assert result.classes[0].producers_accuracy.half_width == pytest.approx(0.21, abs=0.005)
    loss = result.classes[0].area_ha
    assert loss is not None
    assert loss.value == pytest.approx(21_158, abs=1)
    assert loss.half_width == pytest.approx(6_158, abs=2)


def test_estimates_equal_the_example_of_stehman_2014() -> None:
    # 40 points of four strata that are not the classes of the map; pages 4932 to 4936.
    def indices(letters: str) -> NDArray[np.int64]:
        return np.array([ord(letter) - ord("A") for letter in letters], np.int64)

    mapped = "AAAAAAABBB" + "A" + "B" * 11 + "C" * 6 + "BB" + "D" * 10
    truth = "AAAAACBABC" + "ABBBBBAABB" + "CCCCCDDBBA" + "DDDDDDDCCB"
    sample = Sample(np.repeat(np.arange(4), 10), indices(mapped), indices(truth), np.ones(40))
    result = assess(sample, Strata(tuple("ABCD"), (40_000, 30_000, 20_000, 10_000)), "ABCD")
    area_a, area_c = result.classes[0].area_share, result.classes[2].area_share
    b = result.classes[1]
    found = [area_a, area_c, result.overall_accuracy, b.users_accuracy, b.producers_accuracy]
    expected = [(0.35, 0.082), (0.20, 0.064), (0.63, 0.085), (0.574, 0.125), (0.794, 0.117)]
    assert [e.value for e in found] == pytest.approx([value for value, _ in expected], abs=5e-4)
    assert [e.se for e in found] == pytest.approx([se for _, se in expected], abs=5e-4)
    assert result.matrix[1][2] == pytest.approx(0.08, abs=5e-3)
    assert np.sum(result.matrix) == pytest.approx(1.0)


def test_intervals_cover_the_true_area_nineteen_times_in_twenty() -> None:
    rng = np.random.default_rng(1)
    truth = rng.choice(3, 20_000, p=[0.7, 0.25, 0.05])
    mapped = np.where(rng.random(20_000) < 0.8, truth, rng.integers(0, 3, 20_000))
    sizes = np.bincount(mapped)
    inside = []
    for _ in range(300):
        drawn = np.concatenate([rng.choice(np.flatnonzero(mapped == k), 60, replace=False) for k in range(3)])
        sample = Sample(mapped[drawn], mapped[drawn], truth[drawn], np.ones(len(drawn)))
        result = assess(sample, Strata(tuple("abc"), tuple(sizes.tolist())), "abc")
        for k, c in enumerate(result.classes):
            assert c.area_share.value is not None
            assert c.area_share.half_width is not None
            inside.append(abs(c.area_share.value - np.mean(truth == k)) <= c.area_share.half_width)
    assert 0.92 < np.mean(inside) < 0.98


def test_pixels_count_with_their_area() -> None:
    # Two strata of equal pixel numbers; the pixels of the second are three times as large and all of class b.
    stratum = np.repeat([0, 1], 50)
    sample = Sample(stratum, stratum, stratum, np.where(stratum == 1, 3.0, 1.0))
    result = assess(sample, Strata(("a", "b"), (1000, 1000)), "ab")
    assert [c.area_share.value for c in result.classes] == pytest.approx([0.25, 0.75])


def test_stratum_without_two_points_is_named() -> None:
    sample = sample_of([[5, 0], [0, 1]])
    with pytest.raises(DataError, match=r"forest \(1\)"):
        assess(sample, Strata(("water", "forest"), (100, 100)), ("water", "forest"))


def test_sample_size_and_allocation_follow_the_example_of_olofsson_2014() -> None:
    # Section 5.1.1: expected user's accuracies .70 .60 .90 .95 and a standard error of 0.01 ask for 641 points.
    shares = (0.02, 0.015, 0.32, 0.645)
    assert sample_size(shares, (0.7, 0.6, 0.9, 0.95), 0.01) == pytest.approx(641, abs=1)
    points = allocate(641, shares, 75)
    assert points[:2] == (75, 75)
    assert sum(points) == pytest.approx(641, abs=2)
    assert points[2] / points[3] == pytest.approx(0.32 / 0.645, abs=0.02)


@pytest.fixture
def class_map(tmp_path: Path) -> Path:
    """90 x 60 pixels of 10 m: water, forest and a little road, a collar without data, names as predict writes them."""
    pixels = np.zeros((60, 90), np.uint8)
    pixels[:, 40:] = 1
    pixels[30:33, :] = 4
    pixels[:5] = 255
    file = tmp_path / "map.tif"
    profile = {"driver": "GTiff", "height": 60, "width": 90, "count": 1, "dtype": "uint8", "nodata": 255}
    with rasterio.open(file, "w", **profile, crs="EPSG:32633", transform=from_origin(5e5, 5e6, 10, 10)) as dataset:
        dataset.write(pixels, 1)
        dataset.update_tags(1, **{f"class_{value}": name for value, name in NAMES.items()})
    return file


def label(points: Path, choose: Callable[[int, int], str | None]) -> None:
    """Fill in `truth` by row and column."""
    with sqlite3.connect(points) as database:
        # The triggers of the spatial index need functions that plain SQLite lacks.
        for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            database.execute(f'DROP TRIGGER "{name}"')
        rows = database.execute('SELECT fid, "row", "col" FROM points').fetchall()
        database.executemany("UPDATE points SET truth = ? WHERE fid = ?", [(choose(r, c), fid) for fid, r, c in rows])


def value_at(class_map: Path) -> NDArray[np.uint8]:
    with rasterio.open(class_map) as dataset:
        return np.asarray(dataset.read(1))


def test_sample_lies_on_distinct_valid_pixels_of_its_stratum(class_map: Path, tmp_path: Path) -> None:
    drawn = draw_points(class_map, tmp_path / "p.gpkg", SampleSize(per_stratum=40), seed=3)
    assert drawn.points == {"water": 40, "forest": 40, "road": 40}
    pixels = value_at(class_map)
    assert drawn.pixels == {name: int((pixels == value).sum()) for value, name in NAMES.items()}
    meta, _, geometry, (rows, cols, strata) = pyogrio.raw.read(
        tmp_path / "p.gpkg", columns=["row", "col", "stratum"], layer="points"
    )
    assert len(set(zip(rows.tolist(), cols.tolist(), strict=True))) == 120
    assert (pixels[rows, cols] == strata).all()
    with rasterio.open(class_map) as dataset:
        where = shapely.get_coordinates(shapely.from_wkb(geometry))
        assert pytest.approx(where) == np.array(dataset.xy(rows, cols)).T
        assert meta["crs"] == "EPSG:32633"
    assert len(set(strata[:20].tolist())) > 1, "the order gives the class away"


def test_same_seed_draws_the_same_sample(class_map: Path, tmp_path: Path) -> None:
    def places(name: str, seed: int) -> list[int]:
        draw_points(class_map, tmp_path / name, SampleSize(per_stratum=10), seed=seed)
        rows, cols = pyogrio.raw.read(tmp_path / name, columns=["row", "col"], layer="points")[3]
        return (rows * 90 + cols).tolist()

    assert places("a.gpkg", 1) == places("b.gpkg", 1)
    assert places("c.gpkg", 2) != places("a2.gpkg", 1)


def test_stratum_smaller_than_the_sample_is_taken_whole(class_map: Path, tmp_path: Path) -> None:
    drawn = draw_points(class_map, tmp_path / "p.gpkg", SampleSize(per_stratum=500))
    assert drawn.points["road"] == drawn.pixels["road"] == 270


def test_sample_of_all_pixels_is_said_and_a_huge_one_refused(
    class_map: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = draw_points(class_map, tmp_path / "all.gpkg", SampleSize(per_stratum=10**6))
    assert drawn.points == drawn.pixels
    assert drawn.warnings[0].startswith(f"the sample holds every pixel of {', '.join(drawn.points)}: ")
    assert draw_points(class_map, tmp_path / "few.gpkg", SampleSize(per_stratum=2)).warnings == ()
    monkeypatch.setattr("rsseg.evaluation.points._MOST_POINTS", 10)
    with pytest.raises(UsageError, match=r"more than 10\. Choose a smaller --per-stratum"):
        draw_points(class_map, tmp_path / "huge.gpkg", SampleSize(per_stratum=10**6))


@pytest.mark.parametrize("size", [2000, 40_000, 90_000])
def test_truncated_points_are_one_sentence_without_sql(class_map: Path, tmp_path: Path, size: int) -> None:
    draw_points(class_map, tmp_path / "all.gpkg", SampleSize(per_stratum=10))
    cut = tmp_path / "cut.gpkg"
    cut.write_bytes((tmp_path / "all.gpkg").read_bytes()[:size])
    with pytest.raises(DataError, match=r"cut\.gpkg: ") as caught:
        assess_points(class_map, cut)
    assert "SELECT" not in str(caught.value)
    assert str(caught.value).count("malformed") <= 1


def test_perfect_labels_give_perfect_accuracy_and_the_mapped_areas(class_map: Path, tmp_path: Path) -> None:
    draw_points(class_map, tmp_path / "p.gpkg", SampleSize(per_stratum=30))
    pixels = value_at(class_map)
    label(tmp_path / "p.gpkg", lambda row, col: NAMES[int(pixels[row, col])])
    result = assess_points(class_map, tmp_path / "p.gpkg")
    assert result.overall_accuracy.value == 1.0
    assert result.overall_accuracy.se == 0.0
    for entry, value in zip(result.classes, NAMES, strict=True):
        assert entry.area_ha is not None
        assert entry.area_ha.value == pytest.approx((pixels == value).sum() * 0.01, rel=2e-3)
    assert result.warnings == ()


@pytest.mark.parametrize(("name", "dtype"), [("q.geojson", np.int64), ("q.gpkg", np.float32)])
def test_labels_in_other_coordinates_and_as_values_are_understood(
    class_map: Path, tmp_path: Path, name: str, dtype: type[np.generic]
) -> None:
    draw_points(class_map, tmp_path / "p.gpkg", SampleSize(per_stratum=30))
    pixels = value_at(class_map)
    _, _, geometry, (rows, cols) = pyogrio.raw.read(tmp_path / "p.gpkg", columns=["row", "col"], layer="points")
    from rasterio.warp import transform

    x, y = shapely.get_coordinates(shapely.from_wkb(geometry)).T
    lonlat = np.array(transform("EPSG:32633", "EPSG:4326", x, y)).T
    truth = np.where(rows % 2 == 0, pixels[rows, cols], 1).astype(dtype)
    pyogrio.raw.write(
        tmp_path / name,
        geometry=shapely.to_wkb(shapely.points(lonlat)),
        field_data=[truth],
        fields=["klasse"],
        geometry_type="Point",
        crs="EPSG:4326",
    )
    result = assess_points(class_map, tmp_path / name, field="klasse")
    assert np.array(result.counts).sum() == 90
    assert np.array(result.counts)[0, 1] == ((pixels[rows, cols] == 0) & (rows % 2 == 1)).sum()


def test_strata_of_another_raster_are_sampled_and_assessed(class_map: Path, tmp_path: Path) -> None:
    strata = tmp_path / "strata.tif"
    with rasterio.open(class_map) as dataset:
        profile = dataset.profile
    halves = np.where(np.arange(60)[:, None] < 30, 7, 9).astype(np.uint8) * np.ones((1, 90), np.uint8)
    with rasterio.open(strata, "w", **profile) as dataset:
        dataset.write(halves, 1)
    drawn = draw_points(class_map, tmp_path / "p.gpkg", SampleSize(per_stratum=60), strata=strata)
    assert drawn.points == {"7": 60, "9": 60}
    pixels = value_at(class_map)
    label(tmp_path / "p.gpkg", lambda row, col: NAMES[int(pixels[row, col])])
    result = assess_points(class_map, tmp_path / "p.gpkg", strata=strata)
    assert dict(result.strata) == {"7": (60, 25 * 90), "9": (60, 30 * 90)}
    assert result.overall_accuracy.value == 1.0


def test_unlabeled_points_are_left_out_and_counted(class_map: Path, tmp_path: Path) -> None:
    draw_points(class_map, tmp_path / "p.gpkg", SampleSize(per_stratum=40))
    pixels = value_at(class_map)
    label(tmp_path / "p.gpkg", lambda row, col: NAMES[int(pixels[row, col])] if col % 5 else None)
    result = assess_points(class_map, tmp_path / "p.gpkg")
    assert result.points < 120
    assert f"{120 - result.points} of 120 points have no label" in result.warnings[0]


def test_unknown_truth_points_off_the_map_and_missing_fields_are_named(class_map: Path, tmp_path: Path) -> None:
    draw_points(class_map, tmp_path / "p.gpkg", SampleSize(per_stratum=5))
    label(tmp_path / "p.gpkg", lambda row, col: "lava")
    with pytest.raises(DataError, match=r"15 feature\(s\) \(1, 2, 3, 4, 5, ...\) have 'lava'; the classes are water"):
        assess_points(class_map, tmp_path / "p.gpkg")
    with pytest.raises(
        DataError, match=r"--field klass: .* no such field; there are id, row, col, stratum, truth, note"
    ):
        assess_points(class_map, tmp_path / "p.gpkg", field="klass")
    with pytest.raises(DataError, match="no layer 'x'; there are points"):
        assess_points(class_map, tmp_path / "p.gpkg", layer="x")
    for name, at, words in (("off", (5e5 - 100, 5e6), "lie outside"), ("collar", (500_005, 4_999_995), "without data")):
        pyogrio.raw.write(
            tmp_path / f"{name}.gpkg",
            geometry=shapely.to_wkb(shapely.points([at])),
            field_data=[np.array(["water"], object)],
            fields=["truth"],
            driver="GPKG",
            geometry_type="Point",
            crs="EPSG:32633",
        )
        with pytest.raises(DataError, match=words):
            assess_points(class_map, tmp_path / f"{name}.gpkg")


def test_sample_needs_one_size_and_a_free_geopackage(class_map: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="either --per-stratum or --target-se"):
        SampleSize()
    with pytest.raises(UsageError, match=r"ends in \.gpkg"):
        draw_points(class_map, tmp_path / "p.csv", SampleSize(per_stratum=5))
    (tmp_path / "p.gpkg").write_text("mine")
    with pytest.raises(UsageError, match="--overwrite"):
        draw_points(class_map, tmp_path / "p.gpkg", SampleSize(per_stratum=5))
    assert (tmp_path / "p.gpkg").read_text() == "mine"


@pytest.mark.parametrize("values", [(3, 7, 9), (-5, 0, 300), (-(2**31), 0, 2**31 - 1)])
def test_areas_do_not_depend_on_the_values_of_the_classes(tmp_path: Path, values: tuple[int, ...]) -> None:
    classes = np.random.default_rng(0).integers(0, 3, (40, 50))
    file = write_tif(tmp_path / "map.tif", np.array(values, np.int32)[classes][None])
    draw_points(file, tmp_path / "p.gpkg", SampleSize(per_stratum=20))
    label(tmp_path / "p.gpkg", lambda row, col: str(values[classes[row, col]]))
    result = assess_points(file, tmp_path / "p.gpkg")
    assert [entry.name for entry in result.classes] == [str(value) for value in values]
    areas = [entry.area_ha.value for entry in result.classes if entry.area_ha is not None]
    shares = np.bincount(classes.ravel()) / classes.size
    assert areas == pytest.approx(shares * sum(areas))


def test_raster_of_measured_values_is_no_map(tmp_path: Path) -> None:
    measured = write_tif(tmp_path / "height.tif", np.arange(300, dtype=np.uint16).reshape(1, 10, 30))
    with pytest.raises(DataError, match="more than 255 values"):
        draw_points(measured, tmp_path / "p.gpkg", SampleSize(per_stratum=5))


def test_form_offers_the_class_names_and_hides_the_stratum(class_map: Path, tmp_path: Path) -> None:
    draw_points(class_map, tmp_path / "p.gpkg", SampleSize(per_stratum=5))
    with sqlite3.connect(tmp_path / "p.gpkg") as database:
        (layer, qml, default), *more = database.execute(
            "SELECT f_table_name, styleQML, useAsDefault FROM layer_styles"
        ).fetchall()
    assert (layer, default, more) == ("points", 1, [])
    assert all(f'value="{name}"' in qml for name in NAMES.values())
    assert '<field name="stratum"><editWidget type="Hidden">' in qml


def test_commands_sample_and_assess(class_map: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points, table = tmp_path / "p.gpkg", tmp_path / "new" / "t.csv"
    assert run(["sample", str(class_map), "-o", str(points), "--target-se", "0.05", "--least", "20"]) == 0
    pixels = value_at(class_map)
    label(points, lambda row, col: NAMES[int(pixels[row, col])])
    capsys.readouterr()
    assert run(["assess", str(class_map), str(points), "--json", "--csv", str(table)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["overall_accuracy"] == {"value": 1.0, "se": 0.0}
    assert table.read_text().splitlines()[1].startswith("water,")
    assert run(["assess", str(class_map), str(points), "--csv", str(table)]) == 2
    assert run(["sample", str(class_map), "-o", str(points), "--per-stratum", "5"]) == 2


def test_areas_of_a_map_in_degrees_lie_on_the_ellipsoid(tmp_path: Path) -> None:
    # One degree per pixel, from 60 degrees north to the equator: forest above 30 degrees, water below.
    pixels = np.repeat(np.array([1, 0], np.uint8), 30)[:, None] * np.ones((1, 90), np.uint8)
    file = tmp_path / "map.tif"
    profile = {"driver": "GTiff", "height": 60, "width": 90, "count": 1, "dtype": "uint8"}
    with rasterio.open(file, "w", **profile, crs="EPSG:4326", transform=from_origin(0, 60, 1, 1)) as dataset:
        dataset.write(pixels, 1)
    draw_points(file, tmp_path / "p.gpkg", SampleSize(per_stratum=300))
    label(tmp_path / "p.gpkg", lambda row, col: str(pixels[row, col]))
    result = assess_points(file, tmp_path / "p.gpkg")
    sphere = np.sin(np.radians(30)), np.sin(np.radians(60)) - np.sin(np.radians(30))
    mapped = [c.mapped_share for c in result.classes]
    assert mapped == pytest.approx([part / sum(sphere) for part in sphere], rel=5e-3)
    for entry, share in zip(result.classes, mapped, strict=True):
        assert entry.area_share.value == pytest.approx(share, abs=3 * (entry.area_share.se or 0))
    assert result.total_ha == pytest.approx(510.1e6 * 100 * sum(sphere) / 8, rel=5e-3)


def test_class_that_the_map_never_shows_has_no_mapped_share(class_map: Path, tmp_path: Path) -> None:
    with rasterio.open(class_map, "r+") as dataset:
        dataset.update_tags(1, class_7="lava")
    draw_points(class_map, tmp_path / "p.gpkg", SampleSize(per_stratum=20))
    pixels = value_at(class_map)
    label(tmp_path / "p.gpkg", lambda row, col: "lava" if row == 10 else NAMES[int(pixels[row, col])])
    lava = assess_points(class_map, tmp_path / "p.gpkg").classes[-1]
    assert (lava.name, lava.mapped_share, lava.users_accuracy.value) == ("lava", 0.0, None)
