"""Several processes, one per device, started by torchrun; everything here also works in a single plain process."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """Which process this is. `local` counts on this machine."""

    rank: int = 0
    world_size: int = 1
    local: int = 0

    @property
    def is_main(self) -> bool:
        """True for the process that writes files and talks."""
        return self.rank == 0


def current_ranks() -> Ranks:
    """This process among those of the open group; a plain process is the only one."""
    if not dist.is_initialized():
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def process_group(device_type: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started, if it did; leave them at the end."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield current_ranks()
        return
    # Generous, since one rank may still be fetching weights while the others wait.
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timedelta(hours=1))
    try:
        yield current_ranks()
    finally:
        dist.destroy_process_group()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of every rank's tensor, in place; all ranks must call it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool, device: torch.device) -> bool:
    """True if it is true on any rank; all ranks must call it."""
    if not dist.is_initialized():
        return flag
    return bool(sum_over_ranks(torch.tensor(int(flag), device=device)).item())


def told_by_main(value: str) -> str:
    """The main process's value, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """The module itself, or its wrapper that averages gradients over the ranks."""
    if not dist.is_initialized():
        return module
    return DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)


def gradient_sync(module: nn.Module, *, on: bool) -> AbstractContextManager[None]:
    """Context of a backward pass; off for all but the last micro-step, so that ranks communicate once per step."""
    if on or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()
