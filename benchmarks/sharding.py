"""Memory of two training processes that share the parameters of a ViT-L, against two that have all of them.

    python -m benchmarks.sharding [--backbone vit_large_patch14_dinov2] [--optimizer adamw] [--crop 112] [--steps 2]

Each pair runs on its own: two processes (gloo, a CPU, one thread), the plain method with a ViT with random weights and
a linear decoder, a batch of one. Prints the largest resident memory of the main process of each pair, imports included,
and the ratio. No checkpoint is written: the main process would have the complete tensors in memory. Stops before the
larger pair if the machine has too little free memory for it.
"""

import argparse
import os
import subprocess
import sys

import torch
from torch.amp.grad_scaler import GradScaler

from rsseg.config import TrainerConfig
from rsseg.data.streams import Samples
from rsseg.distributed import process_group
from rsseg.inference.machine import free_bytes
from rsseg.methods.registry import method_for
from rsseg.recipe import recipe_from_dict
from rsseg.task import ClassInfo, Task
from rsseg.training.checkpoints import Parts
from rsseg.training.device import Hardware, shard, without_weights
from rsseg.training.step import EagerStep, build_optimizers
from rsseg.training.trainer import peak_memory_mb

PROCESSES = 2
BYTES = {"adamw": 20, "sgd": 16}
"""Per parameter and process with all parameters: weights, gradients, their copy for the exchange, optimizer state."""
IMPORTS = 1 << 30


def work(arguments: argparse.Namespace) -> None:
    """One process of a pair; the main one prints its peak in MB."""
    torch.set_num_threads(1)
    classes = tuple(ClassInfo(name=f"c{i}", value=i, color=(i, i, i)) for i in range(6))
    bands = ("red", "green", "blue")
    task = Task(name="benchmark", classes=classes, bands=bands, scale=(1 / 255,) * 3, offset=(0.0,) * 3)
    recipe = recipe_from_dict(
        {
            "method": "supervised",
            "name": "sharding",
            "data": {"path": "none", "augment": {"crop_size": arguments.crop}},
            "backbone": {"name": arguments.backbone, "weights": "random", "image_size": arguments.crop},
            "decoder": {"type": "linear"},
            "optimizers": {"main": {"name": arguments.optimizer, "lr": 1e-4}},
            "trainer": TrainerConfig(steps=arguments.steps, batch_size=2).model_dump(),
        },
        "sharding",
    )
    device = torch.device("cpu")
    with process_group("cpu") as ranks:
        torch.manual_seed(0)
        method, template = method_for(recipe, task).train(), None
        if arguments.work == "full":
            template = without_weights(method.deployable())
            shard(method, [], device, ranks.world_size)
        parts = Parts(
            method, None, build_optimizers(method, recipe.optimizers), GradScaler("cpu", enabled=False), template
        )
        step = EagerStep(parts, recipe, Hardware(device))
        shape = (1, arguments.crop, arguments.crop)
        for number in range(arguments.steps):
            generator = torch.Generator().manual_seed(PROCESSES * number + ranks.rank)
            images = torch.rand(1, 3, *shape[1:], generator=generator)
            masks = torch.randint(6, shape, generator=generator)
            step.gradients({"labeled": Samples(images, torch.ones(shape, dtype=torch.bool), masks)}, number, 0)
            step.update()
        if ranks.is_main:
            parameters = sum(parameter.numel() for parameter in method.parameters())
            print(f"{peak_memory_mb(device):.0f} {parameters}", flush=True)


def measure(arguments: argparse.Namespace, sharding: str) -> tuple[float, int]:
    """Peak of the main process of a pair in MB, and parameters of the network."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    options = [f"--{name}={value}" for name, value in vars(arguments).items() if name != "work"]
    done = subprocess.run(
        [*command, "-m", "benchmarks.sharding", *options, f"--work={sharding}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    peak, parameters = done.stdout.split()
    return float(peak), int(parameters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_large_patch14_dinov2")
    parser.add_argument("--optimizer", choices=list(BYTES), default="adamw")
    parser.add_argument("--crop", type=int, default=112)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--work", choices=["none", "full"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments)
        return
    shared, parameters = measure(arguments, "full")
    needed, free = PROCESSES * (parameters * BYTES[arguments.optimizer] + IMPORTS), free_bytes()
    print(f"{arguments.backbone}, {parameters / 1e6:.0f} M parameters, {arguments.optimizer}, crop {arguments.crop}")
    print(f"parameters shared by {PROCESSES} processes: {shared:.0f} MB", flush=True)
    if free < needed:
        raise SystemExit(f"the other pair needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    alone, _ = measure(arguments, "none")
    print(f"all parameters in each: {alone:.0f} MB; ratio {shared / alone:.2f} (goal: at most 0.65)")


if __name__ == "__main__":
    main()
