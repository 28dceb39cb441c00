"""Training steps per second of two processes with half the batch each, against one with all of it.

    python benchmarks/processes.py [--backbone tf_efficientnet_lite0] [--crop 192] [--steps 100] [--rounds 3]

`rsseg train --gpus 2` and `--gpus 1` on the built-in dataset, in turn: one thread per process, gloo, random weights.
The rate is the median of those that the run logs, the first one excluded. Needs two idle cores.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def rate(folder: Path, processes: int, options: argparse.Namespace) -> float:
    """Images per second of one training."""
    output = folder / "runs"
    settings = {
        "backbone.name": options.backbone, "data.augment.crop_size": options.crop, "trainer.workers": 0,
        "trainer.log_every": 10, "trainer.eval_every": options.steps,
    }  # fmt: skip
    words = ["train", "--recipe", "demo-supervised", "--data", str(folder / "demo"), "--output", str(output)]
    words += ["--steps", str(options.steps), "--gpus", str(processes)]
    words += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "rsseg", *words]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    with (output / "latest" / "steps.csv").open(encoding="utf-8") as file:
        rates = [float(row["images_per_s"]) for row in csv.DictReader(file)]
    return statistics.median(rates[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--crop", type=int, default=192)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare = ["dataset", "prepare", "demo", "--out", str(folder / "demo")]
        subprocess.run([sys.executable, "-m", "rsseg", *prepare], check=True, stdout=subprocess.DEVNULL)
        ratios = []
        for _ in range(options.rounds):
            one, two = (rate(folder, processes, options) for processes in (1, 2))
            ratios.append(two / one)
            print(f"one process {one:.1f} images/s, two {two:.1f}: {ratios[-1]:.2f}x", flush=True)
    print(f"median {statistics.median(ratios):.2f}x (goal: at least 1.5x)")


if __name__ == "__main__":
    main()
