"""Losses and training accuracy, computed in float32 also under autocast."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsseg.config import LossConfig
from rsseg.errors import RecipeError
from rsseg.layers.blocks import resize_logits
from rsseg.task import IGNORE_INDEX, Task

_SMALL = 1e-12
"""Keeps powers and quotients of 0 finite."""


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    class_weights: Tensor | None = None,
    pixel_weights: Tensor | None = None,
    divisor: Literal["all", "valid"] = "valid",
    focal_gamma: float = 0.0,
) -> Tensor:
    """Cross-entropy of logits resized to the target. Weights do not affect the divisor.

    Args:
        logits: float (B, K, h, w) of any size; resized bilinearly.
        target: int64 (B, H, W), IGNORE_INDEX where there is no label.
        class_weights: float (K,).
        pixel_weights: float (B, H, W).
        divisor: `valid` averages over labeled pixels; `all` divides their sum by the number of all pixels, the default
            of common code bases.
        focal_gamma: factor (1 - p)^gamma of each pixel, p the probability of its class; see `LossConfig`.
    Returns:
        Scalar; exactly 0 for a batch without labeled pixels.
    """
    with torch.autocast(logits.device.type, enabled=False):
        resized = resize_logits(logits, target.shape[-2:])
        per_pixel = pixel_cross_entropy(resized, target, class_weights)
        if focal_gamma:
            plain = per_pixel if class_weights is None else pixel_cross_entropy(resized, target)
            per_pixel = per_pixel * (-torch.expm1(-plain)).clamp(min=_SMALL) ** focal_gamma
        if pixel_weights is not None:
            per_pixel = per_pixel * pixel_weights
        if divisor == "all":
            return per_pixel.mean()
        return per_pixel.sum() / (target != IGNORE_INDEX).sum().clamp(min=1)


def pixel_cross_entropy(logits: Tensor, target: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of each pixel, (B, H, W), 0 without label; logits float (B, K, H, W), target int64 (B, H, W)."""
    if not torch.are_deterministic_algorithms_enabled():
        return F.cross_entropy(logits, target, weight=class_weights, ignore_index=IGNORE_INDEX, reduction="none")
    # CUDA has a deterministic backward for lists of pixels, not for maps. The softmax comes first: same bits on a CPU.
    flat = logits.log_softmax(dim=1).movedim(1, -1).flatten(0, -2)
    losses = F.nll_loss(flat, target.flatten(), weight=class_weights, ignore_index=IGNORE_INDEX, reduction="none")
    return losses.view_as(target)


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """One minus the Dice overlap of probabilities and labels over the batch, mean over the classes that are labeled.

    Args:
        logits: float (B, K, h, w), resized bilinearly.
        target: int64 (B, H, W), IGNORE_INDEX where there is no label; such pixels do not count.

    Returns:
        Scalar from 0 to 1; exactly 0 for a batch without labeled pixels.
    """
    with torch.autocast(logits.device.type, enabled=False):
        resized = resize_logits(logits, target.shape[-2:])
        labeled = target != IGNORE_INDEX
        shown = F.one_hot(torch.where(labeled, target, 0), resized.shape[1]).movedim(-1, 1) * labeled[:, None]
        probabilities = resized.softmax(dim=1) * labeled[:, None]
        axes = (0, 2, 3)
        overlap, sums = (probabilities * shown).sum(axes), probabilities.sum(axes) + shown.sum(axes)
        present = shown.sum(axes) > 0
        per_class = torch.where(present, 1.0 - 2.0 * overlap / sums.clamp(min=_SMALL), 0.0)
        return per_class.sum() / present.sum().clamp(min=1)


class LabelLoss(nn.Module):
    """The loss on labels of all methods: cross-entropy with the additions of a recipe's `loss`."""

    class_weights: Tensor | None

    def __init__(self, config: LossConfig | None = None, task: Task | None = None) -> None:
        """Store the settings, by default plain cross-entropy; `auto` weights are 1 until `weigh` is called.

        Raises:
            RecipeError: the number of weights is not that of the classes.
        """
        super().__init__()
        self.config = config = config or LossConfig()
        given = None if isinstance(config.class_weights, str) else torch.tensor(config.class_weights)
        if given is not None and task is not None and len(given) != task.num_classes:
            raise RecipeError(
                f"loss.class_weights has {len(given)} entries, {task.name} has {task.num_classes} classes: "
                f"{list(task.class_names)}. Give one weight per class, in this order."
            )
        self.register_buffer("class_weights", given, persistent=False)

    def weigh(self, pixels: Sequence[int], device: torch.device | str = "cpu") -> None:
        """Set the class weights from the number of labeled pixels of each class."""
        self.class_weights = class_weights_of(pixels).to(device)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        class_weights: Tensor | None = None,
        divisor: Literal["all", "valid"] = "valid",
    ) -> Tensor:
        """Scalar; arguments as for `cross_entropy`. `class_weights` replace the recipe's."""
        logits = resize_logits(logits, target.shape[-2:])  # once for both terms
        loss = cross_entropy(
            logits,
            target,
            class_weights=self.class_weights if class_weights is None else class_weights,
            divisor=divisor,
            focal_gamma=self.config.focal_gamma,
        )
        return loss + self.config.dice * dice_loss(logits, target) if self.config.dice else loss


def class_weights_of(pixels: Sequence[int]) -> Tensor:
    """float32 (K,): one over the square root of each class's share, with mean 1 over pixels; 1 for absent classes."""
    shares = torch.tensor(pixels, dtype=torch.float64) / max(sum(pixels), 1)
    roots = shares.sqrt()
    return torch.where(shares > 0, 1.0 / (roots * roots.sum()), 1.0).float()


def pixel_accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Percentage of labeled pixels whose largest resized logit is the target; 0 without labels. Detached."""
    with torch.no_grad():
        resized = resize_logits(logits, target.shape[-2:])
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
