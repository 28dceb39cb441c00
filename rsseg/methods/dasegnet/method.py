"""Training of ST-DASegNet: adversarial alignment and self-training in one summed loss."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rsseg.backbones.backbone import create_backbone
from rsseg.data.streams import Batch, Samples, StreamSpec
from rsseg.errors import RecipeError
from rsseg.layers.losses import cross_entropy
from rsseg.methods.base import LoadModel, Method, ParamGroup, StepOutput, start_from
from rsseg.methods.dasegnet.adversarial import (
    Alignment,
    PatchDiscriminator,
    accepts_map,
    adversarial_terms,
    smallest_map,
)
from rsseg.methods.dasegnet.network import DASegNet, Styles, build_decoder, build_segmenter
from rsseg.methods.dasegnet.recipe import DASegNetRecipe
from rsseg.methods.dasegnet.self_training import Teacher, WeightedLabels, hide_patches, pseudo_labels, strong_view
from rsseg.task import Task


@dataclass(frozen=True)
class Logits:
    """Both decoders' logits (B, K, h, w) of the same images."""

    source: Tensor
    target: Tensor


@dataclass(frozen=True)
class PseudoLabeledView:
    """A view of the target images for self-training: the students' logits and the pseudo-labels."""

    name: str
    weight: float
    logits: Logits
    pseudo: WeightedLabels


@dataclass(frozen=True)
class Passes:
    """Results of all forward passes of a step; `target` is None if neither a loss nor the teacher needs it."""

    source: Styles
    logits: Logits
    target: Styles | None = None
    pseudo_views: tuple[PseudoLabeledView, ...] = ()


class DASegNetMethod(Method):
    """Trains all parts in one backward pass: discriminators get detached features, students detached discriminators.

    Each parameter thus gets gradients from its own losses only, which equals the published alternation of optimizers.
    """

    class_weights_source: Tensor | None
    class_weights_target: Tensor | None

    def __init__(
        self,
        recipe: DASegNetRecipe,
        segmenter: DASegNet,
        *,
        discriminators: tuple[PatchDiscriminator, PatchDiscriminator] | None,
        teacher: Teacher | None,
        class_weights: tuple[Tensor | None, Tensor | None],
        streams: Sequence[StreamSpec],
    ) -> None:
        """Store the parts; loss weights and options come from the recipe.

        Args:
            recipe: has adversarial training or self-training only if their parts are given.
            segmenter: the network that is trained and shipped.
            discriminators: for source style and target style; None without adversarial training.
            teacher: labels target images; None without self-training.
            class_weights: float (K,) for the cross-entropies of the source and the target decoder; None: all equal.
            streams: source, and target unless the run is source-only.
        """
        super().__init__()
        self.recipe = recipe
        self.streams = tuple(streams)
        self.segmenter = segmenter
        self.disc_source: PatchDiscriminator | None = discriminators[0] if discriminators else None
        self.disc_target: PatchDiscriminator | None = discriminators[1] if discriminators else None
        self.teacher = teacher
        for style, weights in zip(("source", "target"), class_weights, strict=True):
            self.register_buffer(f"class_weights_{style}", weights, persistent=False)

    def training_step(self, batch: Batch, step: int) -> StepOutput:  # noqa: ARG002 - the interface's
        """Losses of one micro-step on the streams `source` and `target`."""
        return self.losses_of(self.passes(batch), batch)

    def passes(self, batch: Batch) -> Passes:
        """Run the students on both domains, the teacher, then the students on further views of the target."""
        source, target = batch["source"], batch.get("target")
        if target is None or not self.recipe.students_see_target:
            (view,), target_view = self.segmenter.styles(source.images), None
        else:
            view, target_view = self.segmenter.styles(source.images, target.images)
        logits = self._decode(view)
        pseudo_views = () if target is None else self._pseudo_labeled_views(source, target, target_view)
        return Passes(view, logits, target_view, pseudo_views)

    def losses_of(self, passes: Passes, batch: Batch) -> StepOutput:
        """Weighted losses of a step. Logs: unweighted cross-entropies per decoder, losses of the discriminators, and
        the fraction of confident pixels.
        """
        source, target = batch["source"], batch.get("target")
        seg = self._losses(self.label_loss, passes.logits, source.labels)
        losses = {"seg": seg[0] + seg[1]}
        logs = {"seg_source": seg[0].detach(), "seg_target": seg[1].detach()}
        for view in passes.pseudo_views:
            taught = self._losses(cross_entropy, view.logits, view.pseudo.labels, pixel_weights=view.pseudo.weights)
            losses[view.name] = view.weight * (taught[0] + taught[1])
            logs |= {f"{view.name}_source": taught[0].detach(), f"{view.name}_target": taught[1].detach()}
            logs["pseudo_ratio"] = view.pseudo.ratio
        if target is not None and passes.target is not None and self.recipe.adversarial is not None:
            sizes = (source.images.shape[-2:], target.images.shape[-2:])
            alignments = (
                Alignment(passes.source.source[-1], passes.target.source[-1], *sizes),
                Alignment(passes.target.target[-1], passes.source.target[-1], *reversed(sizes)),
            )
            for (style, discriminator), alignment in zip(self._discriminators(), alignments, strict=True):
                terms = adversarial_terms(discriminator, alignment, self.recipe.adversarial)
                losses |= {f"adv_{style}": terms.align, f"disc_{style}": terms.real + terms.fake}
                logs |= {f"disc_{style}_real": terms.real.detach(), f"disc_{style}_fake": terms.fake.detach()}
        return StepOutput(losses, logs)

    def param_groups(self) -> Mapping[str, Sequence[ParamGroup]]:
        """`main` trains students, neck and decoders; each discriminator has its own optimizer."""
        net = self.segmenter
        decayed, exempt = split_norms((net.backbone_source, net.backbone_target), self.recipe.weight_decay_exempt)
        neck = [] if net.neck is None else list(net.neck.parameters())
        decoders = [*net.decoder_source.parameters(), *net.decoder_target.parameters()]
        groups = {
            "main": [
                ParamGroup(decayed),
                ParamGroup(exempt, weight_decay=0.0),
                ParamGroup(neck),
                ParamGroup(decoders, lr_scale=self.recipe.head_lr_scale),
            ]
        }
        groups["main"] = [group for group in groups["main"] if group.params]
        for style, discriminator in self._discriminators():
            groups[f"disc_{style}"] = [ParamGroup(list(discriminator.parameters()))]
        return groups

    def deployable(self) -> DASegNet:
        """The segmenter: students, neck and decoders."""
        return self.segmenter

    def after_optimizer_step(self, step: int) -> None:
        """Update the teacher's averages."""
        if self.teacher is not None:
            self.teacher.update(self.segmenter, step)

    def _pseudo_labeled_views(
        self, source: Samples, target: Samples, view: Styles | None
    ) -> tuple[PseudoLabeledView, ...]:
        """Pseudo-labeled views of target images; `view`: the students' maps of the unchanged images, if available."""
        config = self.recipe.self_training
        if config is None or self.teacher is None:
            return ()
        # before the teacher, which may use the students' decoders and so change their running statistics
        same = self._decode(view) if view is not None and config.learns_from_teachers_image else None
        logits = self.teacher(self.segmenter, target.images, view)
        pseudo = pseudo_labels(logits, target.images.shape[-2:], target.valid, config)
        if same is not None:
            pseudo_views = [PseudoLabeledView("pseudo", config.weight, same, pseudo)]
        else:
            images, mixed = strong_view(source, target, pseudo, config)
            pseudo_views = [
                PseudoLabeledView("pseudo", config.weight, self._decode(*self.segmenter.styles(images)), mixed)
            ]
        if config.masked is not None:
            masked = config.masked
            images = hide_patches(target.images, self.segmenter.fill, patch=masked.patch, ratio=masked.ratio)
            seen = self._decode(*self.segmenter.styles(images))
            pseudo_views.append(PseudoLabeledView("masked", config.weight * masked.weight, seen, pseudo))
        return tuple(pseudo_views)

    def _discriminators(self) -> Sequence[tuple[str, PatchDiscriminator]]:
        """Style -> discriminator; none without adversarial training."""
        styles = (("source", self.disc_source), ("target", self.disc_target))
        return [(style, discriminator) for style, discriminator in styles if discriminator is not None]

    def _decode(self, view: Styles) -> Logits:
        return Logits(
            self.segmenter.decoder_source(view.refined_source), self.segmenter.decoder_target(view.refined_target)
        )

    def _losses(
        self, loss: Callable[..., Tensor], logits: Logits, labels: Tensor, **options: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Losses of both decoders, source style first."""
        divisor = self.recipe.loss_divisor
        return (
            loss(logits.source, labels, class_weights=self.class_weights_source, divisor=divisor, **options),
            loss(logits.target, labels, class_weights=self.class_weights_target, divisor=divisor, **options),
        )


def split_norms(
    backbones: Sequence[nn.Module], rule: Literal["names_with_norm", "norms", "none"]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters with and without weight decay; see `DASegNetRecipe.weight_decay_exempt`."""
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for backbone in backbones:
        for name, module in backbone.named_modules():
            match rule:
                case "names_with_norm":  # the published code gives the last norm of a stage another name
                    free = isinstance(module, nn.LayerNorm) and re.search(r"stages\.\d+\.norm$", name) is None
                case "norms":
                    free = isinstance(module, nn.LayerNorm | nn.GroupNorm | _BatchNorm)
                case "none":
                    free = False
            parameters = [p for p in module.parameters(recurse=False) if p.requires_grad]
            (exempt if free else decayed).extend(parameters)
    return decayed, exempt


FreshPart = Callable[[str], nn.Module]
"""Name of a part of the student ("" for all of it) -> a new such module with random weights."""


def build_method(recipe: DASegNetRecipe, task: Task, load_model: LoadModel | None = None) -> DASegNetMethod:
    """Build both students with the weights that the recipe names, everything else untrained.

    Raises:
        RecipeError: class weights of the wrong length, crops too small for the discriminators, batches too small.
        WeightsError: weights are missing or do not fit.
    """
    check_class_weights(recipe, task)
    segmenter = build_segmenter(recipe, task, load_weights=True)
    start_from(segmenter, recipe.start, load_model)

    def fresh(part: str) -> nn.Module:
        match part:
            case "backbone_target":
                return create_backbone(recipe.backbone, task, load_weights=False)
            case "decoder_source" | "decoder_target":
                return build_decoder(recipe.decoder, segmenter.decoder_channels, task.num_classes)
            case _:
                return build_segmenter(recipe, task)

    return assemble_method(recipe, segmenter, fresh)


def assemble_method(recipe: DASegNetRecipe, segmenter: DASegNet, fresh: FreshPart) -> DASegNetMethod:
    """Build discriminators and teacher of a recipe for a given network; see `build_method`."""
    check_batches(recipe)
    info = segmenter.backbone_source.info
    discriminators = None
    if recipe.adversarial is not None:
        config = recipe.adversarial
        first, second = (
            PatchDiscriminator(info.channels[-1], base_channels=config.base_channels, convs=config.convs)
            for _ in range(2)
        )
        check_crops(recipe, stride=info.strides[-1], strides=first.strides)
        discriminators = (first, second)
    teacher = None
    strong_views = 0
    if recipe.self_training is not None:
        teacher = Teacher(recipe.self_training.teacher, segmenter, fresh)
        strong_views = 1 if recipe.self_training.student_view == "strong" else 0
    streams = [StreamSpec("source", split="train", masks=True, fill=segmenter.fill)]
    if recipe.uses_target:
        streams.append(StreamSpec("target", split="train", masks=False, fill=segmenter.fill, strong_views=strong_views))
    source_weights, target_weights = (
        None if weights is None else torch.tensor(weights)
        for weights in (recipe.source_decoder_weights, recipe.target_decoder_weights)
    )
    return DASegNetMethod(
        recipe,
        segmenter,
        discriminators=discriminators,
        teacher=teacher,
        class_weights=(source_weights, target_weights),
        streams=streams,
    )


def check_class_weights(recipe: DASegNetRecipe, task: Task) -> None:
    """Raise `RecipeError` unless every list of class weights has one entry per class."""
    lists = {
        "source_decoder_weights": recipe.source_decoder_weights,
        "target_decoder_weights": recipe.target_decoder_weights,
    }
    if recipe.self_training is not None:
        weights = recipe.self_training.class_weights
        short = weights is not None and len(weights) < task.num_classes
        if not (short and recipe.self_training.missing_class_weights == "class_index"):
            lists["self_training.class_weights"] = weights
    for key, weights in lists.items():
        if weights is not None and len(weights) != task.num_classes:
            raise RecipeError(
                f"{key} has {len(weights)} entries, {task.name} has {task.num_classes} classes: "
                f"{list(task.class_names)}. Give one weight per class, in this order."
            )


def check_crops(recipe: DASegNetRecipe, *, stride: int, strides: tuple[int, ...]) -> None:
    """Raise `RecipeError` for crops whose last features are too small for discriminators with these strides."""
    for stream in recipe.stream_names():
        crop = recipe.data.augment_of(stream).crop_size
        side = -(-crop // stride)
        if not accepts_map((side, side), strides):
            raise RecipeError(
                f"stream {stream!r}: crops of {crop} pixels give features of {side} x {side}, too small for the "
                f"discriminators. The smallest legal crop_size is {smallest_map(strides) * stride}; or lower "
                "adversarial.convs."
            )


def check_batches(recipe: DASegNetRecipe) -> None:
    """Raise `RecipeError` for batches and crops that the decoder or ClassMix cannot use."""
    trainer = recipe.trainer
    used = recipe.stream_names() if recipe.uses_target else ("source",)
    smallest = min(trainer.batch_of(stream) for stream in used)
    if recipe.decoder.type == "deeplabv3plus" and smallest < 2:
        raise RecipeError(
            "trainer.batch_size: DeepLabV3+ pools each image to one value per channel, so its batch norm needs 2 or "
            "more images per stream. Set batch_size: 2 (and grad_accum_steps lower)."
        )
    mixes = recipe.self_training is not None and recipe.self_training.class_mix
    sizes = [recipe.data.augment_of(stream).crop_size for stream in recipe.stream_names()]
    if mixes and sizes[0] != sizes[1]:
        raise RecipeError(
            f"self_training.class_mix: source crops have {sizes[0]} pixels, target crops {sizes[1]}. "
            "Give both streams the same crop_size."
        )
