"""Several processes that share out a scene."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from numpy.testing import assert_array_equal

from rsseg.errors import MachineError, UsageError
from rsseg.methods.base import Segmenter
from rsseg.scene.memory import prepare_network
from rsseg.scene.options import SceneResult
from rsseg.scene.plan import prepare_scene
from rsseg.scene.predict import predict_prepared, predict_scene
from rsseg.scene.share import Share
from tests.conftest import write_tif
from tests.scene.helpers import (
    StoppingSegmenter,
    files_in,
    options,
    random_pixels,
    read_classes,
    threads,
    write_tiny_model,
)
from tests.toys import ConvSegmenter, make_task

ROOT = Path(__file__).parents[2]


def predict(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    options = ["--model", "model.safetensors", "--tile", "64", "--overlap", "16", "--device", "cpu"]
    return subprocess.run(
        [sys.executable, "-m", "rsseg", "predict", *arguments, *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path)
    # The second has one row of tiles, so that one of the processes has nothing to do.
    write_tif(tmp_path / "in" / "a.tif", random_pixels(330, 200))
    write_tif(tmp_path / "in" / "b.tif", random_pixels(60, 100))
    return tmp_path


def test_two_processes_write_what_one_writes(folder: Path) -> None:
    results = {}
    for name, gpus in (("one", "1"), ("two", "2")):
        extra = ["--gpus", gpus, "--blend", "hann", "--confidence", "--polygons", ".geojson", "--json"]
        done = predict(folder, "in", "-o", name, *extra)
        assert done.returncode == 0, done.stderr
        assert "error" not in done.stderr
        results[name] = json.loads(done.stdout)
    assert files_in(folder / "one") == files_in(folder / "two")
    for name in files_in(folder / "one"):
        if name.endswith((".tif", ".geojson")):
            assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes(), name
    for one, two in zip(results["one"], results["two"], strict=True):
        assert one["status"] == two["status"] == "done"
        assert one["result"]["areas"] == two["result"]["areas"]


def test_what_fails_in_one_process_ends_all_with_its_exit_code(folder: Path) -> None:
    scene = folder / "in" / "a.tif"
    # Blocks of the last rows are cut off: only the second process reads them.
    scene.write_bytes(scene.read_bytes()[:-20000])
    done = predict(folder, "in/a.tif", "-o", "out.tif", "--gpus", "2")
    assert done.returncode == 4, done.stderr
    assert done.stderr.count("error:") == 1
    assert "a.tif" in done.stderr.split("error:")[1]
    assert files_in(folder) == ["in", "model.safetensors"]
    batch = predict(folder, "in", "-o", "out", "--gpus", "2")
    assert batch.returncode == 7, batch.stderr
    assert "1 of 2 scenes failed" in batch.stderr
    assert [name for name in files_in(folder / "out") if not name.startswith("b_")] == [
        "rsseg_journal.jsonl",
        "rsseg_quarantine.txt",
    ]


def part(tmp_path: Path, number: int, start: str, segmenter: Segmenter, **choices: Any) -> SceneResult | None:
    """What one of two processes does for a scene."""
    share, output = Share(number, 2, start), tmp_path / "out.tif"
    with share.of_scene(output, resume=choices.get("resume", False)):
        ready = prepare_network(segmenter, options(**choices))
        return predict_prepared(prepare_scene(ready, tmp_path / "scene.tif", output, options(**choices)), share=share)
    return None


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    pixels = random_pixels(330, 200)
    pixels[:, 40:200, :90] = 0
    path = write_tif(tmp_path / "scene.tif", pixels, nodata=0)
    predict_scene(ConvSegmenter(make_task()), path, tmp_path / "one.tif", options())
    return tmp_path


@pytest.mark.parametrize("blend", ["crop", "mean"])
def test_parts_are_put_together_in_panels_too(scene: Path, monkeypatch: pytest.MonkeyPatch, blend: str) -> None:
    predict_scene(
        ConvSegmenter(make_task()), scene / "scene.tif", scene / "one.tif", options(blend=blend, overwrite=True)
    )
    monkeypatch.setattr("rsseg.scene.memory._BUFFER_BYTES", 1 << 17)
    assert part(scene, 1, "a", ConvSegmenter(make_task()), blend=blend) is None
    result = part(scene, 0, "a", ConvSegmenter(make_task()), blend=blend)
    assert result is not None
    assert_array_equal(read_classes(scene / "out.tif"), read_classes(scene / "one.tif"))
    assert files_in(scene) == ["one.tif", "one.tif.aux.xml", "out.tif", "out.tif.aux.xml", "scene.tif"]


@pytest.mark.parametrize("stopped", [0, 1])
@threads(1)  # one batch at a time, so that rows are finished one after the other
def test_resume_takes_up_every_part(scene: Path, stopped: int) -> None:
    # Three forwards belong to the plan, and then each of the three rows of a part is one.
    one_row, two_rows, all_rows = (StoppingSegmenter(3 + rows) for rows in (1, 2, 3))
    if stopped == 0:
        part(scene, 1, "a", all_rows, resume=True)
    with pytest.raises(KeyboardInterrupt):
        part(scene, stopped, "a", one_row, resume=True)
    assert f".out.tif.{stopped + 1}-of-2.resume" in files_in(scene)
    part(scene, 1, "b", two_rows, resume=True)
    result = part(scene, 0, "b", all_rows, resume=True)
    assert result is not None
    assert (result.resumed > 0) == (stopped == 0)
    assert_array_equal(read_classes(scene / "out.tif"), read_classes(scene / "one.tif"))
    assert not [name for name in files_in(scene) if name.startswith(".")]


def test_failure_of_another_process_is_raised_by_the_main_one(scene: Path) -> None:
    assert part(scene, 1, "a", ConvSegmenter(make_task()), max_memory=1000) is None
    with pytest.raises(MachineError, match="--max-memory"):
        part(scene, 0, "a", ConvSegmenter(make_task()))
    assert files_in(scene) == ["one.tif", "one.tif.aux.xml", "scene.tif"]


def test_parts_of_other_settings_are_refused(scene: Path) -> None:
    part(scene, 1, "a", ConvSegmenter(make_task()), tile=64)
    with pytest.raises(MachineError, match="--tile"):
        part(scene, 0, "a", ConvSegmenter(make_task()), tile=96)
    assert files_in(scene) == ["one.tif", "one.tif.aux.xml", "scene.tif"]


def test_what_an_earlier_start_left_is_not_taken(scene: Path) -> None:
    part(scene, 1, "a", ConvSegmenter(make_task()))
    assert ".out.tif.2-of-2.a.rows" in files_in(scene)
    part(scene, 1, "b", ConvSegmenter(make_task(), kernel=5))
    assert [name for name in files_in(scene) if name.startswith(".")] == [".out.tif.2-of-2.b.rows"]


@pytest.mark.parametrize(("total", "count"), [(7, 3), (1, 2), (5, 5), (0, 2)])
def test_parts_cover_every_row_once(total: int, count: int) -> None:
    rows = [row for number in range(count) for row in range(*vars(Share(number, count).rows(total)).values())]
    assert rows == list(range(total))


def test_processes_on_several_machines_are_refused() -> None:
    variables = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}
    with pytest.raises(UsageError, match="--part"):
        Share.from_environment(variables)
