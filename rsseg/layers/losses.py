"""Losses and training accuracy, computed in float32 also under autocast."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rsseg.layers.blocks import resize_logits
from rsseg.task import IGNORE_INDEX


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    class_weights: Tensor | None = None,
    pixel_weights: Tensor | None = None,
    divisor: Literal["all", "valid"] = "valid",
    align_corners: bool = False,
) -> Tensor:
    """Cross-entropy of logits resized to the target. Weights do not affect the divisor.

    Args:
        logits: float (B, K, h, w) of any size; resized bilinearly.
        target: int64 (B, H, W), IGNORE_INDEX where there is no label.
        class_weights: float (K,).
        pixel_weights: float (B, H, W).
        divisor: `valid` averages over labeled pixels; `all` divides their sum by the number of all pixels, the default
            of common code bases.
        align_corners: of the resize.
    Returns:
        Scalar; exactly 0 for a batch without labeled pixels.
    """
    with torch.autocast(logits.device.type, enabled=False):
        resized = resize_logits(logits, target.shape[-2:], align_corners=align_corners)
        per_pixel = F.cross_entropy(resized, target, weight=class_weights, ignore_index=IGNORE_INDEX, reduction="none")
        if pixel_weights is not None:
            per_pixel = per_pixel * pixel_weights
        if divisor == "all":
            return per_pixel.mean()
        return per_pixel.sum() / (target != IGNORE_INDEX).sum().clamp(min=1)


def pixel_accuracy(logits: Tensor, target: Tensor, *, align_corners: bool = False) -> Tensor:
    """Percentage of labeled pixels whose largest resized logit is the target; 0 without labels. Detached."""
    with torch.no_grad():
        resized = resize_logits(logits, target.shape[-2:], align_corners=align_corners)
        labeled = target != IGNORE_INDEX
        correct = torch.where(labeled, resized.argmax(dim=1) == target, False).sum()
        return 100.0 * correct / labeled.sum().clamp(min=1)


def softened_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    axis: int,
    temperature: float = 1.0,
    reduction: Literal["batchmean", "mean"] = "mean",
) -> Tensor:
    """KL divergence from the teacher's softmax to the student's, times the squared temperature.

    Both softmaxes are computed in log space, so that inputs of any range give a finite value.

    Args:
        student: float (B, ...), gradients flow.
        teacher: same shape; treated as constant.
        axis: values along it form one distribution.
        temperature: > 0; both inputs are divided by it.
        reduction: `mean` averages over distributions; `batchmean` sums over the distributions of a sample and averages
            over samples.
    Returns:
        Scalar >= 0.
    """
    with torch.autocast(student.device.type, enabled=False):
        log_student = F.log_softmax(student.float() / temperature, dim=axis)
        log_teacher = F.log_softmax(teacher.detach().float() / temperature, dim=axis)
        total = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
        count = student.shape[0] if reduction == "batchmean" else student.numel() // student.shape[axis]
        return temperature**2 * total / count


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine between the channel vectors of two (B, C, H, W) maps per position; the teacher is constant.

    From 0 for equal directions to 2 for opposite ones, independent of the vectors' lengths.
    """
    with torch.autocast(student.device.type, enabled=False):
        return (1.0 - F.cosine_similarity(student.float(), teacher.detach().float(), dim=1)).mean()
