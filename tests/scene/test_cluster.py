"""Batches on a Ray cluster of three nodes in this machine, with workers and nodes that are killed."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsseg.cli import run
from rsseg.scene.batch import JOURNAL, QUARANTINE, Target
from rsseg.scene.cluster import _Worker
from rsseg.scene.options import Outcome
from tests.conftest import write_tif
from tests.scene.helpers import write_tiny_model

pytest.importorskip("ray")
ROOT = Path(__file__).parents[2]
STORE = 80 << 20
OPTIONS = ["--tile", "64", "--overlap", "16", "--device", "cpu", "--format", "gtiff", "--ray-cpus", "1"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes of one core; the first one is the head."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False},
        )
        for _ in range(2):
            made.add_node(num_cpus=1, object_store_memory=STORE)
        yield made
        made.shutdown()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_tiny_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_scenes(folder: Path, count: int, side: int) -> None:
    for number in range(count):
        rng = np.random.default_rng(number)
        write_tif(folder / "in" / f"{number:02}.tif", rng.integers(1, 256, (3, side, side)).astype(np.uint8))


def arguments(output: str, *more: str) -> list[str]:
    return ["predict", "in", "--model", "model.safetensors", "-o", output, *OPTIONS, *more]


def products(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name.endswith((".tif", ".xml", ".geojson"))
    }


def workers() -> list[int]:
    """Processes of workers that are predicting or starting."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::_Worker"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def disturbed(cluster: Any, folder: Path, kills: int, seed: int) -> subprocess.CompletedProcess[str]:
    """Predict on the cluster while workers and one node are killed."""
    choice = random.Random(seed)
    command = [sys.executable, "-m", "rsseg", *arguments("many", "--polygons", ".geojson", "--tries", "50")]
    with subprocess.Popen(
        [*command, "--ray", cluster.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    ) as process:
        done = 0
        while done < kills and process.poll() is None:
            if done == kills // 2:
                cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
                cluster.add_node(num_cpus=1, object_store_memory=STORE)
                done += 1
            elif running := workers():
                time.sleep(choice.uniform(0, 1.5))
                try:
                    os.kill(choice.choice(running), signal.SIGKILL)
                except ProcessLookupError:
                    continue
                done += 1
            time.sleep(0.2)
        output, _ = process.communicate(timeout=1500)
        assert done == kills, f"the batch ended after {done} kills: {output}"
    return subprocess.CompletedProcess(command, process.returncode, output, "")


@pytest.mark.parametrize(
    ("kills", "scenes", "side"),
    [pytest.param(2, 4, 400, marks=pytest.mark.slow), pytest.param(20, 40, 1200, marks=pytest.mark.slow)],
)
def test_killed_workers_and_a_killed_node_leave_no_trace_in_the_products(
    cluster: Any, folder: Path, kills: int, scenes: int, side: int
) -> None:
    write_scenes(folder, scenes, side)
    assert run(arguments("one", "--polygons", ".geojson")) == 0
    done = disturbed(cluster, folder, kills, seed=kills)
    assert done.returncode == 0, done.stdout
    assert len(products(folder / "one")) == 3 * scenes
    assert products(folder / "many") == products(folder / "one")
    lines = [json.loads(line) for line in (folder / "many" / JOURNAL).read_text().splitlines()]
    assert sorted(line["scene"] for line in lines) == [f"in/{number:02}.tif" for number in range(scenes)]


@pytest.mark.slow
def test_second_call_does_nothing_again_and_a_bad_scene_is_quarantined(cluster: Any, folder: Path) -> None:
    write_scenes(folder, 3, 100)
    (folder / "in" / "01.tif").write_bytes(b"nonsense")
    there = ["--ray", cluster.address, "--skip-existing"]
    assert run(arguments("many", *there)) == 7
    quarantine = (folder / "many" / QUARANTINE).read_text().splitlines()
    assert quarantine[0].startswith("# in/01.tif: not an image")
    assert quarantine[1:] == [str(folder / "in" / "01.tif")]
    before = {path: path.stat().st_mtime_ns for path in (folder / "many").glob("*.tif")}
    assert len(before) == 2
    write_scenes(folder, 3, 100)
    assert run(arguments("many", *there)) == 0
    assert not (folder / "many" / QUARANTINE).exists()
    assert len(products(folder / "many")) == 6
    assert {path: path.stat().st_mtime_ns for path in before} == before
    statuses = [json.loads(line)["status"] for line in (folder / "many" / JOURNAL).read_text().splitlines()]
    assert sorted(statuses) == ["done"] * 3 + ["failed"] + ["skipped"] * 2


class Crashing(_Worker):
    """Dies with every scene whose name ends in 1."""

    def predict(self, target: Target, *, again: bool) -> Outcome:
        if target.scene.endswith("1.tif"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().predict(target, again=again)


@pytest.mark.slow
def test_scene_that_kills_every_worker_is_quarantined_and_the_rest_goes_on(
    cluster: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scenes(folder, 3, 100)
    monkeypatch.setattr("rsseg.scene.cluster._Worker", Crashing)
    assert run(arguments("many", "--ray", cluster.address, "--tries", "2")) == 7
    assert "in/01.tif: lost its worker 2 times" in capsys.readouterr().err
    assert sorted(path.name for path in (folder / "many").glob("*.tif")) == ["00_rsseg.tif", "02_rsseg.tif"]
    assert "lost its worker" in (folder / "many" / QUARANTINE).read_text()


@pytest.mark.slow
def test_worker_with_another_version_is_named(
    cluster: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scenes(folder, 2, 100)
    monkeypatch.setattr("rsseg.scene.cluster.rsseg.__version__", "9.9")  # of the driver only
    assert run(arguments("many", "--ray", cluster.address)) == 6
    error = capsys.readouterr().err
    assert f"worker on {os.uname().nodename}: rsseg " in error
    assert "instead of 9.9" in error


@pytest.mark.parametrize(
    ("address", "code", "message"),
    [("127.0.0.1:1", 6, "not reached in 0.0 s"), ("ray://x:1", 2, "give HOST:PORT"), ("nowhere", 2, "give HOST:PORT")],
)
def test_dead_or_invalid_address_is_named(
    folder: Path, address: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scenes(folder, 2, 100)
    assert run(arguments("many", "--ray", address)) == code
    assert message in capsys.readouterr().err
