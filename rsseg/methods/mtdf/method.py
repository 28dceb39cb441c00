"""Training of RS-MTDF: FixMatch with an averaged pseudo-labeller, and distillation from frozen teachers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsseg.backbones.backbone import Backbone, create_backbone
from rsseg.data.assembly import SampleKeys
from rsseg.data.streams import Batch, Samples, StreamSpec
from rsseg.errors import RecipeError
from rsseg.layers.blocks import cutmix, has_batch_norm, resize, unrecorded_statistics
from rsseg.layers.ema import Ema, Frozen
from rsseg.layers.losses import pixel_cross_entropy
from rsseg.methods.base import LoadModel, Method, ParamGroup, StepOutput, start_from
from rsseg.methods.mtdf.network import MTDFSegmenter, StudentOutput, assemble_segmenter, crop_sizes, teacher_task
from rsseg.methods.mtdf.recipe import MTDFRecipe, TeacherConfig
from rsseg.task import Task


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


class Teacher(nn.Module):
    """A frozen backbone with its input preparation and its loss."""

    def __init__(self, backbone: Backbone, config: TeacherConfig, bands: Sequence[int] | None = None) -> None:
        """Freeze the backbone; `bands` are its positions in the task's bands, None for all."""
        super().__init__()
        self.frozen, self.config = Frozen(backbone), config
        self.register_buffer("bands", None if bands is None else torch.tensor(bands), persistent=False)

    def forward(self, images: Tensor, student: Backbone, keys: SampleKeys | None = None) -> Tensor:
        """float (B, C, H, W), scaled units -> the teacher's last map, float32 (B, D, h, w), without gradients; `keys`
        as in `Samples`.
        """
        return self.frozen.outputs(lambda x: [self._target(x, student)], images, keys)[0]

    def _target(self, images: Tensor, student: Backbone) -> Tensor:
        backbone, size = cast(Backbone, self.frozen.module), self.config.input_size
        student_normalized = self.config.teacher_input == "student_normalized"
        if student_normalized:
            images = student.normalize(images)
        if self.bands is not None:
            images = images.index_select(1, cast(Tensor, self.bands))
        if size is not None:
            images = resize(images, (size, size), align_corners=True)
        maps = backbone.forward_normalized(images) if student_normalized else backbone(images)
        target = maps[-1].float()
        if self.config.standardize:
            target = F.layer_norm(target.movedim(1, -1), target.shape[1:2]).movedim(-1, 1)
        return target

    def loss(self, translated: Tensor, target: Tensor) -> Tensor:
        """Mean squared error between the predicted and the teacher's map (B, D, h, w), on the configured grid."""
        with torch.autocast(translated.device.type, enabled=False):
            translated = translated.float()
            if self.config.grid == "teacher":
                translated = resize(translated, target.shape[-2:], align_corners=True)
            else:
                target = resize(target, translated.shape[-2:], align_corners=True)
            return F.mse_loss(translated, target)


class MTDFMethod(Method):
    """The student, its average, which makes the pseudo-labels, and its teachers."""

    ramp: Tensor

    def __init__(self, recipe: MTDFRecipe, student: MTDFSegmenter, teachers: Mapping[str, Teacher]) -> None:
        """Store the parts.

        Args:
            recipe: options of the method.
            student: the network that ships, with one translator per teacher.
            teachers: by translator name; empty without distillation.
        """
        super().__init__()
        self.recipe, self.student = recipe, student
        self.teachers = nn.ModuleDict(teachers)
        given = {"seg": recipe.labeled_weight, "pseudo": recipe.pseudo_weight, "distill": recipe.distill_weight}
        equal = 1.0 / (1 + recipe.unlabeled + bool(teachers))
        self.loss_weights = {name: equal if weight is None else weight for name, weight in given.items()}
        averaged = recipe.unlabeled or recipe.ship == "average"
        self.average = Ema(student, recipe.ema_decay) if averaged else None
        adaptive = recipe.unlabeled and recipe.class_thresholds
        self.thresholds = ClassThresholds(student.task.num_classes, recipe.confidence) if adaptive else None
        self.register_buffer("ramp", torch.empty(()), persistent=False)
        self.before_step(0)
        labeled = StreamSpec("labeled", "train", masks=True, fill=student.fill)
        unlabeled = StreamSpec("unlabeled", "train", False, student.fill, recipe.strong_views)
        self.streams = (labeled, unlabeled) if recipe.unlabeled else (labeled,)

    def before_step(self, step: int) -> None:
        """Set the factor of the pseudo-labels' weight."""
        steps = self.recipe.pseudo_ramp * self.recipe.trainer.steps
        self.ramp.fill_(min((step + 1) / steps, 1.0) if steps else 1.0)

    def training_step(self, batch: Batch, step: int) -> StepOutput:  # noqa: ARG002 - part of the interface
        """Losses of one batch.

        The average labels the weak view of the unlabeled crops; the student is trained with these labels on the strong
        CutMix views. Teachers receive the same images as the student: labeled crops and strong views.
        """
        recipe, x = self.recipe, batch["labeled"]
        weak: PseudoLabels | None = None
        views: list[Tensor] = []
        pseudo: list[PseudoLabels] = []
        if recipe.unlabeled:
            u = batch["unlabeled"]
            weak = self._pseudo_labels(u)
            views, pseudo = _strong_views(u, weak)
        images = torch.cat([x.images, *views])
        output = self._student_output(images, len(x.images), self._channel_mask(len(x.images), views))
        logits_x, *logits_u = torch.split(output.logits, [len(view) for view in (x.images, *views)])

        losses = {"seg": self.loss_weights["seg"] * self.label_loss(logits_x, x.labels)}
        logs: dict[str, Tensor] = {}
        if weak is not None:
            threshold = recipe.confidence if self.thresholds is None else self.thresholds(weak)
            per_view = [
                pseudo_label_loss(logits, labels, threshold=threshold, divisor=recipe.loss_divisor)
                for logits, labels in zip(logits_u, pseudo, strict=True)
            ]
            losses["pseudo"] = self.ramp * self.loss_weights["pseudo"] * torch.stack(per_view).mean()
            logs["confident_ratio"] = weak.confident_ratio(threshold)
        if self.teachers:
            errors = self._distillation(images, x.keys, output.translated)
            losses["distill"] = self.loss_weights["distill"] * torch.stack(list(errors.values())).mean()
            logs |= {f"distill_{name}": error.detach() for name, error in errors.items()}
        return StepOutput(losses, logs)

    def frozen_teachers(self) -> Iterable[Frozen]:
        """The backbones of all teachers."""
        return [cast(Teacher, teacher).frozen for teacher in self.teachers.values()]

    def after_optimizer_step(self, step: int) -> None:
        """Update the average; in the first steps it is the plain mean of all students since step 0."""
        if self.average is not None:
            self.average.update(self.student, decay=ema_ratio(step, self.recipe.ema_decay))

    def param_groups(self) -> Mapping[str, Sequence[ParamGroup]]:
        """The backbone at the optimizer's learning rate, the rest of the student at a multiple of it."""
        backbone = [p for p in self.student.backbone.parameters() if p.requires_grad]
        known = {id(p) for p in self.student.backbone.parameters()}
        rest = [p for p in self.student.parameters() if id(p) not in known]
        groups = (ParamGroup(backbone), ParamGroup(rest, lr_scale=self.recipe.head_lr_scale))
        return {"main": [group for group in groups if group.params]}

    def deployable(self) -> MTDFSegmenter:
        """The student or its average, by the recipe's `ship`."""
        if self.recipe.ship == "average" and self.average is not None:
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
        if not self.recipe.complementary_dropout:
            return None
        channels = self.student.backbone.info.channels[-1]
        masks = complementary_masks(len(views[0]), channels, device=views[0].device)
        return torch.cat([masks.new_ones(labeled, channels), masks])

    def _distillation(
        self, images: Tensor, keys: SampleKeys | None, translated: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Teacher name -> weighted error of the student's prediction of its map; `keys` are those of the first images,
        the labeled ones.
        """
        known = 0 if keys is None else len(keys.keys)
        parts = [(part, named) for part, named in ((images[:known], keys), (images[known:], None)) if len(part)]
        errors = {}
        for name, teacher in self.teachers.items():
            assert isinstance(teacher, Teacher)  # ModuleDict does not know the type of its values
            target = torch.cat([teacher(part, self.student.backbone, named) for part, named in parts])
            error = teacher.loss(translated[name], target)
            errors[name] = teacher.config.loss_weight * error
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
            config,
            bands=None if config.bands is None else [student.task.bands.index(band) for band in config.bands],
        )
        for config in recipe.teachers
    }
    return MTDFMethod(recipe, student, teachers)


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
