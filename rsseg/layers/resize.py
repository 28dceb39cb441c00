"""Bilinear resampling as the segmentation networks of the papers use it."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def resize(maps: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """Bilinear, without antialiasing: (B, C, H, W) -> (B, C, *size). Returns `maps` itself where the size agrees."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=align_corners)


def resize_logits(logits: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """Like `resize`, float32 whatever comes in: softmax and argmax ask for it, and a CPU is twice as fast in it."""
    return resize(logits.float(), size, align_corners=align_corners)
