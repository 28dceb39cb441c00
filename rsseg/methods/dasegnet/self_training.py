"""Self-training on target images: the teacher, its pseudo-labels, and harder views for the students."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsseg.data.streams import Samples
from rsseg.layers.blocks import has_batch_norm, resize_logits
from rsseg.layers.ema import Ema
from rsseg.methods.dasegnet.network import DASegNet, Styles
from rsseg.methods.dasegnet.recipe import SelfTrainingConfig, TeacherConfig
from rsseg.task import IGNORE_INDEX

UNSURE_WEIGHT = 0.5
"""Published weight of pixels whose probability is below `rare_confidence`."""


@dataclass(frozen=True)
class WeightedLabels:
    """Labels of target images.

    labels   int64 (B, H, W), IGNORE_INDEX where the image has no data
    weights  float32 (B, H, W)
    ratio    scalar, fraction of confident pixels
    """

    labels: Tensor
    weights: Tensor
    ratio: Tensor


@torch.no_grad()
def pseudo_labels(
    logits: Tensor, image_size: Sequence[int], valid: Tensor | None, config: SelfTrainingConfig
) -> WeightedLabels:
    """The most probable class of each pixel, weighted by the fraction of confident pixels in the batch.

    Args:
        logits: float (B, K, h, w); resized to `image_size` before the softmax.
        image_size: (H, W).
        valid: bool (B, H, W), False where there is no data; None if all pixels have.
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
        weighted = ratio * _constant(tuple(by_class), logits.device)[labels]
        sure = probability >= config.rare_confidence
        if in_place:
            sure &= weighted != 0  # published: weight 0 is replaced by that of a pixel below `rare_confidence`
        weights = torch.where(sure, weighted, ratio * UNSURE_WEIGHT)
    return WeightedLabels(torch.where(valid, labels, IGNORE_INDEX), torch.where(valid, weights, 0.0), ratio)


@functools.lru_cache(maxsize=16)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The values on a device, cached because each copy synchronizes with the host."""
    return torch.tensor(values, device=device)


def class_weight_table(weights: Sequence[float], num_classes: int, *, in_place: bool) -> list[float]:
    """Weight per class index.

    Args:
        weights: per class; classes beyond the end keep their index as weight, as published.
        num_classes: length of the result.
        in_place: as published, replace indices by weights in one map, class by class, so that a weight equal to a later
            class's index is replaced again (1.0 becomes the weight of class 1).
    """
    table = [float(index) for index in range(num_classes)]
    for index, weight in enumerate(weights):
        if in_place:
            table = [float(weight) if value == index else value for value in table]
        else:
            table[index] = float(weight)
    return table


AVERAGED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "decoder_only_t": ("decoder_source", "decoder_target"),
        "single_t": ("backbone_target", "decoder_target"),
        "whole": ("",),
    }
)
"""Teacher type -> names of the averaged parts of the student; "" is all of it."""


class Teacher(nn.Module):
    """Averaged parts of the student and their update rule."""

    def __init__(self, config: TeacherConfig, student: nn.Module, fresh: Callable[[str], nn.Module]) -> None:
        """Initialize the averages.

        Args:
            config: see `TeacherConfig`.
            student: the averaged network.
            fresh: builds a part with random weights, given its name in `AVERAGED`.
        """
        super().__init__()
        self.config = config
        self.averages = nn.ModuleDict()
        for part in AVERAGED[config.type]:
            start = student.get_submodule(part) if config.start == "student" else fresh(part)
            average = Ema(start, config.decay, buffers="average" if config.buffers == "average" else "keep")
            average.module.train(config.mode == "train")
            self.averages[part or "segmenter"] = average

    @torch.no_grad()
    def forward(self, student: DASegNet, images: Tensor, view: Styles | None) -> Tensor:
        """Logits (B, K, h, w) of target images (B, C, H, W), given the student's maps of the same images.

        Only type `whole` works without these maps; others raise `ValueError`.
        """
        match self.config.type:
            case "whole":
                return self.averaged("segmenter")(images)  # type: ignore[no-any-return]
            case kind if view is None:
                raise ValueError(f"a teacher of type {kind!r} needs the student's maps of the images")
            case "decoder_only_t":
                source = self.averaged("decoder_source")(view.refined_source)
                target = self.averaged("decoder_target")(view.refined_target)
                return (source + target) / 2  # type: ignore[no-any-return]
            case "single_t":
                # as published: a second pass, which batch norm records in the running statistics
                again = has_batch_norm(student.backbone_source)
                maps = student.backbone_source(images) if again else view.source
                refined = student.refine(maps, self.averaged("backbone_target")(images))
                return (student.decoder_source(refined[0]) + self.averaged("decoder_target")(refined[1])) / 2  # type: ignore[no-any-return]

    def update(self, student: nn.Module, step: int) -> None:
        """Update all averages after optimizer step `step` (from 0).

        Equals the published update at the beginning of the following step.
        """
        decay = min(1.0 - 1.0 / (step + 2), self.config.decay)
        for part in AVERAGED[self.config.type]:
            average: Ema = self.averages[part or "segmenter"]  # type: ignore[assignment]
            average.update(student.get_submodule(part), decay=decay)

    def averaged(self, part: str) -> nn.Module:
        """The averaged module of this name (`segmenter` for the whole network)."""
        return self.averages[part].module  # type: ignore[return-value]


def class_mix(masks: Tensor) -> Tensor:
    """Pixels to paste: those of a random half (rounded up) of each image's classes.

    Uses torch's global generator, which the trainer seeds for every step.

    Args:
        masks: int64 (B, H, W), class index or IGNORE_INDEX.
    Returns:
        bool (B, H, W); never True at ignored pixels.
    Source: Olsson et al. 2020 (arXiv 2007.07936).
    """
    # no host synchronization: a fixed number of classes instead of those that occur
    values = masks.flatten(1)
    present = torch.zeros(len(masks), IGNORE_INDEX + 1, dtype=torch.bool, device=masks.device).scatter(1, values, True)
    present[:, IGNORE_INDEX].fill_(False)
    scores = torch.rand(present.shape, device=masks.device).masked_fill(~present, 2.0)
    rank = scores.argsort(dim=1).argsort(dim=1)
    picked = present & (rank < (present.sum(dim=1, keepdim=True) + 1) // 2)
    return picked.gather(1, values).reshape(masks.shape)


def strong_view(
    source: Samples, target: Samples, pseudo: WeightedLabels, config: SelfTrainingConfig
) -> tuple[Tensor, WeightedLabels]:
    """Strong view of target images (B, C, H, W), with pasted source classes, and the matching labels."""
    images = target.images if config.student_view == "same" or target.strong is None else target.strong[:, 0]
    if not config.class_mix or source.masks is None:
        return images, pseudo
    partner = torch.arange(len(images), device=images.device) % len(source.images)
    pasted = class_mix(source.masks)[partner]
    return torch.where(pasted[:, None], source.images[partner], images), WeightedLabels(
        torch.where(pasted, source.masks[partner], pseudo.labels),
        torch.where(pasted, 1.0, pseudo.weights),
        pseudo.ratio,
    )


def hide_patches(images: Tensor, fill: Sequence[float], *, patch: int, ratio: float) -> Tensor:
    """Images (B, C, H, W) with squares of `patch` pixels replaced by `fill`, each with probability `ratio`."""
    height, width = images.shape[-2:]
    grid = torch.rand(len(images), 1, -(-height // patch), -(-width // patch), device=images.device) < ratio
    hidden = F.interpolate(grid.float(), scale_factor=patch, mode="nearest")[..., :height, :width] > 0
    blank = _constant(tuple(fill), images.device).to(images.dtype).reshape(1, -1, 1, 1)
    return torch.where(hidden, blank, images)
