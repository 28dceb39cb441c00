"""Harder target images for the students: classes pasted from the source, and hidden patches. Not published."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rsseg.task import IGNORE_INDEX


def class_mix(masks: Tensor) -> Tensor:
    """Where to paste: the pixels of a random half (rounded up) of each image's classes.

    Drawn from torch's global generator, which the trainer seeds for every step.

    Args:
        masks: int64 (B, H, W), class index or IGNORE_INDEX.
    Returns:
        bool (B, H, W); never True at ignored pixels.
    Source: Olsson et al. 2020 (arXiv 2007.07936).
    """
    chosen = torch.zeros_like(masks, dtype=torch.bool)
    for mask, paste in zip(masks, chosen, strict=True):
        classes = mask[mask != IGNORE_INDEX].unique()
        picked = classes[torch.randperm(len(classes), device=classes.device)[: (len(classes) + 1) // 2]]
        paste.copy_(torch.isin(mask, picked))
    return chosen


def hide_patches(images: Tensor, fill: Sequence[float], *, patch: int, ratio: float) -> Tensor:
    """A copy of images (B, C, H, W) in which squares of `patch` pixels hold `fill`, each with probability `ratio`."""
    height, width = images.shape[-2:]
    grid = torch.rand(len(images), 1, -(-height // patch), -(-width // patch), device=images.device) < ratio
    hidden = F.interpolate(grid.float(), scale_factor=patch, mode="nearest")[..., :height, :width] > 0
    blank = torch.tensor(fill, device=images.device, dtype=images.dtype).reshape(1, -1, 1, 1)
    return torch.where(hidden, blank, images)
