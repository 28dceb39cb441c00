"""Several processes, one per device, started by torchrun; everything here also works in a single plain process."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """Number of this process, `local` on this machine, and how many there are."""

    rank: int = 0
    world_size: int = 1
    local: int = 0

    @property
    def is_main(self) -> bool:
        """True for the one process that writes files and messages."""
        return self.rank == 0


def current_ranks() -> Ranks:
    """Rank in the open process group; rank 0 of 1 without a group."""
    if not dist.is_initialized():
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def process_group(device_type: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started; without torchrun, do nothing."""
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
    """Whether `flag` is true on any rank; all ranks must call it."""
    if not dist.is_initialized():
        return flag
    return bool(sum_over_ranks(torch.tensor(int(flag), device=device)).item())


def broadcast_from_main(value: str) -> str:
    """The value of the main process, on every rank; all ranks must call it."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """The module, in a process group wrapped so that gradients are averaged over the ranks."""
    if not dist.is_initialized():
        return module
    return DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)


def gradient_sync(module: nn.Module, *, on: bool) -> AbstractContextManager[None]:
    """Context of a backward pass; `on` for the last micro-step only, so that ranks communicate once per step."""
    if on or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()


class StopSignals:
    """Context that records the first SIGINT or SIGTERM in `received`; a second Ctrl-C raises `KeyboardInterrupt`.

    A run then ends after the current step, saved, when a user or a scheduler (Slurm, spot machines) stops it.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, Callable[..., Any] | int | None] = {}

    def __enter__(self) -> Self:
        # Only the main thread may install handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _record(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
