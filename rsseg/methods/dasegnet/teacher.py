"""The teacher: averages of the students, in part or whole, that label target images."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from rsseg.layers.batch_norm import has_batch_norm
from rsseg.layers.ema import Ema
from rsseg.methods.dasegnet.network import DASegNet, Styles
from rsseg.methods.dasegnet.recipe import TeacherConfig

AVERAGED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "decoder_only_t": ("decoder_source", "decoder_target"),
        "single_t": ("backbone_target", "decoder_target"),
        "whole": ("",),
    }
)
"""Kind -> the parts of the student that are averaged, by name; "" is all of it."""


class Teacher(nn.Module):
    """Averaged parts of the student, and the rule by which they follow it."""

    def __init__(self, config: TeacherConfig, student: DASegNet, fresh: Callable[[str], nn.Module]) -> None:
        """Start the averages.

        Args:
            config: see there.
            student: what is averaged.
            fresh: makes a part with random weights, given its name in `AVERAGED`.
        """
        super().__init__()
        self.config = config
        self._updates = 0
        self.averages = nn.ModuleDict()
        for part in AVERAGED[config.type]:
            start = student.get_submodule(part) if config.start == "student" else fresh(part)
            average = Ema(start, config.decay, buffers="average" if config.buffers == "average" else "keep")
            average.module.train(config.mode == "train")
            self.averages[part or "segmenter"] = average

    @torch.no_grad()
    def forward(self, student: DASegNet, images: Tensor, view: Styles | None) -> Tensor:
        """Logits (B, K, h, w) of target images (B, C, H, W), given what the student made of the same images.

        Only the kind `whole` does without the student's view; others raise `ValueError`.
        """
        match self.config.type:
            case "whole":
                return self.averaged("segmenter")(images)  # type: ignore[no-any-return]
            case kind if view is None:
                raise ValueError(f"a teacher of kind {kind!r} needs what the student made of the images")
            case "decoder_only_t":
                source = self.averaged("decoder_source")(view.refined_source)
                target = self.averaged("decoder_target")(view.refined_target)
                return (source + target) / 2  # type: ignore[no-any-return]
            case "single_t":
                # a second pass through batch norm leaves other running statistics, and evaluation uses them
                again = has_batch_norm(student.backbone_source)
                maps = student.backbone_source(images) if again else view.source
                refined = student.refine(maps, self.averaged("backbone_target")(images))
                return (student.decoder_source(refined[0]) + self.averaged("decoder_target")(refined[1])) / 2  # type: ignore[no-any-return]

    def update(self, student: DASegNet, step: int) -> None:
        """Move every average towards the student, after optimizer step `step` (from 0).

        Equals the published update at the beginning of the step that follows.
        """
        done = step if self.config.counter == "step" else self._updates
        self._updates += 1
        decay = min(1.0 - 1.0 / (done + 2), self.config.decay)
        for part in AVERAGED[self.config.type]:
            average: Ema = self.averages[part or "segmenter"]  # type: ignore[assignment]
            average.update(student.get_submodule(part), decay=decay)

    def averaged(self, part: str) -> nn.Module:
        """The averaged module of this name (`segmenter` for all)."""
        return self.averages[part].module  # type: ignore[return-value]
