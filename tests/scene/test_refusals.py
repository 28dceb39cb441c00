"""Scenes and outputs that are refused, and runs that end early: nothing wrong is left behind."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rsseg.errors import DataError, MachineError, UsageError
from rsseg.scene.memory import prepare_network
from rsseg.scene.plan import prepare_scene
from rsseg.scene.predict import predict_scene
from tests.conftest import write_tif
from tests.scene.helpers import StoppingSegmenter, files_in, options, random_pixels, read_classes
from tests.toys import ConvSegmenter, make_task


def test_too_few_or_unknown_bands_are_refused_with_the_option_that_helps(tmp_path: Path) -> None:
    segmenter = ConvSegmenter(make_task())
    scene = write_tif(tmp_path / "scene.tif", random_pixels(20, 20, bands=2))
    with pytest.raises(DataError, match=r"needed are b1, b2, b3\. Add the missing bands"):
        predict_scene(segmenter, scene, tmp_path / "out.tif", options())
    with pytest.raises(DataError, match="no band 'nir'"):
        predict_scene(segmenter, scene, tmp_path / "out.tif", options(bands=("1", "2", "nir")))
    assert files_in(tmp_path) == ["scene.tif"]


def test_other_pixel_type_than_the_training_images_is_told(tmp_path: Path) -> None:
    scene = write_tif(tmp_path / "scene.tif", random_pixels(20, 20).astype(np.uint16))
    result = predict_scene(ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options())
    assert "uint16" in result.warnings[0]


def test_existing_output_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    segmenter = ConvSegmenter(make_task())
    scene = write_tif(tmp_path / "scene.tif", random_pixels(20, 20))
    output = tmp_path / "out.tif"
    output.write_text("precious")
    with pytest.raises(UsageError, match="--overwrite"):
        predict_scene(segmenter, scene, output, options())
    assert output.read_text() == "precious"
    predict_scene(segmenter, scene, output, options(overwrite=True))
    assert read_classes(output).shape == (20, 20)


def test_scene_itself_is_never_overwritten(tmp_path: Path) -> None:
    scene = write_tif(tmp_path / "scene.tif", random_pixels(20, 20))
    before = scene.read_bytes()
    with pytest.raises(UsageError, match="would replace the input"):
        predict_scene(ConvSegmenter(make_task()), scene, scene, options(overwrite=True))
    assert scene.read_bytes() == before


def test_output_that_cannot_be_written_is_refused_before_work_begins(tmp_path: Path) -> None:
    scene = write_tif(tmp_path / "scene.tif", random_pixels(20, 20))
    with pytest.raises(UsageError, match="no writable folder"):
        predict_scene(ConvSegmenter(make_task()), scene, scene / "folder" / "out.tif", options())
    with pytest.raises(UsageError, match="is a folder"):
        predict_scene(ConvSegmenter(make_task()), scene, tmp_path, options())


def test_missing_folders_are_made(tmp_path: Path) -> None:
    scene = write_tif(tmp_path / "scene.tif", random_pixels(20, 20))
    predict_scene(ConvSegmenter(make_task()), scene, tmp_path / "a" / "b" / "out.tif", options())
    assert (tmp_path / "a" / "b" / "out.tif").is_file()


def test_damaged_scene_leaves_nothing_behind(tmp_path: Path) -> None:
    scene = write_tif(tmp_path / "scene.tif", random_pixels(400, 300), compress="deflate")
    scene.write_bytes(scene.read_bytes()[: scene.stat().st_size // 2])
    with pytest.raises(DataError, match=r"scene\.tif"):
        predict_scene(ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options())
    assert files_in(tmp_path) == ["scene.tif"]


def test_undeclared_nan_deep_in_the_scene_is_an_error_that_leaves_nothing_behind(tmp_path: Path) -> None:
    pixels = random_pixels(300, 100).astype(np.float32)
    pixels[1, 250, 60] = np.nan
    scene = write_tif(tmp_path / "scene.tif", pixels)
    with pytest.raises(DataError, match="row 250, column 60"):
        predict_scene(ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options())
    assert files_in(tmp_path) == ["scene.tif"]
    predict_scene(ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options(nodata=math.nan))
    assert read_classes(tmp_path / "out.tif")[250, 60] == 255


def test_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    scene = write_tif(tmp_path / "scene.tif", random_pixels(300, 300))
    with pytest.raises(KeyboardInterrupt) as stopped:
        predict_scene(StoppingSegmenter(15, tmp_path), scene, tmp_path / "out.tif", options(batch_size=1))
    assert len(stopped.value.args) > 1, "the output was not begun when the user pressed Ctrl-C"
    assert files_in(tmp_path) == ["scene.tif"]


DISK_FULL = """
import resource, signal, sys
from pathlib import Path
from rsseg.errors import MachineError
from rsseg.scene.memory import prepare_network
from rsseg.scene.plan import prepare_scene
from rsseg.scene.predict import predict_scene
from tests.scene.helpers import options
from tests.toys import ConvSegmenter, make_task

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder, file_format = Path(sys.argv[1]), sys.argv[2]
for limit in map(int, sys.argv[3:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        predict_scene(ConvSegmenter(make_task()), folder / "scene.tif", folder / "out.tif", options(format=file_format))
    except MachineError as error:
        print("refused", error, file=sys.stderr)
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["scene.tif"], (limit, left)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file sizes cannot be limited")
def test_full_disk_is_one_sentence_and_leaves_nothing_behind(tmp_path: Path) -> None:
    scene = write_tif(tmp_path / "scene.tif", random_pixels(600, 600))
    predict_scene(ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options(format="gtiff"))
    size = (tmp_path / "out.tif").stat().st_size
    for path in tmp_path.glob("out*"):
        path.unlink()
    # At once, half way, in the directory at the end of the file, and at the last byte, which GDAL does not report.
    limits = [1000, size // 2, size - 300, size - 1]
    result = subprocess.run(
        [sys.executable, "-c", DISK_FULL, str(tmp_path), "gtiff", *map(str, limits)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("refused") == len(limits)


def test_cog_is_refused_while_the_disk_has_too_little_room_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = write_tif(tmp_path / "scene.tif", random_pixels(100, 100))
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("rsseg.scene.writer.shutil.disk_usage", lambda path: usage)
    with pytest.raises(MachineError, match="--format gtiff"):
        predict_scene(ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options())
    assert files_in(tmp_path) == ["scene.tif"]


def test_applicability_without_a_model_file_is_refused_instead_of_written_as_zeros(tmp_path: Path) -> None:
    scene = write_tif(tmp_path / "scene.tif", random_pixels(20, 20))
    with pytest.raises(UsageError, match="applicability needs the training images of a model file"):
        predict_scene(ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options(applicability=True))
    assert files_in(tmp_path) == ["scene.tif"]


def test_scene_that_is_only_read_needs_no_folder_to_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = write_tif(tmp_path / "scene.tif", random_pixels(20, 20))
    monkeypatch.setattr("os.access", lambda *_: False)
    prepared = prepare_network(ConvSegmenter(make_task()), options())
    assert prepare_scene(prepared, scene, None, options()).products == ()
    with pytest.raises(UsageError, match="no writable folder"):
        prepare_scene(prepared, scene, tmp_path / "out.tif", options())
