"""From many scenes to one map: STAC items, object storage, resampling, mosaics and catalogues."""

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pystac
import pytest
import rasterio
import shapely
from rasterio.transform import from_origin

from rsseg.cli import run
from rsseg.errors import DataError, UsageError
from rsseg.raster import Window
from rsseg.scene.batch import choose_targets, find_scenes
from rsseg.scene.catalog import expand_items, write_mosaic
from rsseg.scene.source import open_scene
from tests.scene.helpers import options, plan_scene, random_pixels, read_classes, write_tiny_model
from tests.toys import ConvSegmenter, make_task

OPTIONS = ["--tile", "64", "--overlap", "16", "--device", "cpu", "--format", "gtiff"]


def write(path: Path, pixels: np.ndarray, *, left: float = 500000.0, gsd: float = 1.0, **changes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    place: dict[str, Any] = {"crs": "EPSG:32631", "transform": from_origin(left, 5_400_000.0, gsd, gsd)} | changes
    with rasterio.open(
        path, "w", driver="GTiff", count=count, height=height, width=width, dtype=pixels.dtype, **place
    ) as file:
        file.write(pixels)
    return path


def item(name: str, **hrefs: str) -> dict[str, Any]:
    assets = {key: {"href": href, "type": "image/tiff; application=geotiff"} for key, href in hrefs.items()}
    assets["thumbnail"] = {"href": "small.png", "type": "image/png", "roles": ["thumbnail"]}
    return {"type": "Feature", "id": name, "assets": assets, "properties": {}, "geometry": None}


def collection(path: Path, *items: dict[str, Any], **more: Any) -> str:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": items} | more))
    return str(path)


def test_items_name_scenes_and_outputs(tmp_path: Path) -> None:
    file = collection(
        tmp_path / "items.json", item("a", visual="a/tci.tif"), item("b", visual="https://host/b/tci.tif")
    )
    scenes, ids = expand_items(["x.tif", file])
    assert scenes == ["x.tif", str(tmp_path / "a/tci.tif"), "https://host/b/tci.tif"]
    outputs = [target.output.name for target in choose_targets(scenes, Path("out"), ids=ids)]
    assert outputs == ["x_rsseg.tif", "a_rsseg.tif", "b_rsseg.tif"]


def test_items_with_several_images_need_the_name_of_one(tmp_path: Path) -> None:
    file = collection(tmp_path / "items.json", item("a", b04="4.tif", b08="8.tif"))
    with pytest.raises(UsageError, match=r"item a has b04, b08.*--asset"):
        expand_items([file])
    assert expand_items([file], "b08")[0] == [str(tmp_path / "8.tif")]
    with pytest.raises(UsageError, match="--asset"):
        expand_items([file], "b99")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "items.json"),
        ('{"type": "Topology"}', "neither a STAC item"),
        ('{"type": "FeatureCollection", "features": 5}', "are lists"),
        ('{"type": "Feature", "assets": {"a": {"href": "a.tif"}}, "links": 5}', "are lists"),
        ('{"type": "FeatureCollection", "features": [], "links": ["next"]}', "without items"),
        ('{"type": "FeatureCollection"}', "without"),
    ],
)
def test_files_that_are_no_items_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "items.json").write_text(text)
    with pytest.raises(DataError, match=message):
        expand_items([str(tmp_path / "items.json")])


def test_address_with_a_space_and_asset_without_an_address_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        expand_items(["http://localhost/a b.json"])
    damaged = tmp_path / "item.json"
    damaged.write_text(
        json.dumps({"type": "Feature", "id": "x", "assets": {"a": "a.tif", "b": {"type": "image/tiff"}}})
    )
    with pytest.raises(UsageError, match="item x has no image"):
        expand_items([str(damaged)], "a")


def test_last_page_of_a_collection_may_be_empty(tmp_path: Path) -> None:
    collection(tmp_path / "last.json")
    next_page = [{"rel": "next", "href": "last.json"}]
    first = collection(tmp_path / "first.json", item("a", visual="a.tif"), links=next_page)
    assert expand_items([first])[0] == [str(tmp_path / "a.tif")]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and HOST:PORT of a server of it, in a process of its own: GDAL holds the lock of this one."""
    folder = tmp_path / "bucket"
    folder.mkdir()
    code = (
        "import functools, http.server as h\n"
        "class Quiet(h.SimpleHTTPRequestHandler):\n    def log_message(self, *_): pass\n"
        "s = h.ThreadingHTTPServer(('127.0.0.1', 0), Quiet)\n"
        "print(s.server_address[1], flush=True)\ns.serve_forever()"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield folder, f"127.0.0.1:{server.stdout.readline().strip()}"
        server.kill()


def test_scenes_are_read_from_a_server_and_from_object_storage(
    tmp_path: Path, served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, host = served
    write(folder / "one.tif", random_pixels(40, 50))
    model = write_tiny_model(tmp_path)
    collection(folder / "second.json", item("second", visual="one.tif"))
    collection(folder / "first.json", item("first", visual="one.tif"), links=[{"rel": "next", "href": "second.json"}])
    assert len(expand_items([f"http://{host}/bucket/first.json"])[0]) == 2
    single = {"AWS_S3_ENDPOINT": host, "AWS_HTTPS": "NO", "AWS_VIRTUAL_HOSTING": "FALSE", "AWS_NO_SIGN_REQUEST": "YES"}
    # Object storage would list the folder; this server answers with a page.
    monkeypatch.setenv("GDAL_DISABLE_READDIR_ON_OPEN", "EMPTY_DIR")
    for name, value in single.items():
        monkeypatch.setenv(name, value)
    scenes = [f"http://{host}/bucket/second.json", "/vsis3/bucket/one.tif"]
    assert run(["predict", *scenes, "--model", str(model), "-o", str(tmp_path / "out"), *OPTIONS]) == 0
    assert (
        run(["predict", str(folder / "one.tif"), "--model", str(model), "-o", str(tmp_path / "l.tif"), *OPTIONS]) == 0
    )
    for name in ("second", "one"):
        assert np.array_equal(read_classes(tmp_path / "out" / f"{name}_rsseg.tif"), read_classes(tmp_path / "l.tif"))


def test_resampled_scene_holds_the_means_of_its_pixels(tmp_path: Path) -> None:
    pixels = random_pixels(80, 120)
    path = write(tmp_path / "fine.tif", pixels, gsd=0.1)
    with open_scene(path, options(gsd=0.2), None) as raster:
        whole, valid = raster.read()
        assert valid.all()
        part, _ = raster.read(Window(7, 11, 20, 30))
        # Metres on the ground are those of UTM but for its scale.
        assert raster.info.transform.a == pytest.approx(0.2, rel=0.02)
        assert raster.info.height == 40
    assert np.array_equal(part, whole[:, 7:27, 11:41])
    means = pixels.reshape(3, 40, 2, 60, 2).mean(axis=(2, 4))
    assert np.abs(whole - means).max() <= 1


def test_resampled_nodata_and_masks_do_not_mix_with_data(tmp_path: Path) -> None:
    pixels = np.full((3, 40, 40), 200, np.uint8)
    pixels[:, :21] = 0
    declared = write(tmp_path / "nodata.tif", pixels, nodata=0)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        masked = write(tmp_path / "mask.tif", pixels)
        with rasterio.open(masked, "r+") as file:
            file.write_mask((pixels[0] > 0).astype(np.uint8) * 255)
    for path in (declared, masked):
        with open_scene(path, options(gsd=2.0), None) as raster:
            seen, valid = raster.read()
        assert set(np.unique(seen[:, valid])) == {200}, path
        assert not valid[:10].any()
        assert valid[11:].all()


def test_pixels_unlike_those_of_the_training_are_warned_of_and_resampled(tmp_path: Path) -> None:
    task = make_task().model_copy(update={"gsd_m": 0.5})
    network = ConvSegmenter(task)
    scene = write(tmp_path / "fine.tif", random_pixels(100, 200), gsd=0.1)
    plan = plan_scene(network, scene, tmp_path / "out.tif", options())
    assert any("0.1 m on the ground" in warning and "--gsd 0.5" in warning for warning in plan.warnings)
    plan = plan_scene(network, scene, tmp_path / "out.tif", options(gsd=0.5))
    assert (plan.height, plan.width, plan.warnings) == (20, 40, ())


def test_resampled_bands_keep_names_scales_and_colors(tmp_path: Path) -> None:
    path = write(tmp_path / "named.tif", random_pixels(40, 40, 4))
    with rasterio.open(path, "r+") as file:
        file.descriptions = ("blue", "green", "red", "nir")
        file.scales, file.offsets = (0.5,) * 4, (1.0,) * 4
    with open_scene(path, options(gsd=2.0), None) as raster, open_scene(path, options(), None) as original:
        for name in ("band_names", "scales", "offsets", "colors", "count", "dtype", "has_alpha", "has_mask"):
            assert getattr(raster.info, name) == getattr(original.info, name), name


def test_gsd_without_coordinates_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "plain.tif", random_pixels(20, 20), crs=None)
    with pytest.raises(DataError, match="--gsd needs"), open_scene(path, options(gsd=1.0), None):
        pass


@pytest.fixture
def rasters(tmp_path: Path) -> list[Path]:
    """Two class rasters of 10 x 20 m whose halves overlap; the second lacks data in five pixels of the overlap."""
    values = [c.value for c in make_task().classes]
    first, second = np.full((1, 10, 20), values[0], np.uint8), np.full((1, 10, 20), values[1], np.uint8)
    second[0, :5, 0] = 255
    return [
        write(tmp_path / "a.tif", first, nodata=255),
        write(tmp_path / "b.tif", second, left=500010.0, nodata=255),
    ]


@pytest.mark.parametrize("ending", ["vrt", "tif"])
def test_overlaps_are_counted_once_in_a_mosaic(tmp_path: Path, rasters: list[Path], ending: str) -> None:
    task, output = make_task(), tmp_path / f"all.{ending}"
    areas = write_mosaic(rasters, task, output)
    assert [area.pixels for area in areas][:2] == [105, 195]
    assert areas[0].square_meters == pytest.approx(105, rel=2e-3)
    with rasterio.open(output) as file:
        assert (file.width, file.height, file.nodata) == (30, 10, 255)
        assert file.colormap(1)[task.classes[0].value][:3] == task.classes[0].color
        assert file.read(1)[0, 10] == task.classes[0].value
    with pytest.raises(UsageError, match="not a scene"):
        find_scenes([str(output)])
    assert {path.name for path in tmp_path.iterdir()} == {"a.tif", "b.tif", f"all.{ending}"}


def test_mosaic_of_different_grids_is_refused(tmp_path: Path, rasters: list[Path]) -> None:
    coarse = write(tmp_path / "c.tif", np.zeros((1, 5, 5), np.uint8), gsd=2.0)
    with pytest.raises(UsageError, match=r"c\.tif.*--gsd"):
        write_mosaic([*rasters, coarse], make_task(), tmp_path / "all.vrt")
    elsewhere = write(tmp_path / "d.tif", np.zeros((1, 5, 5), np.uint8), crs="EPSG:32632")
    with pytest.raises(UsageError, match=r"d\.tif has the coordinate system"):
        write_mosaic([*rasters, elsewhere], make_task(), tmp_path / "all.vrt")


def test_scenes_that_make_no_mosaic_are_refused_before_the_first_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = [write(tmp_path / "a.tif", random_pixels(40, 50)), tmp_path / "broken.tif"]
    scenes[1].write_bytes(b"II*")
    scenes.append(write(tmp_path / "c.tif", random_pixels(40, 50), crs="EPSG:32632"))
    call = ["predict", *map(str, scenes), "--model", str(write_tiny_model(tmp_path)), "-o", str(tmp_path / "out")]
    assert run([*call, *OPTIONS, "--mosaic", str(tmp_path / "all.vrt")]) == 2
    assert "c.tif has the coordinate system" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_single_skipped_scene_is_listed_as_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene, out = write(tmp_path / "a.tif", random_pixels(40, 50)), tmp_path / "out.tif"
    call = ["predict", str(scene), "--model", str(write_tiny_model(tmp_path)), "-o", str(out), "--skip-existing"]
    for status in ("done", "skipped"):
        assert run([*call, *OPTIONS, "--json"]) == 0
        (outcome,) = json.loads(capsys.readouterr().out)
        assert (outcome["status"], outcome["output"]) == (status, str(out))


def test_batch_writes_mosaic_and_catalogues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = write_tiny_model(tmp_path), tmp_path / "out"
    write(tmp_path / "in" / "a.tif", random_pixels(40, 50))
    write(tmp_path / "in" / "b.tif", random_pixels(40, 50), left=500025.0)
    call = ["predict", str(tmp_path / "in"), "--model", str(model), "-o", str(out), *OPTIONS]
    items, table, mosaic = tmp_path / "items.json", tmp_path / "list.csv", tmp_path / "all.vrt"
    assert run([*call, "--mosaic", str(mosaic), "--catalog", str(items), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert sum(area["pixels"] for area in printed["mosaic"]) == 40 * 75
    assert [item.id for item in pystac.ItemCollection.from_file(str(items))] == ["a_rsseg", "b_rsseg"]
    assert expand_items([str(items)])[0] == [str(out / "a_rsseg.tif"), str(out / "b_rsseg.tif")]
    assert run([*call, "--skip-existing", "--mosaic", str(mosaic), "--catalog", str(table)]) == 0
    rows = list(csv.DictReader(table.open()))
    assert [row["status"] for row in rows] == ["skipped"] * 2
    assert 2.9 < float(rows[0]["west"]) < 3.1
    table.write_text("mine")
    assert run([*call, "--skip-existing", "--catalog", str(table)]) == 2
    assert table.read_text() == "mine"
    assert run([*call, "--mosaic", "all.png"]) == 2
    assert "--mosaic writes" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["vrt", "tif"])
def test_polygons_of_a_mosaic_cross_the_borders_of_scenes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    model, out = write_tiny_model(tmp_path), tmp_path / "out"
    for name, left in (("a", 500000.0), ("b", 500050.0)):
        write(tmp_path / "in" / f"{name}.tif", np.zeros((3, 40, 50), np.uint8), left=left)
    polygons = tmp_path / "all.gpkg"
    call = ["predict", str(tmp_path / "in"), "--model", str(model), "-o", str(out), *OPTIONS]
    both = ["--mosaic", str(tmp_path / f"all.{ending}"), "--polygons", str(polygons)]
    assert run([*call, *both]) == 0
    assert "\n1 polygons\n" in capsys.readouterr().err
    found = pyogrio.raw.read(polygons)
    assert int(found[3][0][0]) == int(rasterio.open(tmp_path / f"all.{ending}").read(1)[0, 0])
    (shape,) = shapely.from_wkb(found[2])
    assert shape.bounds == (500000.0, 5399960.0, 500100.0, 5400000.0)
    assert not list(out.glob("*.gpkg"))
    assert run([*call, *both, "--skip-existing"]) == 0
    polygons.write_text("mine")
    assert run([*call, *both, "--skip-existing"]) == 2
    assert polygons.read_text() == "mine"
    assert run([*call, "--polygons", str(polygons)]) == 2
    assert "give the extension only" in capsys.readouterr().err
