"""Training of KTDA: segmentation, auxiliary and distillation losses from one forward pass of the student."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsseg.backbones.backbone import Backbone, create_backbone
from rsseg.data.assembly import SampleKeys
from rsseg.data.streams import Batch, Samples, StreamSpec
from rsseg.errors import RecipeError
from rsseg.layers.blocks import cutmix, unrecorded_statistics
from rsseg.layers.decoders import FCNHead
from rsseg.layers.ema import Frozen
from rsseg.layers.losses import cosine_distance, pixel_accuracy, softened_kl
from rsseg.methods.base import LoadModel, Method, ParamGroup, Segmenter, StepOutput, check_same_task, start_from
from rsseg.methods.ktda.network import FeatureAlignment, KTDASegmenter, assemble_segmenter, fused, make_fam
from rsseg.methods.ktda.recipe import AuxConfig, DistillationConfig, KTDARecipe, TaskTeacherConfig
from rsseg.task import Task

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

    def forward(self, maps: Sequence[Tensor], aligned: Sequence[Tensor]) -> Tensor:
        """Weighted loss of one micro-step.

        Args:
            maps: float (B, D, h, w) per level, the teacher's of the same images.
            aligned: FAM's outputs, of the same shapes, or only their sum if fused.
        """
        loss = distillation_loss(aligned, [fused(maps)] if self.fuse else maps, self.settings)
        return self.weight * loss

    def teacher_maps(self, images: Tensor, keys: SampleKeys | None = None) -> Sequence[Tensor]:
        """The teacher's maps of images (B, C, H, W) in scaled units, without gradients; `keys` as in `Samples`."""
        teacher = cast(Backbone, self.teacher.module)
        return self.teacher.outputs(lambda x: teacher.forward_normalized(self._normalize(x)), images, keys)


class TaskTeacher(nn.Module):
    """A frozen network trained on the task, and the divergence of the student's probabilities from its own."""

    def __init__(self, segmenter: Segmenter, settings: TaskTeacherConfig, *, shared: Backbone | None = None) -> None:
        """Freeze the network; `shared` is its backbone, if that is also the teacher of the distillation."""
        super().__init__()
        self.frozen = Frozen(segmenter)
        self.settings = settings
        self._shared = (shared,)  # a part of the segmenter, not to be registered twice

    def logits(self, images: Tensor, keys: SampleKeys | None = None) -> tuple[Tensor, Sequence[Tensor] | None]:
        """float (B, C, H, W), scaled units -> float logits (B, K, H, W) and the maps of the shared backbone, which thus
        runs once; None if it is not shared. Without a graph; `keys` as in `Samples`.
        """
        logits, *maps = self.frozen.outputs(self._logits_and_maps, images, keys)
        return logits, maps or None

    def _logits_and_maps(self, images: Tensor) -> Sequence[Tensor]:
        """float (B, C, H, W), scaled units -> logits (B, K, H, W), and the maps of a shared backbone."""
        maps: list[Sequence[Tensor]] = []
        hook = None
        if self._shared[0] is not None:
            hook = self._shared[0].register_forward_hook(lambda _, __, output: maps.append(output))
        try:
            logits = cast(Segmenter, self.frozen.module).predict_logits(images)
        finally:
            if hook is not None:
                hook.remove()
        return [logits, *(maps[0] if maps else ())]

    def loss(self, student: Tensor, theirs: Tensor, valid: Tensor, mix: Tensor | None = None) -> Tensor:
        """Weighted divergence.

        Args:
            student: float logits (B, K, H, W); gradients flow.
            theirs: float logits (B, K, H, W) of this teacher.
            valid: bool (B, H, W), False for pixels to exclude.
            mix: bool (B, H, W), CutMix box of the student's images, which the teacher's logits then follow.
        """
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


class AuxHead(nn.Module):
    """An FCN head on one level, and the weight of its loss."""

    def __init__(self, head: FCNHead, *, level: int, weight: float) -> None:
        super().__init__()
        self.head, self.level, self.weight = head, level, weight

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """The decoder's inputs -> logits (B, K, h, w) at the level's resolution."""
        return self.head(features[self.level])  # type: ignore[no-any-return]


class KTDAMethod(Method):
    """Losses: `seg`, `aux` (`aux_0`, `aux_1`, ... if there are several), `distill`; of a task teacher `taught` and
    `taught_unlabeled`.
    """

    def __init__(
        self,
        recipe: KTDARecipe,
        segmenter: KTDASegmenter,
        *,
        aux_heads: Sequence[AuxHead],
        distillation: Distillation | None,
        side: FeatureAlignment | None = None,
        task_teacher: TaskTeacher | None = None,
    ) -> None:
        """Store the parts; `side` aligns the student's levels for the distillation if the network has no FAM."""
        super().__init__()
        self.recipe, self.segmenter = recipe, segmenter
        self.aux_heads = nn.ModuleList(aux_heads)
        self.distillation = distillation
        self.side = side
        self.task_teacher = task_teacher
        self.streams: tuple[StreamSpec, ...] = (StreamSpec("labeled", "train", masks=True, fill=segmenter.fill),)
        if task_teacher is not None and task_teacher.settings.unlabeled:
            self.streams += (StreamSpec("unlabeled", "train", masks=False, fill=segmenter.fill, strong_views=1),)

    def frozen_teachers(self) -> Iterable[Frozen]:
        """The teacher of maps and that of the task, where there are."""
        if self.distillation is not None:
            yield self.distillation.teacher
        if self.task_teacher is not None:
            yield self.task_teacher.frozen

    def before_step(self, step: int) -> None:
        """Set the weight of the distillation."""
        if self.distillation is not None:
            self.distillation.set_step(step)

    def training_step(self, batch: Batch, step: int) -> StepOutput:  # noqa: ARG002 - part of the interface
        """Losses of one micro-step on the stream `labeled`; accuracies in percent of the labeled pixels."""
        labeled = batch["labeled"]
        images, masks = labeled.images, labeled.labels
        student = self.segmenter.run(images)
        logits = self._at_size(student.logits, masks)
        losses = {"seg": self.label_loss(logits, masks, divisor=self.recipe.loss_divisor)}
        logs = {"acc": pixel_accuracy(logits, masks)}
        for i, module in enumerate(self.aux_heads):
            head = cast(AuxHead, module)
            suffix = f"_{i}" if len(self.aux_heads) > 1 else ""
            aux = self._at_size(head(student.features), masks)
            share = head.weight / len(self.aux_heads)
            losses[f"aux{suffix}"] = share * self.label_loss(aux, masks, divisor=self.recipe.loss_divisor)
            logs[f"aux{suffix}_acc"] = pixel_accuracy(aux, masks)
        theirs, maps = (None, None) if self.task_teacher is None else self.task_teacher.logits(images, labeled.keys)
        if self.distillation:
            aligned = student.aligned if self.recipe.student_passes == 1 else self.segmenter.align(images)
            if self.side is not None:
                aligned = self.side(aligned, images.shape[-2:])
            maps = self.distillation.teacher_maps(images, labeled.keys) if maps is None else maps
            losses["distill"] = self.distillation(maps, aligned)
        if self.task_teacher is not None and theirs is not None:
            losses["taught"] = self.task_teacher.loss(logits, theirs, labeled.valid)
            if "unlabeled" in batch:
                losses["taught_unlabeled"] = self._taught_unlabeled(batch["unlabeled"])
        return StepOutput(losses, logs)

    def _taught_unlabeled(self, samples: Samples) -> Tensor:
        """Divergence between the student on the strong view and the teacher on the crop. Batch norms record statistics
        of labeled crops only, as strong views do not resemble the images of prediction.
        """
        assert self.task_teacher is not None  # for the type checker
        assert samples.strong is not None  # the stream's spec requires it
        images, mix = samples.strong[:, 0], None
        if self.task_teacher.settings.cutmix and samples.mix is not None:
            mix = samples.mix[:, 0]
            images = cutmix(images, mix)
        with unrecorded_statistics(self.segmenter):
            logits = self.segmenter(images)
        theirs, _ = self.task_teacher.logits(samples.images, samples.keys)
        return self.task_teacher.loss(logits, theirs, samples.valid, mix)

    def param_groups(self) -> Mapping[str, Sequence[ParamGroup]]:
        """One optimizer, `main`, with one learning rate; exempt parameters form a group without weight decay."""
        decayed: list[nn.Parameter] = []
        exempt: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                (exempt if self._is_exempt(name, parameter) else decayed).append(parameter)
        groups = (ParamGroup(decayed), ParamGroup(exempt, weight_decay=0.0))
        return {"main": [group for group in groups if group.params]}

    def deployable(self) -> Segmenter:
        """The segmenter, without auxiliary heads and teacher."""
        return self.segmenter

    def _is_exempt(self, name: str, parameter: nn.Parameter) -> bool:
        match self.recipe.weight_decay_exempt:
            case "names_with_norm":
                return "norm" in name
            case "norms_and_biases":
                return parameter.ndim <= 1
            case "none":
                return False

    def _at_size(self, logits: Tensor, masks: Tensor) -> Tensor:
        """float32 logits at the size of the masks, for loss and accuracy."""
        return self.segmenter.to_size(logits, masks.shape[-2:])


def build_method(recipe: KTDARecipe, task: Task, load_model: LoadModel | None = None) -> KTDAMethod:
    """Build student and teachers with the weights that the recipe names, everything else untrained.

    Args:
        recipe: describes them.
        task: classes and bands.
        load_model: needed for a task teacher or a start model.

    Raises:
        RecipeError: parts of the recipe do not fit together, or the task teacher has another task.
        WeightsError: weights are missing or do not fit.
    """
    taught_by = None
    if recipe.task_teacher is not None and load_model is not None:
        taught_by = load_model(recipe.task_teacher.model)
        check_same_task("task_teacher.model", recipe.task_teacher.model, taught_by.task, task)
    student = create_backbone(recipe.student, task)
    teacher = create_backbone(recipe.teacher, task) if recipe.teacher else None
    segmenter = assemble_segmenter(recipe, task, student, teacher.info if teacher else None)
    start_from(segmenter, recipe.start, load_model)
    return assemble_method(recipe, segmenter, teacher, taught_by)


def assemble_method(
    recipe: KTDARecipe, segmenter: KTDASegmenter, teacher: Backbone | None, task_teacher: Segmenter | None = None
) -> KTDAMethod:
    """Build losses and auxiliary heads of a recipe for given networks; see `build_method`."""
    distillation = side = shared = None
    if teacher is None and task_teacher is not None and recipe.side:
        teacher = next(part for part in task_teacher.modules() if isinstance(part, Backbone))
        shared = teacher if recipe.teacher_input == "own" else None
    if teacher and recipe.fam:
        _check_grid(recipe, teacher)
        distillation = Distillation(
            teacher,
            recipe.distillation,
            total_steps=recipe.trainer.steps,
            fuse=recipe.fuse,
            normalize=segmenter.student.normalize if recipe.teacher_input == "student_normalized" else None,
        )
        side = make_fam(recipe.fam, segmenter.student.info, teacher.info) if recipe.side else None
    return KTDAMethod(
        recipe,
        segmenter,
        aux_heads=[make_aux_head(aux, segmenter.decoder.in_channels, segmenter.task.num_classes) for aux in recipe.aux],
        distillation=distillation,
        side=side,
        task_teacher=TaskTeacher(task_teacher, recipe.task_teacher, shared=shared)
        if task_teacher and recipe.task_teacher
        else None,
    )


def make_aux_head(config: AuxConfig, widths: Sequence[int], num_classes: int) -> AuxHead:
    """Build an auxiliary head on one of the decoder's inputs, which have `widths` channels."""
    if config.level >= len(widths):
        raise RecipeError(f"aux.level: {config.level}, but the decoder has {len(widths)} levels. Give a lower one.")
    head = FCNHead(
        widths[config.level],
        num_classes,
        channels=config.channels,
        num_convs=config.num_convs,
        concat_input=config.concat_input,
        dropout=config.dropout,
    )
    return AuxHead(head, level=config.level, weight=config.weight)


def _check_grid(recipe: KTDARecipe, teacher: Backbone) -> None:
    """Raise unless a fixed FAM grid equals the teacher's grid for the training crops."""
    crop, patch = recipe.data.augment_of("labeled").crop_size, teacher.info.patch_size
    if recipe.fam is None or recipe.fam.grid == "auto" or patch is None:
        return
    cells = -(-crop // patch)
    if recipe.fam.grid != cells:
        raise RecipeError(
            f"fam.grid: {recipe.fam.grid}, but the teacher makes {cells} x {cells} cells of a crop of {crop} pixels. "
            f"Set fam.grid to {cells} or auto."
        )
