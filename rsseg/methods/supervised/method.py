"""Plain supervised training: cross-entropy on labeled images, with the backbone trained, frozen or adapted."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Self, cast

from torch import Tensor, nn

from rsseg.backbones.backbone import Backbone
from rsseg.backbones.zoo import create_backbone
from rsseg.data.streams import Batch, StreamSpec
from rsseg.errors import RecipeError
from rsseg.layers.ema import Frozen
from rsseg.layers.lora import LowRankAdapters
from rsseg.layers.losses import pixel_accuracy
from rsseg.methods.base import Method, ParamGroup, Segmenter, StepOutput
from rsseg.methods.supervised.network import SupervisedSegmenter, assemble_segmenter, backbone_config
from rsseg.methods.supervised.recipe import SupervisedRecipe
from rsseg.task import Task


class SupervisedMethod(Method):
    """One loss, `seg`.

    A backbone that does not train is `Frozen`: no gradient, no optimizer, and not in the saved state.
    """

    def __init__(
        self, recipe: SupervisedRecipe, segmenter: SupervisedSegmenter, adapters: LowRankAdapters | None = None
    ) -> None:
        """Split the network into trained and frozen parts; `adapters` of the backbone belong to `tune: lora`."""
        super().__init__()
        self.recipe, self.decoder, self.adapters = recipe, segmenter.decoder, adapters
        self.backbone = segmenter.backbone if recipe.tune == "full" else None
        self.frozen = None if self.backbone is not None else Frozen(segmenter.backbone)
        # The shipped network shares the decoder, and the backbone unless there are adapters: then it has a copy, into
        # which they are merged. It is no submodule, so that its tensors are not saved twice.
        merged = None if adapters is None else segmenter.with_backbone(copy.deepcopy(segmenter.backbone))
        self._shipped = (merged or segmenter,)
        self.streams = (StreamSpec("labeled", split="train", masks=True, fill=segmenter.fill),)

    def training_step(self, batch: Batch, step: int) -> StepOutput:  # noqa: ARG002 - part of the interface
        """Loss of one micro-step on the stream `labeled`; accuracy in percent of the labeled pixels."""
        images, masks = batch["labeled"].images, batch["labeled"].labels
        logits = self._shipped[0].decode(self._maps(images), masks.shape[-2:])
        return StepOutput({"seg": self.label_loss(logits, masks)}, {"acc": pixel_accuracy(logits, masks)})

    def param_groups(self) -> Mapping[str, Sequence[ParamGroup]]:
        """One optimizer, `main`; groups by learning rate and weight decay, which norms and biases do not have."""
        groups: dict[tuple[float, float | None], list[nn.Parameter]] = defaultdict(list)
        for parameter, rate in self._rates():
            groups[rate, 0.0 if parameter.ndim <= 1 else None].append(parameter)
        return {"main": [ParamGroup(params, rate, decay) for (rate, decay), params in groups.items()]}

    def deployable(self) -> Segmenter:
        """The network without adapters; their current values are merged into its weights."""
        shipped = self._shipped[0]
        if self.adapters is not None and self.frozen is not None:
            self.adapters.merge(self.frozen.module, into=shipped.backbone)
        return shipped

    def _maps(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.backbone is not None:
            return cast(tuple[Tensor, ...], self.backbone(images))
        frozen = cast(Frozen, self.frozen)
        if self.adapters is None:
            return cast(tuple[Tensor, ...], frozen(images))
        with self.adapters.added_to(frozen.module):
            return cast(tuple[Tensor, ...], frozen.module(images))

    def _rates(self) -> Iterator[tuple[nn.Parameter, float]]:
        """Every trainable parameter with its learning-rate factor."""
        if self.backbone is not None:
            depths = self.backbone.parameters_by_depth()
            for depth, parameters in enumerate(depths):
                rate = self.recipe.layer_decay ** (len(depths) - 1 - depth)
                yield from ((p, rate) for p in parameters if p.requires_grad)
        for module in (self.decoder, self.adapters):
            if module is not None:
                yield from ((p, self.recipe.head_lr_scale) for p in module.parameters())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.adapters is not None:
            self._shipped[0].backbone._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def build_method(recipe: SupervisedRecipe, task: Task) -> SupervisedMethod:
    """Build the network with the backbone weights that the recipe names and an untrained decoder.

    Raises:
        RecipeError: parts of the recipe do not fit together.
        WeightsError: weights are missing or do not fit.
    """
    backbone = create_backbone(backbone_config(recipe), task)
    return assemble_method(recipe, assemble_segmenter(recipe, task, backbone))


def assemble_method(recipe: SupervisedRecipe, segmenter: SupervisedSegmenter) -> SupervisedMethod:
    """Build adapters and learning rates of a recipe for a given network; see `build_method`."""
    return SupervisedMethod(recipe, segmenter, _adapters(recipe, segmenter.backbone) if recipe.tune == "lora" else None)


def _adapters(recipe: SupervisedRecipe, backbone: Backbone) -> LowRankAdapters:
    name, config = backbone.info.name, recipe.lora
    if backbone.info.kind != "vit":
        raise RecipeError(
            f"tune: lora adapts the linear layers of a vision transformer, but the backbone {name} is a "
            f"{backbone.info.kind}. Set tune: full or frozen, or choose a ViT (`rsseg backbone ls`)."
        )
    try:
        return LowRankAdapters(backbone, config.targets, rank=config.rank, alpha=config.alpha)
    except ValueError as error:
        raise RecipeError(f"lora.targets: {name}: {error}.") from None
