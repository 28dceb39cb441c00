"""Memory and processor time of tuning DINOv2-S: full, low-rank or frozen, also checkpointed.

    python -m benchmarks.tune_memory [--decoder dpt]

Each mode runs three steps on random crops of 252 pixels in batches of 8, float32, in a process of its own. Memory is
the peak above that of the process with the network built; time is the fastest step's processor time. Blocks of 1 MB and
more are returned when they are freed: in glibc's heap, fragments that no tensor uses would count as well.
"""

import argparse
import os
import resource
import subprocess
import sys
import time

import torch

from benchmarks.scenes import make_task
from rsseg.data.streams import Samples
from rsseg.methods.registry import method_for
from rsseg.recipe import recipe_from_dict
from rsseg.training.step import build_optimizers

SIDE, BATCH, STEPS = 252, 8, 3
ATTENTION = ["qkv", "proj"]
MODES = {
    "full": ("full", False, ATTENTION),
    "lora, all linear layers": ("lora", False, ["qkv", "proj", "fc1", "fc2"]),
    "lora, qkv and proj": ("lora", False, ATTENTION),
    "full, checkpointed": ("full", True, ATTENTION),
    "lora, all, checkpointed": ("lora", True, ["qkv", "proj", "fc1", "fc2"]),
    "frozen": ("frozen", False, ATTENTION),
}


def measure(mode: str, decoder: str) -> None:
    """Print megabytes and seconds of a mode."""
    torch.set_num_threads(1)
    tune, checkpoint, targets = MODES[mode]
    backbone = {"name": "vit_small_patch14_dinov2", "weights": "random", "checkpoint": checkpoint}
    values = {"method": "supervised", "name": "x", "data": {"path": "x", "augment": {"crop_size": SIDE}}}
    values |= {"backbone": backbone, "decoder": {"type": decoder}, "tune": tune, "lora": {"targets": targets}}
    recipe = recipe_from_dict(values, "benchmark")
    method = method_for(recipe, make_task(5)).train()
    (optimizer,) = build_optimizers(method, recipe.optimizers).values()
    images, masks = torch.rand(BATCH, 3, SIDE, SIDE), torch.randint(0, 5, (BATCH, SIDE, SIDE))
    batch = {"labeled": Samples(images, torch.ones_like(masks, dtype=torch.bool), masks)}
    before, seconds = _peak(), []
    for step in range(STEPS):
        started = time.process_time()
        optimizer.zero_grad()
        method(batch, step).losses["seg"].backward()
        optimizer.step()
        seconds.append(time.process_time() - started)
    print(f"{mode:26s} {_peak() - before:6.0f} MB {min(seconds):6.2f} s", flush=True)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", choices=("dpt", "linear"), default="dpt")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mode is not None:
        measure(options.mode, options.decoder)
    else:
        for name in MODES:
            command = [sys.executable, "-m", "benchmarks.tune_memory", "--decoder", options.decoder, "--mode", name]
            subprocess.run(command, check=True, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"})
