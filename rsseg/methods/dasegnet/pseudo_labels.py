"""Labels and pixel weights from a teacher's logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rsseg.layers.resize import resize_logits
from rsseg.methods.dasegnet.recipe import SelfTrainingConfig
from rsseg.task import IGNORE_INDEX


@dataclass(frozen=True)
class PseudoLabels:
    """labels int64 (B, H, W), IGNORE_INDEX where the image has no data; weights float32 (B, H, W); ratio: scalar,
    the confident part of the pixels."""

    labels: Tensor
    weights: Tensor
    ratio: Tensor


@torch.no_grad()
def pseudo_labels(
    logits: Tensor, image_size: Sequence[int], valid: Tensor | None, config: SelfTrainingConfig
) -> PseudoLabels:
    """The teacher's most probable class, weighted by how much of the whole batch it is sure of.

    Args:
        logits: float (B, K, h, w); resized to `image_size` before the softmax.
        image_size: (H, W).
        valid: bool (B, H, W), False where there is no data; None if all has.
        config: thresholds and class weights.
    """
    with torch.autocast(logits.device.type, enabled=False):
        probability, labels = torch.softmax(resize_logits(logits, image_size), dim=1).max(dim=1)
    confident = probability >= config.confidence
    if valid is None:
        valid = torch.ones_like(confident)
    ratio = (confident & valid).sum() / valid.sum().clamp(min=1)
    weights = ratio.expand_as(probability)
    if config.rare_confidence is not None and config.class_weights is not None:
        in_place = config.class_weight_rule == "in_place"
        by_class = class_weight_table(config.class_weights, logits.shape[1], in_place=in_place)
        weighted = ratio * torch.tensor(by_class, device=logits.device)[labels]
        sure = probability >= config.rare_confidence
        if in_place:
            sure &= weighted != 0  # published: every weight that is 0 by then is taken for that of an unsure pixel
        weights = torch.where(sure, weighted, ratio * config.unsure_weight)
    return PseudoLabels(torch.where(valid, labels, IGNORE_INDEX), torch.where(valid, weights, 0.0), ratio)


def class_weight_table(weights: Sequence[float], num_classes: int, *, in_place: bool) -> list[float]:
    """Weight per class index.

    Args:
        weights: per class; classes beyond the end keep their index as weight, as the published code does.
        num_classes: length of the result.
        in_place: as published: weights replace indices in one map, class by class, so that a weight equal to a later
            class's index is replaced again by that class's weight (1.0 becomes the weight of class 1, and so on).
    """
    table = [float(index) for index in range(num_classes)]
    for index, weight in enumerate(weights):
        if in_place:
            table = [float(weight) if value == index else value for value in table]
        else:
            table[index] = float(weight)
    return table
