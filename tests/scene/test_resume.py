"""Runs that end before their time: killed, interrupted, and continued."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from numpy.testing import assert_array_equal

from rsseg.scene.predict import predict_scene
from rsseg.scene.share import ALONE, LoggedStrip, StripLog
from tests.conftest import write_tif
from tests.scene.helpers import StoppingSegmenter, files_in, options, random_pixels
from tests.toys import ConvSegmenter, make_task


@pytest.mark.parametrize("blend", ["crop", "hann"])
@pytest.mark.parametrize("panels", [1, 3])
def test_interrupted_scene_goes_on_and_gives_what_an_unbroken_run_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blend: str, panels: int
) -> None:
    if panels > 1:
        monkeypatch.setattr("rsseg.scene.memory._BUFFER_BYTES", 1 << 18)
    # The class is part of what a product is made from, so one class computes all runs.
    scene = write_tif(tmp_path / "scene.tif", random_pixels(330, 420))
    wanted = options(blend=blend, batch_size=1, confidence=True, probabilities="float16", resume=True)
    predict_scene(StoppingSegmenter(10**6), scene, tmp_path / "whole.tif", wanted)
    with pytest.raises(KeyboardInterrupt):
        predict_scene(StoppingSegmenter(25), scene, tmp_path / "out.tif", wanted)
    assert not (tmp_path / "out.tif").exists()
    assert ALONE.log(tmp_path / "out.tif").exists()
    result = predict_scene(StoppingSegmenter(10**6), scene, tmp_path / "out.tif", wanted)
    assert 0.1 < result.resumed < 1
    assert (tmp_path / "out.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()
    for name in ("_confidence", "_probabilities"):
        with rasterio.open(tmp_path / f"out{name}.tif") as ours, rasterio.open(tmp_path / f"whole{name}.tif") as whole:
            assert_array_equal(ours.read(), whole.read())
            assert ours.tags() == whole.tags()
    assert not [name for name in files_in(tmp_path) if name.startswith(".")]


def test_log_of_another_model_is_not_continued(tmp_path: Path) -> None:
    scene = write_tif(tmp_path / "scene.tif", random_pixels(330, 100))
    with pytest.raises(KeyboardInterrupt):
        predict_scene(StoppingSegmenter(8), scene, tmp_path / "out.tif", options(batch_size=1, resume=True))
    other = StoppingSegmenter(10**6)
    with torch.no_grad():
        other.conv.weight.neg_()
    result = predict_scene(other, scene, tmp_path / "out.tif", options(batch_size=1, resume=True))
    assert result.resumed == 0


def test_incomplete_end_of_a_log_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log"
    pixels = np.arange(12, dtype=np.uint8).reshape(1, 3, 4)
    with StripLog(path, "a") as log:
        for row in range(3):
            log.append(LoggedStrip(0, row, [pixels + row, (pixels / 7).astype(np.float16)]))
    complete = path.read_bytes()
    for cut in (1, 20, 60):
        path.write_bytes(complete[:-cut])
        with StripLog(path, "a") as log:
            strips = list(log.strips())
            log.append(LoggedStrip(0, 2, [pixels]))
            assert [s.row for s in log.strips()] == [0, 1, 2]
        assert [s.row for s in strips] == [0, 1]
        assert_array_equal(strips[1].arrays[0], pixels + 1)
        assert_array_equal(strips[1].arrays[1], (pixels / 7).astype(np.float16))
    with StripLog(path, "b") as log:
        assert not list(log.strips())


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from rsseg.scene.predict import predict_scene
from tests.scene.helpers import options, read_classes
from tests.toys import ConvSegmenter, make_task

folder, seed, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
wanted = options(batch_size=1, resume=True, overwrite=True)
expected = (folder / "whole.tif").read_bytes()
output, chance = folder / "out.tif", random.Random(seed)

def child():
    # A child of its own per run: it starts in milliseconds, as everything is imported.
    pid = os.fork()
    if pid:
        return pid
    predict_scene(ConvSegmenter(make_task()), folder / "scene.tif", output, wanted)
    os._exit(0)

start = time.monotonic()
os.waitpid(child(), 0)
whole = time.monotonic() - start
assert output.read_bytes() == expected
killed = 0
for _ in range(kills):
    output.unlink(missing_ok=True)
    pid = child()
    time.sleep(chance.uniform(0, 1.1 * whole))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    killed += os.WIFSIGNALED(status)
    if output.exists():
        assert output.read_bytes() == expected, "incomplete file under the final name"
    if not chance.randrange(3):
        os.waitpid(child(), 0)
        assert output.read_bytes() == expected, "a rerun gives something else"
        left = sorted(p.name for p in folder.iterdir())
        assert left == ["out.tif", "out.tif.aux.xml", "scene.tif", "whole.tif", "whole.tif.aux.xml"], left
print(killed)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_at_random_moments_leaves_no_wrong_file_and_a_rerun_completes(tmp_path: Path, kills: int) -> None:
    scene = write_tif(tmp_path / "scene.tif", random_pixels(400, 400))
    before = scene.read_bytes()
    predict_scene(ConvSegmenter(make_task()), scene, tmp_path / "whole.tif", options(batch_size=1))
    result = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), "1", str(kills)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= kills // 3, "too few runs were killed while they worked"
    assert scene.read_bytes() == before
