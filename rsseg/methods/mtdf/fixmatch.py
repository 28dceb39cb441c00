"""Pseudo-labels, thresholds, CutMix and complementary dropout, after FixMatch and UniMatch V2."""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn

from rsseg.layers.blocks import cutmix
from rsseg.layers.losses import pixel_cross_entropy


@dataclass(frozen=True)
class PseudoLabels:
    """Pseudo-labels of the weak view, predicted by the averaged student.

    labels      int64 (B, H, W), the most probable class
    confidence  float (B, H, W), its probability
    valid       bool (B, H, W), False on padding and nodata
    """

    labels: Tensor
    confidence: Tensor
    valid: Tensor

    @classmethod
    def of(cls, logits: Tensor, valid: Tensor) -> Self:
        """Pseudo-labels from float (B, K, H, W) logits, without storing the softmax."""
        logits = logits.float()
        largest, labels = logits.max(dim=1)
        return cls(labels, torch.exp(largest - logits.logsumexp(dim=1)), valid)

    def mixed(self, mix: Tensor) -> "PseudoLabels":
        """The labels of the CutMix view; see `cutmix`."""
        return PseudoLabels(cutmix(self.labels, mix), cutmix(self.confidence, mix), cutmix(self.valid, mix))

    def confident(self, threshold: float | Tensor) -> Tensor:
        """bool (B, H, W): valid pixels of at least this confidence, one for all or float (K,) by class."""
        limit = threshold[self.labels] if isinstance(threshold, Tensor) else threshold
        return self.valid & (self.confidence >= limit)

    def confident_ratio(self, threshold: float | Tensor) -> Tensor:
        """Fraction of valid pixels that are confident; 0 without valid pixels."""
        return self.confident(threshold).sum() / self.valid.sum().clamp(min=1)


def pseudo_label_loss(
    logits: Tensor, pseudo: PseudoLabels, *, threshold: float | Tensor, divisor: Literal["valid", "confident"] = "valid"
) -> Tensor:
    """Cross-entropy summed over confident valid pixels, divided according to `divisor`.

    Args:
        logits: float (B, K, H, W) of the view that `pseudo` was mixed for.
        pseudo: labels, confidence and valid area.
        threshold: least confidence of a pixel that counts, one for all or float (K,) by class.
        divisor: divide by the number of `valid` pixels (the authors' code) or of `confident` ones.

    Returns:
        Scalar; exactly 0 if no pixel counts.
    """
    with torch.autocast(logits.device.type, enabled=False):
        confident = pseudo.confident(threshold)
        per_pixel = pixel_cross_entropy(logits.float(), pseudo.labels)
        count = (confident if divisor == "confident" else pseudo.valid).sum()
        return torch.where(confident, per_pixel, 0.0).sum() / count.clamp(min=1)


class ClassThresholds(nn.Module):
    """Confidence thresholds by class, from a running mean of the confidence of each class's pseudo-labels."""

    running_mean: Tensor

    def __init__(self, num_classes: int, confidence: float, *, momentum: float = 0.95) -> None:
        """Start with the threshold `confidence` for every class; the most certain class keeps it."""
        super().__init__()
        self.confidence, self.momentum = confidence, momentum
        self.register_buffer("running_mean", torch.ones(num_classes))

    @torch.no_grad()
    def forward(self, pseudo: PseudoLabels) -> Tensor:
        """Record the pseudo-labels of one batch; returns the thresholds, float (K,)."""
        classes = torch.arange(len(self.running_mean), device=self.running_mean.device)
        shown = (pseudo.labels[..., None] == classes) & pseudo.valid[..., None]
        count = shown.flatten(0, 2).sum(0)
        mean = (shown * pseudo.confidence[..., None]).flatten(0, 2).sum(0) / count.clamp(min=1)
        self.running_mean.lerp_(torch.where(count > 0, mean, self.running_mean), 1.0 - self.momentum)
        return self.confidence * self.running_mean / self.running_mean.max()


def complementary_masks(pairs: int, channels: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Channel factors for two views of the same samples: each channel is doubled in one and dropped in the other.

    Half of the pairs (rounded down, drawn at random) keep every channel in both views. The random source is torch's
    global one, which the trainer seeds for every step.

    Args:
        pairs: samples per view.
        channels: of the maps.
        device: of the result.

    Returns:
        float (2 * pairs, channels) of 0, 1 and 2; rows i and i + pairs sum to 2.

    Source: UniMatch V2 (arXiv 2410.10777).
    """
    first = 2.0 * torch.randint(0, 2, (pairs, channels), device=device).float()
    first.index_fill_(0, torch.randperm(pairs, device=device)[: pairs // 2], 1.0)
    return torch.cat([first, 2.0 - first])
