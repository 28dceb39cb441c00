"""What the scheduling of a batch on Ray costs, and what a second worker gains.

    python -m benchmarks.cluster --scenes 10000
    python -m benchmarks.cluster --model model.safetensors --scenes 40 --side 2000

Without a model: scenes that take no time, on the workers of this machine. Prints tasks per second, processor time of
the driver per task, and its memory after the first tenth and at the end.

With a model: scenes of noise, by one worker of one core, then by two. Prints the ratio of the times from the first to
the last outcome, and the share of them in which workers do not compute.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import from_origin

from rsseg.checkpoint import read_header
from rsseg.inference.machine import resident_bytes
from rsseg.scene import cluster
from rsseg.scene.batch import SceneJob, Target
from rsseg.scene.options import Outcome, SceneOptions


class Idle(cluster._Worker):
    """Answers at once."""

    def check(self) -> dict[str, str]:
        return {"host": "here"}

    def predict(self, target: Target, *, again: bool) -> Outcome:  # noqa: ARG002
        return Outcome(scene=target.scene, output=target.output, status="done", seconds=0.0)


def compare_workers(model: Path, scenes: int, side: int) -> None:
    """One and two workers on the same scenes."""
    from ray.cluster_utils import Cluster as Nodes

    with tempfile.TemporaryDirectory() as folder:
        count = len(read_header(model).task.bands)
        place = {"crs": "EPSG:32631", "transform": from_origin(500000, 5400000, 1, 1)}
        for number in range(scenes):
            pixels = np.random.default_rng(number).integers(0, 255, (count, side, side), np.uint8)
            with rasterio.open(
                Path(folder, f"{number}.tif"), "w", driver="GTiff", count=count, height=side, width=side,
                dtype=np.uint8, tiled=True, **place,
            ) as file:  # fmt: skip
                file.write(pixels)
        times = []
        for workers in (1, 2):
            targets = [Target(f"{folder}/{n}.tif", Path(folder, f"{workers}-{n}.tif")) for n in range(scenes)]
            nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": workers, "include_dashboard": False})
            try:
                job = SceneJob(SceneOptions(device="cpu"))
                execute = cluster.on_ray(cluster.Cluster(nodes.address), [model], job)
                began, busy = time.perf_counter(), 0.0
                for number, outcome in enumerate(execute(targets)):
                    assert outcome.status == "done", outcome.error
                    if number < workers:  # the workers have started
                        began = time.perf_counter()
                    else:
                        busy += outcome.seconds
                times.append((time.perf_counter() - began) / (scenes - workers))
            finally:
                nodes.shutdown()
            idle = 1 - busy / ((scenes - workers) * times[-1] * workers)
            print(f"{workers} worker(s): {times[-1]:.2f} s a scene, {100 * idle:.1f} % not computing", flush=True)
    print(f"ratio {times[0] / times[1]:.2f} (goal: at least 1.7, on two idle cores)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=10_000)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--side", type=int, default=2000)
    chosen = parser.parse_args()
    if chosen.model is not None:
        compare_workers(chosen.model, chosen.scenes, chosen.side)
        return
    cluster._Worker = Idle  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        model.write_bytes(b"none")
        targets = [Target(f"{number}.tif", Path(f"{number}_rsseg.tif")) for number in range(chosen.scenes)]
        execute = cluster.on_ray(cluster.Cluster("local"), [model], SceneJob(SceneOptions()))
        outcomes = execute(targets)
        next(outcomes)
        began, used, held = time.perf_counter(), time.process_time(), 0
        for number, _ in enumerate(outcomes, start=2):
            if number == chosen.scenes // 10:
                held = resident_bytes()
        wall, used = time.perf_counter() - began, time.process_time() - used
    print(
        f"{chosen.scenes / wall:.0f} tasks/s, {1e3 * used / chosen.scenes:.2f} ms of processor time of the driver each"
    )
    print(f"driver: {held / 2**20:.1f} MB after a tenth, {resident_bytes() / 2**20:.1f} MB at the end")


if __name__ == "__main__":
    main()
