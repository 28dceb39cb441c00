"""Distillation: a frozen teacher and the loss between its maps and the outputs of FAM."""

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsseg.backbones.backbone import Backbone
from rsseg.layers.blocks import cutmix
from rsseg.layers.ema import Frozen
from rsseg.layers.losses import cosine_distance, softened_kl
from rsseg.methods.base import Segmenter
from rsseg.methods.ktda.network import fused
from rsseg.methods.ktda.recipe import DistillationConfig, TaskTeacherConfig

_AXES = {"channel": 1, "height": 2, "width": 3}


class Distillation(nn.Module):
    """Compares FAM's outputs with the maps of a frozen teacher on the same augmented batch."""

    weight: Tensor

    def __init__(
        self,
        teacher: Backbone,
        settings: DistillationConfig,
        *,
        total_steps: int,
        fuse: bool = False,
        normalize: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Freeze the teacher.

        Args:
            teacher: returns one map per FAM level.
            settings: of the loss and its weight.
            total_steps: optimizer steps of the run, at which a decay ends.
            fuse: sum the teacher's maps, as FAM's are summed.
            normalize: normalization of the teacher's images; None uses the teacher's own.
        """
        super().__init__()
        self.teacher = Frozen(teacher)
        self.settings, self.total_steps, self.fuse = settings, total_steps, fuse
        self._normalize = normalize or teacher.normalize
        self.register_buffer("weight", torch.empty(()), persistent=False)
        self.set_step(0)

    def set_step(self, step: int) -> None:
        """Set the weight of an optimizer step, counted from 0."""
        self.weight.fill_(weight_at(self.settings, step, self.total_steps))

    def forward(self, images: Tensor, aligned: Sequence[Tensor]) -> Tensor:
        """Weighted loss of one micro-step.

        Args:
            images: float (B, C, H, W), scaled units.
            aligned: FAM's outputs, or only their sum if fused.
        """
        maps = self.teacher_maps(images)
        loss = distillation_loss(aligned, [fused(maps)] if self.fuse else maps, self.settings)
        return self.weight * loss

    def teacher_maps(self, images: Tensor) -> Sequence[Tensor]:
        """The teacher's maps of images (B, C, H, W) in scaled units, without gradients."""
        teacher = cast(Backbone, self.teacher.module)
        with torch.no_grad():
            return teacher.forward_normalized(self._normalize(images))


class TaskTeacher(nn.Module):
    """A frozen network trained on the task, and the divergence of the student's probabilities from its own."""

    def __init__(self, segmenter: Segmenter, settings: TaskTeacherConfig) -> None:
        super().__init__()
        self.frozen = Frozen(segmenter)
        self.settings = settings

    def logits(self, images: Tensor) -> Tensor:
        """float (B, C, H, W), scaled units -> float logits (B, K, H, W), without a graph."""
        with torch.no_grad():
            return cast(Segmenter, self.frozen.module).predict_logits(images)

    def loss(self, student: Tensor, images: Tensor, valid: Tensor, mix: Tensor | None = None) -> Tensor:
        """Weighted divergence.

        Args:
            student: float logits (B, K, H, W); gradients flow.
            images: float (B, C, H, W), input of the teacher.
            valid: bool (B, H, W), False for pixels to exclude.
            mix: bool (B, H, W), CutMix box of the student's images, which the teacher's logits then follow.
        """
        theirs = self.logits(images)
        if mix is not None:
            theirs, valid = cutmix(theirs, mix), cutmix(valid, mix)
        return self.settings.weight * probability_loss(student, theirs, valid, self.settings.temperature)


def probability_loss(student: Tensor, teacher: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """KL divergence from the teacher's class probabilities to the student's, times the squared temperature.

    Args:
        student: float logits (B, K, H, W).
        teacher: the same shape; constant.
        valid: bool (B, H, W).
        temperature: both logits are divided by it.

    Returns:
        Scalar >= 0, the mean over valid pixels; 0 without any.
    """
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = ((x.float() / temperature).log_softmax(dim=1) for x in (student, teacher.detach()))
        per_pixel = (theirs.exp() * (theirs - ours)).sum(dim=1)
        return temperature**2 * torch.where(valid, per_pixel, 0.0).sum() / valid.sum().clamp(min=1)


def distillation_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], settings: DistillationConfig) -> Tensor:
    """Mean over levels of alpha * KL + (1 - alpha) * mean squared error, or of the cosine distance, without `weight`.

    Args:
        student: float (B, C, H, W) per level; gradients flow.
        teacher: the same shapes; constants.
        settings: see `DistillationConfig`.
    Returns:
        Scalar, float32. Finite for maps of any range, unlike the authors' softmax().log().
    """
    losses = [_level_loss(a, b.detach().float(), settings) for a, b in zip(student, teacher, strict=True)]
    loss = torch.stack(losses).mean()
    halved = settings.loss == "kl_mse" and settings.alpha == 0 and settings.alpha_zero_halving
    return loss / 2 if halved else loss


def weight_at(settings: DistillationConfig, step: int, total_steps: int) -> float:
    """Weight of the loss at an optimizer step: warm-up times decay times `settings.weight`."""
    warmup = min(1.0, step / settings.warmup_steps) if settings.warmup_steps else 1.0
    progress = min(1.0, max(0.0, (step - settings.warmup_steps) / max(1, total_steps - 1 - settings.warmup_steps)))
    left = {"none": 1.0, "linear": 1.0 - progress, "cosine": (1.0 + math.cos(math.pi * progress)) / 2}[settings.decay]
    return settings.weight * warmup * left


def _level_loss(student: Tensor, teacher: Tensor, settings: DistillationConfig) -> Tensor:
    if settings.standardize:
        std, mean = torch.std_mean(teacher, dim=(0, 2, 3), keepdim=True, correction=0)
        teacher = (teacher - mean) / (std + 1e-6)
    if settings.loss == "cosine":
        return cosine_distance(student, teacher)
    kl = softened_kl(
        student,
        teacher,
        axis=_AXES[settings.kl_axis],
        temperature=settings.temperature,
        reduction=settings.kl_reduction,
    )
    with torch.autocast(student.device.type, enabled=False):
        return settings.alpha * kl + (1.0 - settings.alpha) * F.mse_loss(student.float(), teacher)
