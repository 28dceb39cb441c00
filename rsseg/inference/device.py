"""Where and how exactly a network computes."""

import copy
import ctypes
import os
import platform
from typing import Literal

import torch
from torch import Tensor, nn

from rsseg.errors import MachineError
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
    """A copy in eval mode for inference, and its dtype; the original is not touched.

    A network that cannot compute in `dtype`, which one small image shows, stays in float32. Weights that need no
    conversion are shared with the original. Convolutions are laid out channels_last, a third faster on a CPU.
    """
    if dtype != torch.float32:
        converted = _converted(segmenter, device, dtype)
        if _can_compute(converted, device, dtype):
            return converted, dtype
    return _converted(segmenter, device, torch.float32), torch.float32


def keep_heap() -> None:
    """Let glibc keep freed memory: it gives each large activation back to the kernel and faults it in again otherwise.

    Worth up to a half of the time of a forward with large tensors. For the whole process; does nothing with another
    C library or if `RSSEG_KEEP_HEAP=0`.
    """
    if platform.libc_ver()[0] != "glibc" or os.environ.get(KEEP_HEAP_VARIABLE) == "0":
        return
    library = ctypes.CDLL(None)
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    library.mallopt(mmap_max, 0)
    library.mallopt(trim_threshold, 2**31 - 1)
    library.mallopt(top_pad, 64 << 20)


def _converted(segmenter: Segmenter, device: torch.device, dtype: torch.dtype) -> Segmenter:
    # deepcopy takes what the memo already holds: no float32 copy of the weights exists in between.
    memo: dict[int, Tensor] = {}
    for parameter in segmenter.parameters():
        memo[id(parameter)] = nn.Parameter(_placed(parameter.detach(), device, dtype), requires_grad=False)
    for buffer in segmenter.buffers():
        memo[id(buffer)] = _placed(buffer, device, dtype) if buffer.is_floating_point() else buffer.to(device)
    return copy.deepcopy(segmenter, memo).eval()


def _placed(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
    return tensor.to(device, dtype, memory_format=layout)


@torch.inference_mode()
def _can_compute(segmenter: Segmenter, device: torch.device, dtype: torch.dtype) -> bool:
    side = segmenter.input_multiple if segmenter.tile.flexible else segmenter.tile.size
    image = torch.tensor(segmenter.fill, dtype=dtype, device=device)[None, :, None, None].expand(1, -1, side, side)
    try:
        return bool(segmenter.predict_logits(image).isfinite().all())
    except (RuntimeError, TypeError):  # no kernel for this type, or the network mixes types
        return False
