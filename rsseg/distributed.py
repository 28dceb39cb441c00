"""Several processes, one per device, started by torchrun; everything here also works in a single plain process."""

import os
import signal
import sys
import threading
import time
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

from rsseg.errors import Interrupted, RssegError

POLL_S = 0.2
"""Polling interval for messages of other processes, seconds."""
GRACE_S = 2.0
"""Seconds to wait for another process to print its error: torchrun ends all processes once one has ended."""


@dataclass(frozen=True)
class Ranks:
    """Rank of this process, `local` rank on this machine, and number of processes."""

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
def process_group(device_type: str, on_peer_failure: Callable[[str], None] = lambda _: None) -> Iterator[Ranks]:
    """Join the processes that torchrun started; without torchrun, do nothing.

    An exception in one process ends all, with its exit code: the process that fails first raises, the others, which may
    be waiting for it in a collective call, exit silently.

    Args:
        device_type: `cuda` or `cpu`. Tensors on the CPU can be exchanged in either case.
        on_peer_failure: called with the message of another process before this one exits.
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield current_ranks()
        return
    # Long, since one rank may be downloading weights while the others wait.
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=1))
    board = _Board(on_peer_failure)
    try:
        with board:
            yield current_ranks()
    except Interrupted:
        _close_group()
        raise
    except BaseException as error:
        # The group stays open: closing it could deadlock with processes that wait for this one.
        board.fail(error)
        raise
    else:
        _close_group()


def _close_group() -> None:
    """Destroy the process group, and let gloo's threads finish.

    A thread may still hold the tensors of the last collective, and DDP keeps the threads alive. One that releases a
    tensor while Python shuts down aborts the process (SIGABRT), and torchrun reports a failed run.
    """
    dist.destroy_process_group()
    time.sleep(POLL_S)


class _Board:
    """Messages between processes outside collective calls: a received signal, a failure.

    A thread polls a key-value store shared by all processes, so that messages arrive while the main thread waits.
    """

    current: "_Board | None" = None

    def __init__(self, on_peer_failure: Callable[[str], None]) -> None:
        self._on_peer_failure = on_peer_failure
        # A connection of its own: that of the process group blocks while a collective is set up.
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)  # type: ignore[attr-defined]
        start = f"rsseg/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._store = dist.PrefixStore(start, store)  # type: ignore[attr-defined]
        self._name = str(dist.get_rank())
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.signals: StopSignals | None = None

    def __enter__(self) -> None:
        _Board.current = self
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        _Board.current = None
        self._closed.set()
        self._thread.join()

    def fail(self, error: BaseException) -> None:
        """Publish a failure, or exit if another process failed before."""
        code = error.exit_code if isinstance(error, RssegError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        try:
            mine = f"{self._name} {code} {error}"
            first = self._store.compare_set("failed", "", mine).decode()
        except RuntimeError:  # the process that holds the store is gone
            return
        if first != mine:
            self._exit(first)
        time.sleep(3 * POLL_S)  # torchrun ends the others once this one has ended: they must have read it before

    def _watch(self) -> None:
        try:
            while not self._closed.wait(POLL_S):
                if self._store.check(["failed"]):
                    self._exit(self._store.get("failed").decode())
                if self.signals is not None:
                    self._share(self.signals)
        except RuntimeError:  # the process that holds the store is gone
            return

    def _share(self, signals: "StopSignals") -> None:
        if self._store.check(["signal"]):
            signals.received = signals.received or self._store.get("signal").decode()
        elif signals.received is not None:
            self._store.set("signal", signals.received)

    def _exit(self, failure: str) -> None:
        rank, code, message = failure.split(" ", 2)
        if rank == self._name:  # the main thread is about to raise it
            return
        try:
            self._on_peer_failure(message)
        finally:
            time.sleep(GRACE_S)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(code))


def max_over_ranks(value: int) -> int:
    """The maximum of a value over all ranks; all ranks must call it. Does not wait for a GPU."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place; all ranks must call it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast_from_main(value: str) -> str:
    """The value of the main process, on every rank; all ranks must call it."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def broadcast_buffers(module: nn.Module) -> None:
    """Replace the buffers of every rank, such as running statistics, by those of the main process."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """Wrap the module for gradient averaging in a process group; unchanged without one."""
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

    A run stopped by a user or a scheduler (Slurm, spot machines) then ends after the current step and is saved. In a
    process group, a signal to one process is recorded in all of them within `POLL_S` or two.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._received_at = 0.0
        self._previous: dict[signal.Signals, Callable[..., Any] | int | None] = {}

    def __enter__(self) -> Self:
        # Only the main thread may install handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._record)
        if _Board.current is not None:
            _Board.current.signals = self
        return self

    def __exit__(self, *_: object) -> None:
        if _Board.current is not None:
            _Board.current.signals = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _record(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        # One Ctrl-C can arrive twice: from the terminal and passed on by torchrun.
        if self.received is not None and number == signal.SIGINT and now - self._received_at > 1:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self._received_at = signal.Signals(number).name, now
