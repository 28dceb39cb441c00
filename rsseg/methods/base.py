"""The two interfaces of a method: what ships (`Segmenter`) and what trains (`Method`)."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from rsseg.backbones.backbone import Backbone
from rsseg.data.streams import Batch, StreamSpec
from rsseg.layers.losses import LabelLoss
from rsseg.task import Task


@dataclass(frozen=True)
class StepOutput:
    """Result of one micro-step.

    losses: scalars in the graph, already weighted; the trainer sums them.
    logs: detached scalars, read only when logging.
    """

    losses: Mapping[str, Tensor]
    logs: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ParamGroup:
    """Parameters of one optimizer that share rate and decay.

    lr_scale multiplies the optimizer's rate; weight_decay None takes the optimizer's.
    """

    params: Sequence[nn.Parameter]
    lr_scale: float = 1.0
    weight_decay: float | None = None


@dataclass(frozen=True)
class TileHint:
    """How a network likes to see a scene: tile side, overlap and whether other sides are as good, in pixels."""

    size: int
    overlap: int
    flexible: bool
    """True for convolutional networks, which gain from larger tiles; False keeps the training size (attention)."""


class Segmenter(nn.Module, ABC):
    """The part that ships: images in, logits out. No teacher, no discriminator, no average."""

    def __init__(self, task: Task, *, input_multiple: int, fill: Sequence[float], tile: TileHint) -> None:
        """Keep what prediction needs to know.

        Args:
            task: classes, bands and scaling the network was built for.
            input_multiple: `forward` accepts sides that are multiples of it.
            fill: per band, scaled units: value of pixels without data (the normalization mean, so that they become 0).
            tile: preferred tiling.
        """
        super().__init__()
        self.task = task
        self.input_multiple = input_multiple
        self.fill = tuple(fill)
        self.tile = tile

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """float (B, C, H, W) in scaled units, H and W multiples of `input_multiple` -> float logits (B, K, H, W)."""

    def low_resolution_logits(self, images: Tensor) -> Tensor:
        """Logits (B, K, h, w) that bilinear resizing (corners not aligned) turns into those of `forward`.

        A network whose decoder works below the images' resolution returns its output before that last resize.
        """
        return self(images)  # type: ignore[no-any-return]

    def fold(self) -> None:
        """Multiply out layers that only training keeps apart; called once on a copy that only predicts.

        Does nothing by default.
        """

    def predict_logits(self, images: Tensor) -> Tensor:
        """Like `forward` for any H, W >= 1: extends right and bottom by reflection (edge if too small), crops back."""
        height, width = images.shape[-2:]
        return self(self.padded(images))[..., :height, :width]  # type: ignore[no-any-return]

    def padded(self, images: Tensor) -> Tensor:
        """Extended right and bottom to multiples of `input_multiple`, as `predict_logits` does."""
        height, width = images.shape[-2:]
        bottom, right = -height % self.input_multiple, -width % self.input_multiple
        if not bottom and not right:
            return images
        mode = "reflect" if bottom < height and right < width else "replicate"
        return F.pad(images, (0, right, 0, bottom), mode=mode)


def backbone_infos(segmenter: Segmenter) -> dict[str, dict[str, Any]]:
    """What each backbone of a network says about itself, by the module's name, for the header of a model file."""
    return {name: asdict(part.info) for name, part in segmenter.named_modules() if isinstance(part, Backbone)}


class Method(nn.Module, ABC):
    """The part that trains: a Segmenter plus teachers, discriminators, averages.

    streams: what each training batch must hold.
    """

    streams: tuple[StreamSpec, ...]

    def __init__(self) -> None:
        super().__init__()
        self.label_loss = LabelLoss()  # on labeled streams; the registry puts the recipe's in its place

    @abstractmethod
    def training_step(self, batch: Batch, step: int) -> StepOutput:
        """Losses of one micro-step; `step` counts optimizer steps from 0."""

    @abstractmethod
    def param_groups(self) -> Mapping[str, Sequence[ParamGroup]]:
        """Optimizer name (a key of `recipe.optimizers`) -> groups; every trainable parameter in exactly one."""

    @abstractmethod
    def deployable(self) -> Segmenter:
        """The module whose weights become model.safetensors."""

    def after_optimizer_step(self, step: int) -> None:
        """Called once after all optimizers stepped; averages are updated here. Does nothing by default."""

    def forward(self, batch: Batch, step: int) -> StepOutput:
        """`training_step`, so that DistributedDataParallel can wrap the whole method."""
        return self.training_step(batch, step)
