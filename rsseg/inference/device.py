"""Devices of torch: choice of device and precision, and the cost of a tile."""

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rsseg.errors import MachineError, UsageError
from rsseg.inference.machine import NO_MEMORY, Cost, memory_errors
from rsseg.methods.base import Segmenter

Precision = Literal["auto", "float32", "bfloat16"]
_PROBE = 512
"""Largest tile side that is measured for a convolutional network; larger tiles are extrapolated."""
_ATTENTION_PROBE = 1024
"""The same for a network of fixed size."""
_OVERHEAD = 1.6
"""Memory of a forward pass relative to its tensors: fragmentation and scratch space of kernels (measured)."""


def resolve_device(name: str) -> torch.device:
    """Resolve `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: unknown name.
        MachineError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
    except RuntimeError:
        raise UsageError(f"device {name!r} is unknown. Choose auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MachineError(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices. Choose cpu.")
    return device


def own_device(name: str, number: int | None) -> torch.device:
    """Like `resolve_device`, for one of several processes: with a number, the GPU of that number.

    Raises:
        MachineError: there is no such device, or fewer than processes.
        UsageError: unknown name; it has a number, so that all processes would share one GPU.
    """
    if number is not None and ":" in name:
        raise UsageError(f"device {name!r} is one device, but each of several processes needs its own. Choose cuda.")
    device = resolve_device(name)
    if number is not None and device.type == "cuda" and device.index is None:
        device = resolve_device(f"cuda:{number}")
        torch.cuda.set_device(device)
    return device


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """Resolve `auto` to bfloat16 where the hardware supports it, float32 where it would be emulated."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


@torch.inference_mode()
def measure_tile(segmenter: Segmenter, tile: int, device: torch.device, dtype: torch.dtype) -> Cost:
    """Measure memory and time of a small tile, and scale both by the number of pixels.

    A network of fixed size is run at that size, because the cost of attention is not proportional to the pixels; a
    size that would take minutes is scaled by their square.

    Raises:
        MachineError: the device has too little memory for the tile.
    """
    full = tile if segmenter.tile.flexible else max(tile, segmenter.tile.size)
    side = trial_side(segmenter, min(full, _PROBE) if segmenter.tile.flexible else full)
    image = torch.tensor(segmenter.fill, device=device)[None, :, None, None].expand(1, -1, side, side)
    image = image.contiguous(memory_format=torch.channels_last)
    scale = (full / side) ** (2 if segmenter.tile.flexible else 4)

    def forward() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            segmenter.low_resolution_logits(segmenter.padded(image))

    with memory_errors(NO_MEMORY.format(device=device)):
        if device.type == "cuda":
            peak = _peak_on_gpu(forward, device)
        else:
            with LiveBytes() as live:
                forward()
            peak = live.peak
        start = time.perf_counter()
        forward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    return Cost(seconds * scale, int(peak * scale * _OVERHEAD))


def trial_side(segmenter: Segmenter, side: int) -> int:
    """Side of an image to try a network with: `side`, or what a network of larger fixed size computes in seconds."""
    multiple = segmenter.input_multiple
    return side if side <= _ATTENTION_PROBE else max(_ATTENTION_PROBE // multiple, 1) * multiple


def _peak_on_gpu(forward: Callable[[], None], device: torch.device) -> int:
    forward()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    forward()
    return torch.cuda.max_memory_allocated(device) - before


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks the bytes of all live storages that operations allocate, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._known: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Marking this class for torch's compiler would import it, which takes longer than importing torch."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, Tensor):
                self._track(tensor)
        return result

    def _track(self, tensor: Tensor) -> None:
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
