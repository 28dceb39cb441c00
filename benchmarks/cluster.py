"""What the scheduling of a batch on Ray costs: scenes that take no time, on the workers of this machine.

    python -m benchmarks.cluster --scenes 10000

Prints tasks per second, processor time of the driver per task, and its memory after the first tenth and at the end.
"""

import argparse
import tempfile
import time
from pathlib import Path

from rsseg.inference.machine import resident_bytes
from rsseg.scene import cluster
from rsseg.scene.batch import Outcome, SceneJob, Target
from rsseg.scene.options import SceneOptions


class Idle(cluster._Worker):
    """Answers at once."""

    def check(self) -> dict[str, str]:
        return {"host": "here"}

    def predict(self, target: Target, *, again: bool) -> Outcome:  # noqa: ARG002
        return Outcome(scene=target.scene, output=target.output, status="done", seconds=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=10_000)
    chosen = parser.parse_args()
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
