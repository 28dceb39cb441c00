"""Training of RS-MTDF: FixMatch with an averaged pseudo-labeller, and distillation from frozen teachers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsseg.backbones.backbone import Backbone
from rsseg.backbones.zoo import create_backbone
from rsseg.data.streams import Batch, Samples, StreamSpec
from rsseg.errors import RecipeError
from rsseg.layers.blocks import cutmix, has_batch_norm, resize, unrecorded_statistics
from rsseg.layers.ema import Ema, Frozen
from rsseg.methods.base import LoadModel, Method, ParamGroup, StepOutput, start_from
from rsseg.methods.mtdf.fixmatch import ClassThresholds, PseudoLabels, complementary_masks, pseudo_label_loss
from rsseg.methods.mtdf.network import MTDFSegmenter, StudentOutput, assemble_segmenter, crop_sizes, teacher_task
from rsseg.methods.mtdf.recipe import MTDFRecipe
from rsseg.task import Task


class Teacher(nn.Module):
    """A frozen backbone with its input preparation and its loss."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        input_size: int | None = None,
        bands: Sequence[int] | None = None,
        student_normalized: bool = False,
        grid: Literal["teacher", "student"] = "teacher",
        standardize: bool = False,
        loss_weight: float = 1.0,
    ) -> None:
        """See `TeacherConfig` for the arguments; `bands` are positions in the task's bands."""
        super().__init__()
        self.frozen = Frozen(backbone)
        self.input_size = input_size
        self.register_buffer("bands", None if bands is None else torch.tensor(bands), persistent=False)
        self.student_normalized = student_normalized
        self.grid = grid
        self.standardize = standardize
        self.loss_weight = loss_weight

    @torch.no_grad()
    def forward(self, images: Tensor, student: Backbone) -> Tensor:
        """float (B, C, H, W), scaled units -> the teacher's last map, float32 (B, D, h, w), without gradients."""
        backbone = cast(Backbone, self.frozen.module)
        if self.student_normalized:
            images = student.normalize(images)
        if self.bands is not None:
            images = images.index_select(1, cast(Tensor, self.bands))
        if self.input_size is not None:
            images = resize(images, (self.input_size, self.input_size), align_corners=True)
        maps = backbone.forward_normalized(images) if self.student_normalized else backbone(images)
        target = maps[-1].float()
        if self.standardize:
            target = F.layer_norm(target.movedim(1, -1), target.shape[1:2]).movedim(-1, 1)
        return target

    def loss(self, translated: Tensor, target: Tensor) -> Tensor:
        """Mean squared error between the predicted and the teacher's map (B, D, h, w), on the configured grid."""
        with torch.autocast(translated.device.type, enabled=False):
            translated = translated.float()
            if self.grid == "teacher":
                translated = resize(translated, target.shape[-2:], align_corners=True)
            else:
                target = resize(target, translated.shape[-2:], align_corners=True)
            return F.mse_loss(translated, target)


@dataclass(frozen=True)
class Settings:
    """Options of the method; see the recipe's field of the same name."""

    labeled_weight: float
    pseudo_weight: float = 0.0
    distill_weight: float = 0.0
    unlabeled: bool = True
    confidence: float = 0.95
    class_thresholds: bool = False
    pseudo_ramp_steps: float = 0.0
    loss_divisor: Literal["valid", "confident"] = "valid"
    strong_views: int = 1
    complementary_dropout: bool = False
    ema_decay: float = 0.996
    ship: Literal["student", "average"] = "student"
    head_lr_scale: float = 40.0


class MTDFMethod(Method):
    """The student, its average, which makes the pseudo-labels, and its teachers."""

    pseudo_weight: Tensor

    def __init__(self, student: MTDFSegmenter, teachers: Mapping[str, Teacher], settings: Settings) -> None:
        """Store the parts.

        Args:
            student: the network that ships, with one translator per teacher.
            teachers: by translator name; empty without distillation.
            settings: options of the method.
        """
        super().__init__()
        self.student = student
        self.teachers = nn.ModuleDict(teachers)
        self.settings = settings
        averaged = settings.unlabeled or settings.ship == "average"
        self.average = Ema(student, settings.ema_decay) if averaged else None
        adaptive = settings.unlabeled and settings.class_thresholds
        self.register_buffer("pseudo_weight", torch.tensor(settings.pseudo_weight), persistent=False)
        self.thresholds = ClassThresholds(student.task.num_classes, settings.confidence) if adaptive else None
        labeled = StreamSpec("labeled", "train", masks=True, fill=student.fill)
        unlabeled = StreamSpec("unlabeled", "train", False, student.fill, settings.strong_views)
        self.streams = (labeled, unlabeled) if settings.unlabeled else (labeled,)

    def before_step(self, step: int) -> None:
        """Set the weight of the pseudo-label loss."""
        s = self.settings
        ramp = min((step + 1) / s.pseudo_ramp_steps, 1.0) if s.pseudo_ramp_steps else 1.0
        self.pseudo_weight.fill_(ramp * s.pseudo_weight)

    def training_step(self, batch: Batch, step: int) -> StepOutput:  # noqa: ARG002 - part of the interface
        """Losses of one batch.

        The average labels the weak view of the unlabeled crops; the student is trained with these labels on the strong
        CutMix views. Teachers receive the same images as the student: labeled crops and strong views.
        """
        s, x = self.settings, batch["labeled"]
        weak: PseudoLabels | None = None
        views: list[Tensor] = []
        pseudo: list[PseudoLabels] = []
        if s.unlabeled:
            u = batch["unlabeled"]
            weak = self._pseudo_labels(u)
            views, pseudo = _strong_views(u, weak)
        images = torch.cat([x.images, *views])
        output = self._student_output(images, len(x.images), self._channel_mask(len(x.images), views))
        logits_x, *logits_u = torch.split(output.logits, [len(view) for view in (x.images, *views)])

        losses = {"seg": s.labeled_weight * self.label_loss(logits_x, _labels(x))}
        logs: dict[str, Tensor] = {}
        if weak is not None:
            threshold = s.confidence if self.thresholds is None else self.thresholds(weak)
            per_view = [
                pseudo_label_loss(logits, labels, threshold=threshold, divisor=s.loss_divisor)
                for logits, labels in zip(logits_u, pseudo, strict=True)
            ]
            losses["pseudo"] = self.pseudo_weight * torch.stack(per_view).mean()
            logs["confident_ratio"] = weak.confident_ratio(threshold)
        if self.teachers:
            errors = self._distillation(images, output.translated)
            losses["distill"] = s.distill_weight * torch.stack(list(errors.values())).mean()
            logs |= {f"distill_{name}": error.detach() for name, error in errors.items()}
        return StepOutput(losses, logs)

    def after_optimizer_step(self, step: int) -> None:
        """Update the average; in the first steps it is the plain mean of all students since step 0."""
        if self.average is not None:
            self.average.update(self.student, decay=ema_ratio(step, self.settings.ema_decay))

    def param_groups(self) -> Mapping[str, Sequence[ParamGroup]]:
        """The backbone at the optimizer's learning rate, the rest of the student at a multiple of it."""
        backbone = [p for p in self.student.backbone.parameters() if p.requires_grad]
        known = {id(p) for p in self.student.backbone.parameters()}
        rest = [p for p in self.student.parameters() if id(p) not in known]
        groups = (ParamGroup(backbone), ParamGroup(rest, lr_scale=self.settings.head_lr_scale))
        return {"main": [group for group in groups if group.params]}

    def deployable(self) -> MTDFSegmenter:
        """The student or its average, by the recipe's `ship`."""
        if self.settings.ship == "average" and self.average is not None:
            return self.average.module  # type: ignore[return-value]
        return self.student

    @torch.no_grad()
    def _pseudo_labels(self, u: Samples) -> PseudoLabels:
        assert self.average is not None  # for the type checker: there is one wherever pseudo-labels are used
        return PseudoLabels.of(self.average.module(u.images), u.valid)

    def _student_output(self, images: Tensor, labeled: int, channel_mask: Tensor | None) -> StudentOutput:
        """Student output for labeled crops and strong views.

        A student with batch norm processes them separately and records statistics of the labeled crops only, as
        strong views do not resemble the images of prediction.
        """
        if labeled == len(images) or not has_batch_norm(self.student):
            return self.student.forward_translated(images, channel_mask)
        masks = (None, None) if channel_mask is None else (channel_mask[:labeled], channel_mask[labeled:])
        weak = self.student.forward_translated(images[:labeled], masks[0])
        with unrecorded_statistics(self.student):
            strong = self.student.forward_translated(images[labeled:], masks[1])
        translated = {name: torch.cat([weak.translated[name], strong.translated[name]]) for name in weak.translated}
        return StudentOutput(torch.cat([weak.logits, strong.logits]), translated)

    def _channel_mask(self, labeled: int, views: Sequence[Tensor]) -> Tensor | None:
        """Factors (B, D) for the channels of all maps: the two strong views keep complementary halves."""
        if not self.settings.complementary_dropout:
            return None
        channels = self.student.backbone.info.channels[-1]
        masks = complementary_masks(len(views[0]), channels, device=views[0].device)
        return torch.cat([masks.new_ones(labeled, channels), masks])

    def _distillation(self, images: Tensor, translated: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Teacher name -> weighted error of the student's prediction of its map."""
        errors = {}
        for name, teacher in self.teachers.items():
            assert isinstance(teacher, Teacher)  # ModuleDict does not know the type of its values
            errors[name] = teacher.loss_weight * teacher.loss(translated[name], teacher(images, self.student.backbone))
        return errors


def ema_ratio(step: int, largest: float) -> float:
    """Decay of the average after optimizer step `step`, counted from 0 across resumed runs."""
    return min(1.0 - 1.0 / (step + 1), largest)


def _strong_views(u: Samples, weak: PseudoLabels) -> tuple[list[Tensor], list[PseudoLabels]]:
    """CutMix images and their labels, per strong view."""
    assert u.strong is not None  # the stream's spec requires both
    assert u.mix is not None
    boxes = u.mix.unbind(dim=1)
    views = [cutmix(strong, mix) for strong, mix in zip(u.strong.unbind(dim=1), boxes, strict=True)]
    return views, [weak.mixed(mix) for mix in boxes]


def _labels(x: Samples) -> Tensor:
    assert x.masks is not None  # the stream's spec requires them
    return x.masks


def build_method(recipe: MTDFRecipe, task: Task, load_model: LoadModel | None = None) -> MTDFMethod:
    """Build student and teachers with the weights that the recipe names, everything else untrained.

    Raises:
        RecipeError: parts of the recipe do not fit together.
        DataError: a teacher needs a band that the task does not have.
        WeightsError: weights are missing or do not fit.
    """
    backbone = create_backbone(recipe.student, task)
    teachers = {t.name: create_backbone(t.backbone, teacher_task(t, task)) for t in recipe.teachers}
    channels = {name: teacher.info.channels[-1] for name, teacher in teachers.items()}
    student = assemble_segmenter(recipe, task, backbone, channels)
    start_from(student, recipe.start, load_model)
    return assemble_method(recipe, student, teachers)


def assemble_method(recipe: MTDFRecipe, student: MTDFSegmenter, backbones: Mapping[str, Backbone]) -> MTDFMethod:
    """Build losses, average and teachers of a recipe for given networks; see `build_method`."""
    _check_sizes(recipe, student.backbone, backbones)
    teachers = {
        config.name: Teacher(
            backbones[config.name],
            input_size=config.input_size,
            bands=None if config.bands is None else [student.task.bands.index(band) for band in config.bands],
            student_normalized=config.teacher_input == "student_normalized",
            grid=config.grid,
            standardize=config.standardize,
            loss_weight=config.loss_weight,
        )
        for config in recipe.teachers
    }
    equal = 1.0 / (1 + recipe.unlabeled + bool(teachers))
    weights = (recipe.labeled_weight, recipe.pseudo_weight, recipe.distill_weight)
    labeled, pseudo, distill = (equal if weight is None else weight for weight in weights)
    settings = Settings(
        labeled_weight=labeled,
        pseudo_weight=pseudo,
        distill_weight=distill,
        unlabeled=recipe.unlabeled,
        confidence=recipe.confidence,
        class_thresholds=recipe.class_thresholds,
        pseudo_ramp_steps=recipe.pseudo_ramp * recipe.trainer.steps,
        loss_divisor=recipe.loss_divisor,
        strong_views=recipe.strong_views,
        complementary_dropout=recipe.complementary_dropout,
        ema_decay=recipe.ema_decay,
        ship=recipe.ship,
        head_lr_scale=recipe.head_lr_scale,
    )
    return MTDFMethod(student, teachers, settings)


def _check_sizes(recipe: MTDFRecipe, student: Backbone, teachers: Mapping[str, Backbone]) -> None:
    """Raise unless the input of every network consists of whole patches.

    A convolutional teacher accepts any size, as maps are resized to a common grid before the comparison.
    """
    crops = crop_sizes(recipe)
    if len(set(crops.values())) > 1:
        raise RecipeError(f"data: labeled and unlabeled crops share a batch, but their crop_size is {crops}. Set one.")
    crop = crops["labeled"]
    if student.info.patch_size is not None or recipe.decoder is None:  # other decoders resize levels of any size
        _check_side("data.augment.crop_size", crop, student)
    for config in recipe.teachers:
        key = f"teachers: input_size of {config.name!r}"
        if teachers[config.name].info.patch_size is not None:
            _check_side(key, config.input_size or crop, teachers[config.name])
        if config.input_size is not None:
            _check_side(key, config.input_size, student)


def _check_side(key: str, side: int, network: Backbone) -> None:
    multiple = network.info.input_multiple
    if side % multiple:
        below = side // multiple * multiple
        raise RecipeError(
            f"{key}: {side} pixels are not a multiple of {multiple}, as {network.info.name} needs. "
            f"Take {below or multiple} or {below + multiple}."
        )
