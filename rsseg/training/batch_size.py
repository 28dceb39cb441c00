"""`trainer.batch_size: auto`: the largest batch whose training step fits into memory."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.amp.grad_scaler import GradScaler

from rsseg import distributed
from rsseg.data.streams import Samples, StreamSpec
from rsseg.errors import MachineError
from rsseg.inference.device import LiveBytes
from rsseg.inference.machine import free_bytes
from rsseg.methods.registry import method_for
from rsseg.recipe import Recipe
from rsseg.task import Task
from rsseg.training.checkpoints import Parts
from rsseg.training.device import Hardware
from rsseg.training.step import EagerStep, build_optimizers

LARGEST = 256
"""Larger batches change how a network learns more than how fast."""
_SHARE = 0.8
"""Share of the memory to use: the rest is for the loader, kernels' workspaces and fragmentation."""
_TRIED = (2, 4)


def largest_batch(recipe: Recipe, task: Task, hardware: Hardware, *, memory: int | None = None) -> int:
    """Images per stream, process and micro-step, at most `LARGEST`; the same on all processes.

    Memory grows in proportion to the batch, so that the peaks of two small batches give that of every other. On a GPU
    the result is tried, and reduced until it fits.

    Args:
        recipe: with `batch_size: auto`, see `TrainerConfig.batch_of`.
        task: classes and bands.
        hardware: device and autocast type.
        memory: bytes that are available; None asks the device.

    Raises:
        MachineError: not even the smallest batch fits.
    """
    method = method_for(recipe, task).to(hardware.device).train()
    optimizers = build_optimizers(method, recipe.optimizers)
    step = EagerStep(
        Parts(method, None, optimizers, GradScaler(hardware.device.type, enabled=False)), recipe, hardware, alone=True
    )

    def peak(count: int) -> int:
        sizes = {spec.name: recipe.trainer.stream_batch_sizes.get(spec.name, count) for spec in method.streams}
        batch = {s.name: _samples(recipe, s, task, sizes[s.name], hardware.device) for s in method.streams}
        with _measured(hardware.device) as bytes_of:
            step.gradients(batch, 0, 0)
            step.update()
        return bytes_of[0]

    available = 0
    try:
        peak(_TRIED[0])  # allocates the optimizers' state
        available = int(_SHARE * (memory or _available(hardware.device)))
        first, second = (peak(count) for count in _TRIED)
        per_image = max((second - first) // (_TRIED[1] - _TRIED[0]), 1)
        found = min(_TRIED[0] + (available - first) // per_image, LARGEST)
        while hardware.device.type == "cuda" and found >= _TRIED[0] and not _fits(peak, found):
            found = found * 9 // 10
    except torch.OutOfMemoryError:
        found = 0
    found = -distributed.max_over_ranks(-found)
    if found < _TRIED[0]:
        raise MachineError(
            f"trainer.batch_size: auto: a batch of {_TRIED[0]} does not fit into the {available / 1e9:.1f} GB that a "
            "step may use. Set smaller crops (data.augment.crop_size), trainer.amp_dtype: bf16, or a smaller network."
        )
    return found


def _fits(peak: Callable[[int], int], count: int) -> bool:
    try:
        peak(count)
    except torch.OutOfMemoryError:
        return False
    return True


def _samples(recipe: Recipe, spec: StreamSpec, task: Task, count: int, device: torch.device) -> Samples:
    """Random samples of a stream."""
    side, views = recipe.data.augment_of(spec.name).crop_size, spec.strong_views
    shape, bands = (count, side, side), len(task.bands)
    return Samples(
        images=torch.rand(count, bands, side, side, device=device),
        valid=torch.ones(shape, dtype=torch.bool, device=device),
        masks=torch.randint(task.num_classes, shape, device=device) if spec.masks else None,
        strong=torch.rand(count, views, bands, side, side, device=device) if views else None,
        mix=torch.zeros(count, views, side, side, dtype=torch.bool, device=device) if views else None,
    )


@contextmanager
def _measured(device: torch.device) -> Iterator[list[int]]:
    """Peak memory of the context in bytes, in a list after its end: on a CPU of what it allocates."""
    result: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield result
        result.append(torch.cuda.max_memory_allocated(device))
    else:
        with LiveBytes() as live:
            yield result
        result.append(live.peak)


def _available(device: torch.device) -> int:
    """Bytes for a training process: what is free now, with what this process has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return free_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun
