"""Interfaces of a method: `Segmenter`, the network that ships, `Method`, which trains it; what importers share."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

import rsseg
from rsseg.backbones.backbone import Backbone
from rsseg.checkpoint import Calibration, ModelHeader, load_into, write_model
from rsseg.config import BaseRecipe
from rsseg.data.streams import Batch, StreamSpec
from rsseg.errors import MachineError, RecipeError, WeightsError
from rsseg.layers.ema import Frozen
from rsseg.layers.losses import LabelLoss
from rsseg.task import Task
from rsseg.task import TileHint as TileHint


@dataclass(frozen=True)
class StepOutput:
    """Result of one micro-step.

    losses: scalars with gradients, already weighted; the trainer sums them.
    logs: detached scalars, read only when logging.
    """

    losses: Mapping[str, Tensor]
    logs: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ParamGroup:
    """Parameters of one optimizer with the same learning rate and weight decay.

    lr_scale multiplies the optimizer's rate; weight_decay None uses the optimizer's.
    """

    params: Sequence[nn.Parameter]
    lr_scale: float = 1.0
    weight_decay: float | None = None


class Segmenter(nn.Module, ABC):
    """The network that ships: images in, logits out. No teacher, discriminator or average."""

    def __init__(self, task: Task, *, input_multiple: int, fill: Sequence[float], tile: TileHint) -> None:
        """Store what prediction needs.

        Args:
            task: classes, bands and scaling that the network was built for.
            input_multiple: `forward` accepts sides that are multiples of it.
            fill: per band in scaled units, value of pixels without data (usually the normalization mean, which becomes
                0).
            tile: preferred tiling.
        """
        super().__init__()
        self.task = task
        self.input_multiple = input_multiple
        self.fill = tuple(fill)
        self.tile = tile
        self.calibration: Calibration | None = None

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """float (B, C, H, W) in scaled units, H and W multiples of `input_multiple` -> float logits (B, K, H, W)."""

    def low_resolution_logits(self, images: Tensor) -> Tensor:
        """Logits (B, K, h, w) that bilinear resizing (corners not aligned) turns into those of `forward`.

        A network whose decoder works below the images' resolution returns its output before that last resize.
        """
        return self(images)  # type: ignore[no-any-return]

    def start_parts(self) -> Mapping[str, Sequence[nn.Module]]:
        """Role -> parts that another network's part of that role can initialize; see `start_from`.

        The first one of each role initializes others. Empty by default.
        """
        return {}

    def fold(self) -> None:
        """Merge layers that are separate only for training; called once, on a copy used for prediction only.

        Does nothing by default.
        """

    def predict_logits(self, images: Tensor) -> Tensor:
        """`forward` for any H, W >= 1: pad right and bottom by reflection (edge values if too small), then crop."""
        height, width = images.shape[-2:]
        return self(self.padded(images))[..., :height, :width]  # type: ignore[no-any-return]

    def padded(self, images: Tensor) -> Tensor:
        """Pad images right and bottom to multiples of `input_multiple`, as `predict_logits` does."""
        height, width = images.shape[-2:]
        bottom, right = -height % self.input_multiple, -width % self.input_multiple
        if not bottom and not right:
            return images
        mode = "reflect" if bottom < height and right < width else "replicate"
        return F.pad(images, (0, right, 0, bottom), mode=mode)


FLEXIBLE_TILE = TileHint(size=1280, overlap=128, flexible=True)
"""Of convolutional networks."""


def preferred_tile(backbone: Backbone, crop_size: int) -> TileHint:
    """Large tiles for a convolutional backbone; the training crop's side where attention spans the whole tile."""
    if backbone.info.kind == "pyramid":
        return FLEXIBLE_TILE
    return TileHint(size=crop_size, overlap=crop_size // 4, flexible=False)


LARGEST_NETWORK = 4_000_000_000
"""Parameters; the zoo's largest network has 1.1e9."""


@contextmanager
def bounded_parameters() -> Iterator[None]:
    """Raise `MachineError` once the modules built inside have more parameters than this machine can hold."""
    largest = LARGEST_NETWORK
    if hasattr(os, "sysconf"):
        largest = min(largest, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)  # 4 bytes each
    refusal = MachineError(
        f"the recipe describes a network of more than {largest / 1e9:.2g} billion parameters, which is too large for "
        "this machine. Choose a smaller backbone, or fewer channels or blocks."
    )
    count = 0

    def add(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        if parameter is not None and not parameter.is_meta:
            count += parameter.numel()
        if count > largest:
            raise refusal

    handle = register_module_parameter_registration_hook(add)
    try:
        yield
    except RuntimeError as error:
        if "allocate memory" in str(error) or isinstance(error, torch.OutOfMemoryError):
            raise refusal from None
        raise
    finally:
        handle.remove()


def backbone_infos(segmenter: Segmenter) -> dict[str, dict[str, Any]]:
    """`BackboneInfo` of each backbone in a network by module name, as the header of a model file stores it."""
    return {name: asdict(part.info) for name, part in segmenter.named_modules() if isinstance(part, Backbone)}


LoadModel = Callable[[Path], Segmenter]
"""Model file or run folder -> its network, on the CPU."""


def start_from(segmenter: Segmenter, path: Path | None, load_model: LoadModel | None) -> None:
    """Copy the weights of a trained model into the parts of a network that has the same ones, of any method.

    Parts that the model does not have, such as feature translators, keep their weights.

    Raises:
        RecipeError: the model has other classes or bands, or a part of another architecture; both sides are named.
        WeightsError: there is no model.
    """
    if path is None:
        return
    if load_model is None:
        raise ValueError("a start model needs a function that loads it")
    model = load_model(path)
    check_same_task("start", path, model.task, segmenter.task)
    theirs, pairs = model.start_parts(), []
    for role, parts in segmenter.start_parts().items():
        for part in parts if role in theirs else ():
            other = theirs[role][0]
            if _shapes(part) != _shapes(other):
                raise RecipeError(
                    f"start: the {role} of {path} is {_described(other)}, that of this recipe is {_described(part)}. "
                    "Give a model with the same network, or change the recipe to its."
                )
            pairs.append((part, other))
    for part, other in pairs:
        part.load_state_dict(other.state_dict())


def check_same_task(key: str, model: Path, theirs: Task, ours: Task) -> None:
    """Raise `RecipeError` unless a model has the classes, bands and scaling of the recipe's dataset."""
    for what, a, b in (
        ("classes", theirs.class_names, ours.class_names),
        ("bands", theirs.bands, ours.bands),
        ("scaling", (theirs.scale, theirs.offset), (ours.scale, ours.offset)),
    ):
        if a != b:
            raise RecipeError(
                f"{key}: {model} has the {what} {', '.join(map(str, a))}, {ours.name} has {', '.join(map(str, b))}. "
                "Give a model trained on this dataset, with the same order of classes and bands."
            )


def _shapes(part: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in part.state_dict().items()}


def _described(part: nn.Module) -> str:
    name = part.info.name if isinstance(part, Backbone) else type(part).__name__
    return f"{name} ({sum(p.numel() for p in part.parameters()) / 1e6:.3g} M parameters)"


class Method(nn.Module, ABC):
    """The training module: a Segmenter plus teachers, discriminators and averages.

    streams: contents of each training batch.
    """

    streams: tuple[StreamSpec, ...]

    def __init__(self) -> None:
        super().__init__()
        self.label_loss = LabelLoss()  # loss on labeled streams; the registry replaces it by the recipe's

    @abstractmethod
    def training_step(self, batch: Batch, step: int) -> StepOutput:
        """Losses of one micro-step; `step` counts optimizer steps from 0.

        Numbers that depend on it are tensors that `before_step` sets.
        """

    @abstractmethod
    def param_groups(self) -> Mapping[str, Sequence[ParamGroup]]:
        """Optimizer name (a key of `recipe.optimizers`) -> groups; every trainable parameter in exactly one."""

    @abstractmethod
    def deployable(self) -> Segmenter:
        """The module whose weights are written to model.safetensors."""

    def frozen_teachers(self) -> Iterable[Frozen]:
        """Frozen networks that run under autocast in `training_step` only; none by default."""
        return ()

    def before_step(self, step: int) -> None:
        """Set the tensors that depend on the step; called before every `training_step`. Does nothing by default.

        A captured `training_step` repeats its kernels with the numbers of the step in which it was captured.
        """

    def after_optimizer_step(self, step: int) -> None:
        """Update averages; called once after all optimizers have stepped. Does nothing by default."""

    def forward(self, batch: Batch, step: int) -> StepOutput:
        """`before_step` and `training_step`, so that DistributedDataParallel can wrap the whole method."""
        self.before_step(step)
        return self.training_step(batch, step)


def check_classes(tensors: Mapping[str, Tensor], classifier: str, task: Task, source: Path) -> None:
    """Raise `WeightsError` if the weight `classifier` (classes, ...) has another number of classes than the task."""
    weight = tensors.get(classifier)
    if weight is not None and weight.shape[:1] != (task.num_classes,):
        raise WeightsError(
            f"{source}: has {weight.shape[0] if weight.ndim else 0} classes, {task.name} has {task.num_classes}. "
            "Choose the dataset that the checkpoint was trained on."
        )


def write_imported(
    source: Path, tensors: Mapping[str, Tensor], segmenter: Segmenter, recipe: BaseRecipe, *, output: Path
) -> ModelHeader:
    """Fill a network with the renamed tensors of an authors' checkpoint and write it as a model file.

    Args:
        source: the checkpoint, for messages and the header.
        tensors: all of the network's tensors, under our names.
        segmenter: network of `recipe`; receives the tensors.
        recipe: its `ship` tells which of the checkpoint's weights `tensors` are.
        output: file to write.

    Returns:
        The header that was written.

    Raises:
        WeightsError: a tensor is missing, unexpected, or of another shape.
        MachineError: the file cannot be written.
    """
    load_into(segmenter, tensors, str(source))
    header = ModelHeader(
        recipe=recipe.model_dump(mode="json"),
        task=segmenter.task,
        backbones=backbone_infos(segmenter),
        training={"imported_from": source.name, "weights": recipe.ship},
        made_with={"rsseg": rsseg.__version__, "torch": torch.__version__},
    )
    write_model(output, segmenter.state_dict(), header)
    return header
