"""Outputs never replace what is read, one another, or an existing file; temporary files do not stay."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from numpy.testing import assert_array_equal
from rasterio.crs import CRS
from rasterio.transform import Affine

import rsseg
from rsseg.cli import run
from rsseg.errors import UsageError
from rsseg.files import check_outputs
from rsseg.scene.batch import Target, choose_targets, find_scenes, predict_scenes
from rsseg.scene.memory import prepare_network
from rsseg.scene.predict import predict_scene
from tests.conftest import write_png, write_tif
from tests.scene.helpers import (
    files_in,
    options,
    plan_scene,
    random_pixels,
    read_classes,
    write_tiny_model,
)
from tests.toys import ConvSegmenter, make_task


def write_vrt(path: Path, source: str) -> Path:
    """A VRT of three bands of 40 x 50 pixels with a source that is given relative to it."""
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{b}"><SimpleSource><SourceFilename relativeToVRT="1">{source}'
        f"</SourceFilename><SourceBand>{b}</SourceBand></SimpleSource></VRTRasterBand>"
        for b in (1, 2, 3)
    )
    path.write_text(f'<VRTDataset rasterXSize="50" rasterYSize="40">{bands}</VRTDataset>')
    return path


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    return write_tif(tmp_path / "in" / "scene.tif", random_pixels(40, 50))


@pytest.mark.parametrize("way", ["itself", "hard link", "link", "linked folder", "detour", "VRT", "VRT of a VRT"])
def test_no_output_replaces_a_file_that_is_read(tmp_path: Path, scene: Path, way: str) -> None:
    before, given, output = scene.read_bytes(), scene, scene
    match way:
        case "hard link":
            output = scene.with_name("other.tif")
            os.link(scene, output)
        case "link":
            output = scene.with_name("other.tif")
            output.symlink_to("scene.tif")
        case "linked folder":
            (tmp_path / "folder").symlink_to("in")
            output = tmp_path / "folder" / "scene.tif"
        case "detour":
            output = tmp_path / "in" / ".." / "in" / "scene.tif"
        case "VRT" | "VRT of a VRT":
            given = write_vrt(tmp_path / "a.vrt", "in/scene.tif")
            if way == "VRT of a VRT":
                given = write_vrt(tmp_path / "in" / "b.vrt", "../a.vrt")
    with pytest.raises(UsageError, match="would replace the input"):
        predict_scene(ConvSegmenter(make_task()), given, output, options(overwrite=True))
    assert scene.read_bytes() == before


@pytest.mark.parametrize("name", ["preview", "polygons"])
def test_extra_outputs_replace_neither_inputs_nor_existing_files_nor_one_another(tmp_path: Path, name: str) -> None:
    ending = {"preview": "png", "polygons": "geojson"}[name]
    if name == "preview":
        scene = write_png(tmp_path / "scene.png", random_pixels(40, 50).transpose(1, 2, 0))
    else:
        scene = write_tif(tmp_path / "scene.tif", random_pixels(40, 50))
    area, other = tmp_path / "area.geojson", tmp_path / f"other.{ending}"
    area.write_text('{"type": "Polygon", "coordinates": [[[2, 36], [4, 36], [4, 37], [2, 36]]]}')
    other.write_text("precious")
    segmenter = ConvSegmenter(make_task())
    read = {"preview": scene, "polygons": area}[name]
    for wanted, message in (
        (options(overwrite=True, **{name: read}, aoi=area if name == "polygons" else None), "would replace the input"),
        (options(**{name: other}), "exists already"),
    ):
        with pytest.raises(UsageError, match=message):
            plan_scene(segmenter, scene, tmp_path / "out.tif", wanted)
    with pytest.raises(UsageError, match="name the same file"):
        plan_scene(segmenter, scene, other, options(overwrite=True, **{name: other}))
    assert other.read_text() == "precious"


def test_side_file_that_waits_for_its_raster_is_kept(tmp_path: Path) -> None:
    scene = write_tif(tmp_path / "scene.tif", random_pixels(40, 50))
    side = tmp_path / "out.tif.aux.xml"
    side.write_text("<PAMDataset/>")
    with pytest.raises(UsageError, match=r"out\.tif\.aux\.xml: exists already"):
        predict_scene(ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options())
    assert side.read_text() == "<PAMDataset/>"
    predict_scene(ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options(overwrite=True))
    assert "CategoryNames" in side.read_text()
    (tmp_path / "out.tif").unlink()
    predict_scene(ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options())


def test_a_link_to_nowhere_counts_as_an_existing_file(tmp_path: Path, scene: Path) -> None:
    (tmp_path / "out.tif").symlink_to("nowhere.tif")
    with pytest.raises(UsageError, match="exists already"):
        plan_scene(ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options())


def test_outputs_of_one_scene_do_not_replace_another_scene_of_the_call(tmp_path: Path) -> None:
    for name in ("a", "a_rsseg"):
        write_tif(tmp_path / "in" / f"{name}.tif", random_pixels(40, 50))
    targets = choose_targets(find_scenes([str(tmp_path / "in")]), tmp_path / "in")
    network = prepare_network(ConvSegmenter(make_task()), options())
    with pytest.raises(UsageError, match="would replace the input"):
        list(predict_scenes(network, targets, options(overwrite=True)))
    with pytest.raises(UsageError, match="name the same file"):
        list(predict_scenes(network, [Target("a.tif", tmp_path / "o.tif")] * 2, options()))


def test_model_and_area_are_inputs_of_the_command_too(
    tmp_path: Path, scene: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_model(tmp_path)
    before = model.read_bytes()
    assert run(["predict", str(scene), "--model", str(model), "-o", str(model), "--overwrite"]) == 2
    assert "would replace the input" in capsys.readouterr().err
    assert model.read_bytes() == before


def test_class_raster_is_not_named_like_another_format(
    tmp_path: Path, scene: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predict", str(scene), "--model", str(write_tiny_model(tmp_path)), "-o", str(tmp_path / "out.png")]
    assert run([*command, "--dry-run"]) == run(command) == 2
    assert "--output writes a GeoTIFF" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("file_name", ["n" * 252 + ".tif", "n" * 300 + ".tif", "n" * 300 + "/out.tif"])
def test_names_that_are_too_long_are_refused_and_long_ones_work(tmp_path: Path, scene: Path, file_name: str) -> None:
    segmenter = ConvSegmenter(make_task())
    with pytest.raises(UsageError, match="cannot be a file"):
        plan_scene(segmenter, scene, tmp_path / file_name, options())
    long = tmp_path / ("ö" * 115 + ".tif")
    predict_scene(segmenter, scene, long, options(resume=True, polygons=Path(".gpkg")))
    assert {long.name, long.with_suffix(".gpkg").name} < set(files_in(tmp_path))


def test_own_outputs_are_no_scenes(tmp_path: Path, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(scene.parent)
    segmenter = ConvSegmenter(make_task())
    wanted = options(confidence=True, preview=Path("scene.png"))
    predict_scene(segmenter, "scene.tif", Path("scene_rsseg.tif"), wanted)
    assert {"scene.png", "scene_rsseg.tif", "scene_rsseg_confidence.tif"} < set(files_in(Path()))
    assert find_scenes(["."]) == ["scene.tif"]
    assert find_scenes(["*.tif", "scene_rsseg.tif"]) == ["scene.tif"]
    with pytest.raises(UsageError, match="output of an earlier prediction"):
        find_scenes(["scene_rsseg.tif"])


def test_python_call_and_command_write_the_same_files(tmp_path: Path, scene: Path) -> None:
    model = write_tiny_model(tmp_path)
    (tmp_path / "command").mkdir()
    extras = {"confidence": True, "polygons": Path(".geojson"), "min_area": 300.0, "preview": Path(".png")}
    arguments = ["--confidence", "--polygons", ".geojson", "--min-area", "300", "--preview", ".png", "--tile", "64"]
    command = ["predict", str(scene), "--model", str(model), "-o", str(tmp_path / "command" / "out.tif"), *arguments]
    assert run([*command, "--overlap", "8", "--device", "cpu"]) == 0
    wanted = options(dtype="auto", **extras)
    result = rsseg.predict(rsseg.load(model), scene, tmp_path / "call" / "out.tif", wanted)
    assert files_in(tmp_path / "call") == files_in(tmp_path / "command")
    assert [file.name for file in result.extra_outputs] == ["out_confidence.tif", "out.geojson", "out.png"]
    for name in files_in(tmp_path / "call"):
        assert (tmp_path / "call" / name).read_bytes() == (tmp_path / "command" / name).read_bytes(), name


def test_skipping_adds_missing_extras_and_replaces_none(tmp_path: Path, scene: Path) -> None:
    network = prepare_network(ConvSegmenter(make_task()), options())
    target = Target(str(scene), tmp_path / "out.tif")

    def again(**changes: object) -> str:
        (outcome,) = predict_scenes(network, [target], options(**changes), skip_existing=True)
        return f"{outcome.status} {outcome.error}"

    assert again() == "done None"
    assert again(polygons=Path(".gpkg")) == "skipped None"
    before = (tmp_path / "out.gpkg").read_bytes()
    assert again(polygons=Path(".gpkg")) == "skipped None"
    (tmp_path / "out.tif").unlink()
    assert "exists already" in again(polygons=Path(".gpkg"))
    assert (tmp_path / "out.gpkg").read_bytes() == before


def test_batch_size_and_memory_are_not_part_of_what_a_product_is_made_from(
    tmp_path: Path, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = prepare_network(ConvSegmenter(make_task()), options())
    target = Target(str(scene), tmp_path / "out.tif")
    list(predict_scenes(network, [target], options(batch_size=1)))
    monkeypatch.setattr("rsseg.scene.memory._BUFFER_BYTES", 1 << 12)
    (outcome,) = predict_scenes(network, [target], options(batch_size=3, max_memory=1 << 30), skip_existing=True)
    assert outcome.status == "skipped"


@pytest.mark.parametrize("crs", ["+proj=eqearth", "+proj=ob_tran +o_proj=longlat +o_lat_p=39 +lon_0=18 +R=6367470"])
@pytest.mark.parametrize("file_format", ["cog", "gtiff"])
def test_coordinate_system_that_geotiff_cannot_hold_is_kept(tmp_path: Path, crs: str, file_format: str) -> None:
    scene = write_tif(tmp_path / "scene.tif", random_pixels(40, 50), crs=crs)
    predict_scene(ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options(format=file_format, confidence=True))
    for name in ("out.tif", "out_confidence.tif"):
        with rasterio.open(tmp_path / name) as dataset:
            assert dataset.crs == CRS.from_string(crs)
    assert "<Category>grass</Category>" in (tmp_path / "out.tif.aux.xml").read_text()


def test_side_files_of_a_replaced_output_do_not_stay(tmp_path: Path, scene: Path) -> None:
    output = write_tif(tmp_path / "out.tif", np.zeros((1, 900, 900), np.uint8))
    with rasterio.Env(TIFF_USE_OVR=True), rasterio.open(output, "r+") as dataset:
        dataset.build_overviews([2])
    assert (tmp_path / "out.tif.ovr").exists()
    predict_scene(ConvSegmenter(make_task()), scene, output, options(overwrite=True))
    assert files_in(tmp_path) == ["in", "out.tif", "out.tif.aux.xml"]


def test_what_a_killed_process_left_is_removed_by_any_prediction_into_the_folder(tmp_path: Path, scene: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    start = f".other.tif.{socket.gethostname().partition('.')[0]}"
    for name in (f"{start}-{ended.pid}.tmp.tif", f"{start}-{ended.pid}.tmp.cog.tif.aux.xml", f"{start}-1.tmp.tif"):
        (tmp_path / name).write_text("")
    (tmp_path / f".p.gpkg.{start.removeprefix('.other.tif.')}-{ended.pid}.tmp").mkdir()
    (tmp_path / ".mine.tmp").write_text("")
    predict_scene(ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options())
    # Process 1 runs.
    assert files_in(tmp_path) == [".mine.tmp", f"{start}-1.tmp.tif", "in", "out.tif", "out.tif.aux.xml"]


def test_pictures_with_world_files_and_relative_vrts_keep_their_place(tmp_path: Path) -> None:
    segmenter, pixels = ConvSegmenter(make_task()), random_pixels(40, 50)
    picture = write_png(tmp_path / "in" / "picture.png", pixels.transpose(1, 2, 0))
    picture.with_suffix(".pgw").write_text("2\n0\n0\n-2\n500001\n4999999\n")
    (tmp_path / "elsewhere").mkdir()
    vrt = write_vrt(tmp_path / "in" / "scene.vrt", "picture.png")
    (tmp_path / "elsewhere" / "linked.vrt").symlink_to(vrt)
    (tmp_path / "link").symlink_to("in")
    predict_scene(segmenter, picture, tmp_path / "a.tif", options())
    predict_scene(segmenter, tmp_path / "elsewhere" / "linked.vrt", tmp_path / "b.tif", options())
    with rasterio.open(tmp_path / "a.tif") as dataset:
        assert dataset.transform == Affine(2, 0, 500000, 0, -2, 5000000)
    assert_array_equal(read_classes(tmp_path / "a.tif"), read_classes(tmp_path / "b.tif"))
    assert find_scenes([str(tmp_path / "link")]) == [str(tmp_path / "link" / n) for n in ("picture.png", "scene.vrt")]


def test_check_ignores_urls_and_accepts_new_files(tmp_path: Path) -> None:
    check_outputs([("--output", tmp_path / "a" / "b.tif")], ["https://host/b.tif", "/vsicurl/x"], overwrite=False)
