"""Calls and files that cannot work end with their exit code and one sentence, and never as a bug."""

import json
import os
import re
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from rsseg.cli import run
from rsseg.errors import DataError, MachineError, RssegError
from rsseg.methods.base import TileHint
from rsseg.raster import Raster
from rsseg.scene.batch import Target, find_scenes, predict_scenes
from rsseg.scene.memory import prepare_network
from rsseg.scene.predict import predict_scene
from rsseg.text import read_lines
from rsseg.vector.aoi import read_region
from tests.conftest import write_tif
from tests.scene.helpers import (
    files_in,
    options,
    plan_scene,
    random_pixels,
    threads,
    write_tiny_model,
)
from tests.toys import ConvSegmenter, make_task


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_tif(tmp_path / "scene.tif", random_pixels(40, 50))
    write_tiny_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def predict(*arguments: str) -> int:
    return run(["predict", *arguments, "--model", "model.safetensors", "--device", "cpu"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--tile", "1"], 2, "--tile 1"),
        (["--tile", str(10**20)], 2, "--tile 1000"),
        (["--tile", "64", "--overlap", "63"], 2, "4096 times"),
        (["--max-memory", "1e999"], 2, "--max-memory 1e999"),
        (["--min-area", "inf"], 2, "--min-area inf"),
        (["--simplify", "inf"], 2, "--simplify inf"),
        (["--bands", "1,2,"], 4, "no band ''"),
        (["--polygons", ""], 2, ".gpkg"),
        (["--preview", "out.jpg"], 2, ".png"),
        (["--aoi", "n" * 300 + ".gpkg"], 4, "no such file"),
        (["--aoi", "scene.tif"], 4, "not a readable vector file"),
        (["--part", "1/0"], 2, "--part 1/0"),
    ],
)
def test_options_that_cannot_be_met_are_named(
    folder: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict("scene.tif", "-o", "out.tif", *arguments) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error:") == 1
    assert files_in(folder) == ["model.safetensors", "scene.tif"]


@pytest.mark.parametrize("device", ["mps", "meta", "cuda:99999999999", "cpu:1", ""])
def test_devices_that_networks_cannot_use_are_refused(folder: Path, device: str) -> None:
    assert run(["predict", "scene.tif", "-o", "out.tif", "--model", "model.safetensors", "--device", device]) == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["pipe.tif", "pipe.txt", "pipe.vrt"])
def test_a_pipe_is_refused_at_once(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(folder / name)
    assert predict(name, "-o", "out.tif") == 4
    assert f"{name}: a pipe" in capsys.readouterr().err
    assert find_scenes(["."]) == ["scene.tif"]


@pytest.mark.parametrize("name", ["n" * 300 + ".tif", "n" * 300 + ".txt", "n" * 300 + "/a.tif", "missing.tif"])
def test_scenes_whose_names_are_no_files_are_data_errors(folder: Path, name: str) -> None:
    assert predict(name, "-o", "out.tif") == 4


def test_lists_of_windows_programs_are_read_or_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeff# scenes\r\nZürich.tif\r\n\r\n".encode())
    assert read_lines(path) == ["Zürich.tif"]
    path.write_bytes("Zürich.tif\n".encode("utf-16"))
    assert read_lines(path) == ["Zürich.tif"]
    path.write_bytes("Zürich.tif\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"list\.txt, line 1: .*UTF-8"):
        find_scenes([str(path)])


def test_folders_may_have_brackets_in_their_names(tmp_path: Path) -> None:
    for name in ("a[1]/x.tif", "a[1]/y.tif", "a1/z.tif", "b[1].tif", "b1.tif"):
        write_tif(tmp_path / name, random_pixels(4, 4))
    found = [str(tmp_path / "a[1]" / name) for name in ("x.tif", "y.tif")]
    assert find_scenes([str(tmp_path / "a[1]" / "*.tif")]) == found
    assert find_scenes([str(tmp_path / "a[1]")]) == found
    assert find_scenes([str(tmp_path / "b[1].tif")]) == [str(tmp_path / "b[1].tif")]
    assert find_scenes([str(tmp_path / "b[0-9].tif")]) == [str(tmp_path / "b1.tif")]


def test_error_of_a_scene_is_printed_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "odd.tif").write_text("nonsense")
    assert predict("odd.tif", "scene.tif", "-o", "out") == 7
    error = capsys.readouterr().err
    assert error.count("not an image that can be read") == 1
    assert "1 of 2 scenes failed: odd.tif" in error
    assert predict("odd.tif", "-o", "out.tif") == 4
    assert capsys.readouterr().err.count("odd.tif") == 2  # the name, and GDAL's own words


class FullSegmenter(ConvSegmenter):
    """Fails like a GPU whose memory is full, from the second tile of 64 pixels on."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[-1] == 64 and len(images) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(images)


def test_a_full_gpu_is_a_limit_of_the_machine(tmp_path: Path) -> None:
    scene = write_tif(tmp_path / "scene.tif", random_pixels(200, 200))
    with pytest.raises(MachineError, match="--batch-size"):
        predict_scene(FullSegmenter(make_task()), scene, tmp_path / "out.tif", options(batch_size=1))
    assert files_in(tmp_path) == ["scene.tif"]


@threads(1)
def test_less_memory_than_the_usual_tile_needs_is_a_warning(tmp_path: Path) -> None:
    segmenter = ConvSegmenter(make_task(), kernel=5, tile=TileHint(size=512, overlap=64, flexible=True))
    scene = write_tif(tmp_path / "scene.tif", random_pixels(600, 600))
    one = options(tile=None, overlap=None, batch_size=1)
    usual = plan_scene(segmenter, scene, tmp_path / "out.tif", one)
    less = one.model_copy(update={"max_memory": 102 << 20})
    tight = plan_scene(segmenter, scene, tmp_path / "out.tif", less)
    assert usual.tile == (332, 332)
    assert not usual.warnings
    said = re.search(r"at most (\d+) instead of 512", tight.warnings[0])
    assert said is not None
    assert max(tight.tile) <= int(said[1]) < 332
    assert "warning: --max-memory" in tight.text()


@pytest.mark.parametrize(("names", "warned"), [(("B2", "B3", "B4"), True), (("b1", "b2", "b3"), False), ((), False)])
def test_bands_that_are_not_matched_by_their_names_are_told(
    tmp_path: Path, names: tuple[str, ...], warned: bool
) -> None:
    scene = write_tif(tmp_path / "scene.tif", random_pixels(40, 50), descriptions=names)
    plan = plan_scene(ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options())
    assert any("--bands" in warning for warning in plan.warnings) == warned
    told = plan_scene(ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options(bands=(" 3", "2 ", "1")))
    assert not told.warnings


def test_scene_of_absurd_size_is_refused_at_once(tmp_path: Path) -> None:
    band = '<VRTRasterBand dataType="Byte" band="{}"/>'
    bands = "".join(band.format(number) for number in (1, 2, 3))
    (tmp_path / "huge.vrt").write_text(
        f'<VRTDataset rasterXSize="2000000000" rasterYSize="2000000000">{bands}</VRTDataset>'
    )
    with pytest.raises(DataError, match=r"huge\.vrt: 2000000000 x 2000000000 pixels are more than"):
        plan_scene(ConvSegmenter(make_task()), tmp_path / "huge.vrt", tmp_path / "out.tif", options())


def test_message_about_many_bands_is_short(tmp_path: Path) -> None:
    scene = write_tif(tmp_path / "many.tif", np.zeros((200, 4, 5), np.uint8))
    with pytest.raises(DataError, match=r"200 band\(s\) \(band_1, .*, band_16, \.\.\.\), needed") as caught:
        plan_scene(ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options())
    assert len(str(caught.value)) < 500


def test_palette_picture_is_refused_with_what_helps(tmp_path: Path) -> None:
    Image.fromarray(random_pixels(40, 50).transpose(1, 2, 0)).quantize(32).save(tmp_path / "palette.png")
    with pytest.raises(DataError, match="-expand rgb"):
        plan_scene(ConvSegmenter(make_task()), tmp_path / "palette.png", tmp_path / "out.tif", options())


def test_scene_in_an_archive_that_changed_is_another_scene(tmp_path: Path) -> None:
    network = prepare_network(ConvSegmenter(make_task()), options())
    target = Target(f"/vsizip/{tmp_path}/a.zip/s.tif", tmp_path / "out.tif")
    statuses = []
    for divisor in (1, 1, 2):
        write_tif(tmp_path / "s.tif", random_pixels(40, 50) // divisor)
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr(zipfile.ZipInfo("s.tif"), (tmp_path / "s.tif").read_bytes())
        statuses += [o.status for o in predict_scenes(network, [target], options(), skip_existing=True)]
    assert statuses == ["done", "skipped", "failed"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["type", "features", "geometry", "coordinates", "crs", "properties"]), inner)
    ),
    max_leaves=12,
)
RING = st.lists(st.lists(st.floats(-400, 400) | st.none() | st.text(max_size=2), max_size=4), max_size=6)
GEOMETRY = st.fixed_dictionaries(
    {
        "type": st.sampled_from(["Polygon", "MultiPolygon", "GeometryCollection", "Point", "polygon"]),
        "coordinates": st.lists(RING, max_size=3) | JSON,
    }
)


@given(content=JSON.map(json.dumps) | GEOMETRY.map(json.dumps) | st.text(max_size=40))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_area_is_read_or_refused(tmp_path: Path, content: str) -> None:
    scene = tmp_path / "scene.tif"
    if not scene.exists():
        write_tif(scene, random_pixels(4, 5))
    (tmp_path / "area.geojson").write_bytes(content.encode("utf-8", "surrogatepass"))
    with Raster(scene) as raster, suppress(DataError):
        read_region(tmp_path / "area.geojson", raster.info)


@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_list_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    with suppress(RssegError):
        find_scenes([str(tmp_path / "list.txt")])
