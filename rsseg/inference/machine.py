"""This machine: memory of the process and of the heap, and the cost of a tile. Free of torch."""

import ctypes
import functools
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsseg.errors import MachineError, machine_error

KEEP_HEAP_VARIABLE = "RSSEG_KEEP_HEAP"
"""Environment variable; 0 keeps the allocator's settings."""
NO_MEMORY = (
    "{device} has too little memory for the network and its tiles. Give a smaller --tile or --batch-size "
    "(in a recipe eval.tile or eval.batch_size), or --device cpu."
)


@contextmanager
def memory_errors(message: str) -> Iterator[None]:
    """Turn torch's out-of-memory errors into `MachineError` with this message."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if machine_error(error) is None:
            raise
        raise MachineError(message) from None


def keep_heap() -> None:
    """Make glibc keep freed memory. By default it returns each large activation to the kernel and faults it in again.

    Saves up to half the time of a forward pass with large tensors. Affects the whole process; does nothing with another
    C library or if `RSSEG_KEEP_HEAP=0`.
    """
    if (library := _allocator()) is None:
        return
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8
    # One heap for all threads: otherwise reader and writer each keep their own, of the size of their peak.
    library.mallopt(arena_max, 1)
    library.mallopt(mmap_max, 0)
    library.mallopt(trim_threshold, 2**31 - 1)
    library.mallopt(top_pad, 64 << 20)


class HeapGuard:
    """Returns free memory of the heap to the system once the process has grown too large.

    The heap of `keep_heap` grows slowly by fragmentation. Returned memory must be faulted in again, so nothing is
    returned before that is needed.
    """

    def __init__(self, most: int) -> None:
        """`most` bytes may be resident before anything is returned."""
        self._most, self._library = most, _allocator()

    def check(self) -> None:
        """Return memory if too much is resident; cheap to call often. Does nothing where `keep_heap` does nothing."""
        if self._library is not None and resident_bytes() > self._most:
            self._library.malloc_trim(0)


def resident_bytes() -> int:
    """Resident memory of this process; 0 where there is no /proc."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def free_bytes() -> int:
    """Memory that this process can take without swapping, within the limit of its container; 1 GB if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 1 << 30
    with suppress(OSError, ValueError):  # no container, or one without a limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, max(limit - used, 0))
    return free


def _allocator() -> ctypes.CDLL | None:
    """The C library if it is glibc and the user allows changing its settings."""
    if platform.libc_ver()[0] != "glibc" or os.environ.get(KEEP_HEAP_VARIABLE) == "0":
        return None
    return ctypes.CDLL(None)


@dataclass(frozen=True)
class Cost:
    """Cost of one tile in a forward pass, without test-time augmentation.

    peak_bytes: estimated peak memory of a forward pass, without the weights
    """

    seconds: float
    peak_bytes: int

    def scaled(self, factor: float) -> "Cost":
        """Cost of `factor` times the pixels."""
        return Cost(self.seconds * factor, int(self.peak_bytes * factor))


def thread_count() -> int:
    """OMP_NUM_THREADS, or the cores that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_native_bfloat16() -> bool:
    """Whether this processor has instructions for bfloat16."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_tile" in flags


@functools.cache
def openvino_core() -> Any:
    """The one `openvino.Core` of the process, which is never freed.

    The first network that a core compiles gives the calling thread a stack for its signal handlers, and freeing the
    core puts the former stack back. With two cores that is the stack of one that is gone, and the next signal ends the
    process, Ctrl-C among them.
    """
    import openvino

    return openvino.Core()
