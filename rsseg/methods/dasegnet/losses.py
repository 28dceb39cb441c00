"""Cross-entropy with class and pixel weights."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rsseg.layers.resize import resize
from rsseg.task import IGNORE_INDEX


def weighted_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    class_weights: Tensor | None = None,
    pixel_weights: Tensor | None = None,
    divisor: Literal["all", "valid"] = "all",
) -> Tensor:
    """Sum over labeled pixels of class weight x pixel weight x cross-entropy, over a number of pixels; float32.

    Args:
        logits: float (B, K, h, w), resized bilinearly to the target.
        target: int64 (B, H, W), IGNORE_INDEX where there is no label.
        class_weights: float (K,).
        pixel_weights: float (B, H, W).
        divisor: `all` pixels as published, or `valid` (labeled) ones. Weights are not part of the divisor.
    Returns:
        Scalar; exactly 0 for a batch without one labeled pixel.
    """
    with torch.autocast(logits.device.type, enabled=False):
        resized = resize(logits.float(), target.shape[-2:])
        per_pixel = F.cross_entropy(resized, target, weight=class_weights, ignore_index=IGNORE_INDEX, reduction="none")
        if pixel_weights is not None:
            per_pixel = per_pixel * pixel_weights
        if divisor == "all":
            return per_pixel.mean()
        return per_pixel.sum() / (target != IGNORE_INDEX).sum().clamp(min=1)
