"""From polygons drawn in QGIS to a map that opens in QGIS, through the command line."""

from pathlib import Path

import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
import yaml
from rasterio.crs import CRS

from rsseg.cli import run
from tests.training.recipes import tiny_values
from tests.unit.test_vector_labels import EAST, GSD, NORTH, UTM, ground, in_crs, scene, write_vector

FIELDS = (
    ("meadow", (4, 4, 40, 40)),
    ("lake", (60, 10, 50, 70)),
    ("meadow", (10, 60, 40, 50)),
    ("lake", (120, 4, 30, 90)),
)
"""Class, and column, row, width and height of its polygon."""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scene whose lakes are dark and whose meadows are bright, and polygons of them in longitude and latitude."""
    monkeypatch.chdir(tmp_path)
    path = scene(Path("scenes/ortho.tif"), size=(120, 160))
    with rasterio.open(path, "r+") as file:
        pixels = np.random.default_rng(0).normal(180, 12, (3, 120, 160))
        for name, (col, row, width, height) in FIELDS:
            pixels[:, row : row + height, col : col + width] = 60 if name == "lake" else 180
        file.write(pixels.clip(1, 255).astype(np.uint8))
    shapes = [in_crs(ground(*place), "EPSG:4326") for _, place in FIELDS]
    write_vector(Path("labels.gpkg"), shapes, [name for name, _ in FIELDS], crs="EPSG:4326", layer="fields")
    values = tiny_values(Path("data/fields"))
    Path("mine.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return tmp_path


def test_from_polygons_to_a_map_of_polygons(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vectors = ["--src", "scenes", "--labels", "labels.gpkg:fields", "--field", "class", "--out", "data/fields"]
    blocks = ["--tile", "40", "--split-block", "40", "--split-ratio", "train=0.6,val=0.2,test=0.2"]
    assert run(["dataset", "prepare", "vectors", *vectors, *blocks, "--jobs", "1"]) == 0
    said = capsys.readouterr().err
    assert "no --classes: the values of the field are the classes (lake, meadow)" in said
    assert run(["dataset", "verify", "data/fields"]) == 0
    assert "lake" in capsys.readouterr().out
    assert run(["train", "--method", "ktda", "--recipe", "mine.yaml", "--steps", "4"]) == 0
    assert run(["predict", "scenes/ortho.tif", "-o", "map.tif", "--polygons", "map.gpkg"]) == 0

    info = pyogrio.read_info("map.gpkg")
    assert CRS.from_user_input(info["crs"]) == CRS.from_user_input(UTM)
    _, _, wkb, (names,) = pyogrio.raw.read("map.gpkg", columns=["class"])
    shapes = shapely.from_wkb(wkb)
    assert set(names) <= {"lake", "meadow"}
    whole = shapely.box(EAST, NORTH - 120 * GSD, EAST + 160 * GSD, NORTH)
    assert shapely.area(shapely.union_all(shapes)) == pytest.approx(whole.area, rel=1e-6)
    drawn = shapely.union_all([ground(*place) for _, place in FIELDS])
    assert shapely.intersection(shapely.union_all(shapes), drawn).area == pytest.approx(drawn.area, rel=1e-6)
    with rasterio.open("map.tif") as made, rasterio.open("scenes/ortho.tif") as image:
        assert (made.crs, made.transform, made.shape) == (image.crs, image.transform, image.shape)


def test_the_command_says_what_is_wrong_with_the_call(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*more: str) -> tuple[int, str]:
        code = run(["dataset", "prepare", "vectors", "--src", "scenes", "--out", "out", *more])
        return code, capsys.readouterr().err

    labels = ("--labels", "labels.gpkg", "--field", "class")
    code, said = refused()
    assert (code, "`vectors` needs --src SCENES, --labels FILE and --field NAME" in said) == (2, True)
    code, said = refused("--labels", "labels.gpkg:feilds", "--field", "class")
    assert (code, "no layer 'feilds'; did you mean 'fields'" in said) == (4, True)
    code, said = refused("--labels", "labels.gpkg", "--field", "klass")
    assert (code, "did you mean 'class'" in said) == (4, True)
    code, said = refused(*labels, "--background", "rest", "--priority", "lak")
    assert (code, "--priority lak" in said) == (2, True)
    code, said = refused(*labels)
    assert (code, "1 labeled scene(s) cannot fill the splits" in said) == (4, True)
    code, said = refused(*labels, "--unlabeled", "x")
    assert (code, "--unlabeled: --unlabeled is for `folder`" in said) == (2, True)
    assert not Path("out").exists()
