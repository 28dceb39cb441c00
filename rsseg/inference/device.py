"""Where and how exactly a network computes."""

import copy
import ctypes
import functools
import os
import platform
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from rsseg.errors import MachineError
from rsseg.inference.folding import simplify, store_convolutions
from rsseg.methods.base import Segmenter

Precision = Literal["auto", "float32", "bfloat16"]
KEEP_HEAP_VARIABLE = "RSSEG_KEEP_HEAP"
"""Environment variable; 0 leaves the allocator alone."""


def resolve_device(name: str) -> torch.device:
    """`auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`.

    Raises:
        MachineError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise MachineError(f"device {name!r} is unknown. Choose auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MachineError(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices. Choose cpu.")
    return device


def own_device(name: str, number: int | None) -> torch.device:
    """Like `resolve_device`; of several processes, this is the one whose GPU has that number unless the name has one.

    Raises:
        MachineError: there is no such device, or fewer than processes.
    """
    device = resolve_device(name)
    if number is not None and device.type == "cuda" and device.index is None:
        device = resolve_device(f"cuda:{number}")
        torch.cuda.set_device(device)
    return device


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device computes with it, and float32 where it would only imitate it."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def ready_to_predict(segmenter: Segmenter, device: torch.device, dtype: torch.dtype) -> tuple[Segmenter, torch.dtype]:
    """A copy in eval mode for inference, and the type to compute in; the original is not touched.

    A network that cannot compute in `dtype`, which one small image shows, computes in float32. Weights that need no
    conversion are shared with the original. Convolutions are laid out channels_last, a third faster on a CPU; a
    convolutional network is simplified as well, see `simplify`.
    """
    # deepcopy takes what the memo already holds: the weights are not copied twice.
    memo: dict[int, Tensor] = {id(buffer): buffer.to(device) for buffer in segmenter.buffers()}
    for parameter in segmenter.parameters():
        layout = torch.channels_last if parameter.ndim == 4 else torch.preserve_format
        placed = parameter.detach().to(device, memory_format=layout)
        memo[id(parameter)] = nn.Parameter(placed, requires_grad=False)
    ready = copy.deepcopy(segmenter, memo).eval()
    ready.fold()
    if ready.tile.flexible:
        simplify(ready, functools.partial(ready.predict_logits, _small_image(ready, device)))
    if dtype == torch.float32 or not _can_compute(ready, device, dtype):
        return ready, torch.float32
    store_convolutions(ready, dtype, lambda: _can_compute(ready, device, dtype))
    return ready, dtype


def keep_heap() -> None:
    """Let glibc keep freed memory: it gives each large activation back to the kernel and faults it in again otherwise.

    Worth up to a half of the time of a forward with large tensors. For the whole process; does nothing with another
    C library or if `RSSEG_KEEP_HEAP=0`.
    """
    if (library := _allocator()) is None:
        return
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8
    # One heap for all threads: else reader and writer each keep one of their own, with what they once needed.
    library.mallopt(arena_max, 1)
    library.mallopt(mmap_max, 0)
    library.mallopt(trim_threshold, 2**31 - 1)
    library.mallopt(top_pad, 64 << 20)


class HeapGuard:
    """Gives back what the heap keeps free once it has grown too far.

    What lives for long comes to lie between the blocks that a network takes and frees, so that the heap of
    `keep_heap` grows slowly. The memory must be faulted in again, so it is not given back before that is needed.
    """

    def __init__(self, most: int) -> None:
        """`most` bytes are what the process may hold before anything is given back."""
        self._most, self._library = most, _allocator()

    def check(self) -> None:
        """To be called often; does nothing where `keep_heap` does nothing."""
        if self._library is not None and resident_bytes() > self._most:
            self._library.malloc_trim(0)


def resident_bytes() -> int:
    """What this process holds in memory; 0 where Linux does not say it."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _allocator() -> ctypes.CDLL | None:
    """The C library if it is glibc and may be told what to do."""
    if platform.libc_ver()[0] != "glibc" or os.environ.get(KEEP_HEAP_VARIABLE) == "0":
        return None
    return ctypes.CDLL(None)


@torch.inference_mode()
def _can_compute(segmenter: Segmenter, device: torch.device, dtype: torch.dtype) -> bool:
    try:
        with torch.autocast(device.type, dtype):
            return bool(segmenter.predict_logits(_small_image(segmenter, device)).isfinite().all())
    except RuntimeError:  # an operation has no kernel for this type, or does not mix it with float32
        return False


def _small_image(segmenter: Segmenter, device: torch.device) -> Tensor:
    """Noise (1, C, side, side) about the mean, of the smallest side that the network is at home with."""
    side = segmenter.input_multiple if segmenter.tile.flexible else segmenter.tile.size
    mean = torch.tensor(segmenter.fill)[:, None, None]
    noise = torch.randn(len(mean), side, side, generator=torch.Generator().manual_seed(0))
    return (mean + noise * mean.abs())[None].to(device)
