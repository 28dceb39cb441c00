"""What a tile costs in time and memory, measured on a small one before the work begins."""

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rsseg.methods.base import Segmenter

_PROBE = 512
"""Side of the tile that stands for larger ones of a convolutional network."""
_OVERHEAD = 1.6
"""Memory of a forward over that of its tensors: gaps of the allocator and scratch space of the kernels (measured)."""


@dataclass(frozen=True)
class Cost:
    """Of one tile in a forward, test-time views not counted."""

    seconds: float
    peak_bytes: int
    """What a forward takes at its peak, weights left out; an estimate."""


@torch.inference_mode()
def measure_tile(segmenter: Segmenter, tile: int, device: torch.device, dtype: torch.dtype) -> Cost:
    """Run a small tile, first for the memory, then for the time, and scale both by the pixels.

    A network of fixed size is run at that size: attention does not grow with the pixels.
    """
    side = min(tile, _PROBE) if segmenter.tile.flexible else max(tile, segmenter.tile.size)
    image = torch.tensor(segmenter.fill, device=device)[None, :, None, None].expand(1, -1, side, side)
    image = image.contiguous(memory_format=torch.channels_last)
    scale = max(tile, side) ** 2 / side**2

    def forward() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            segmenter.low_resolution_logits(segmenter.padded(image))

    if device.type == "cuda":
        peak = _peak_on_gpu(forward, device)
    else:
        with _LiveBytes() as live:
            forward()
        peak = live.peak
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        forward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return Cost(min(seconds) * scale, int(peak * scale * _OVERHEAD))


def _peak_on_gpu(forward: Callable[[], None], device: torch.device) -> int:
    forward()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    forward()
    return torch.cuda.max_memory_allocated(device) - before


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages that operations make while they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, Tensor):
                self._follow(tensor)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._known or not size:
            return
        self._known.add(address)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, address, size).atexit = False

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._now -= size
