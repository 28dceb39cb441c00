"""The student of RS-MTDF, the network that ships: backbone, feature translators, fusion and DPT head."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsseg.backbones.backbone import Backbone, BackboneInfo, create_backbone
from rsseg.errors import RecipeError
from rsseg.layers.blocks import resize, resize_logits, unrecorded_statistics
from rsseg.layers.decoders import DPTHead
from rsseg.methods.base import Segmenter, preferred_tile
from rsseg.methods.mtdf.recipe import MTDFRecipe, TeacherConfig
from rsseg.methods.plain import fitting_decoder
from rsseg.task import Task, task_with_bands


@dataclass(frozen=True)
class StudentOutput:
    """Results of one forward pass that a training step uses.

    logits      float (B, K, H, W)
    translated  teacher name -> float (B, D, h, w), prediction of that teacher's map
    """

    logits: Tensor
    translated: Mapping[str, Tensor]


class Translator(nn.Module):
    """Predicts one teacher's map from the student's last map, and projects the prediction back for the fusion.

    All layers act on single positions.
    """

    def __init__(
        self,
        *,
        student_channels: int,
        teacher_channels: int,
        hidden: int,
        input_size: int | None = None,
        shared: bool = False,
        project: bool = True,
    ) -> None:
        """Build the layers.

        Args:
            student_channels: of the student's last map.
            teacher_channels: of the teacher's map.
            hidden: width of the hidden layer.
            input_size: side in pixels of the image that the student processes for this teacher; None: the full crop.
            shared: use the features of the full crop instead, resized to the grid of an image of `input_size`.
            project: build the projection back to the student's channels.
        """
        super().__init__()
        self.input_size = input_size
        self.shared = shared
        self.expand = nn.Linear(student_channels, hidden)
        self.predict = nn.Linear(hidden, teacher_channels)
        self.project = nn.Linear(teacher_channels, student_channels) if project else None

    def forward(self, features: Tensor) -> Tensor:
        """float (B, C, h, w) -> the predicted map, float (B, D, h, w)."""
        return _pointwise(self.predict, F.relu(_pointwise(self.expand, features)))

    def back(self, translated: Tensor) -> Tensor:
        """Predicted map float (B, D, h, w) -> float (B, C, h, w); only with `project`."""
        assert self.project is not None  # for the type checker: the owner built it
        return _pointwise(self.project, translated)

    def forward_back(self, features: Tensor) -> Tensor:
        """`back(forward(features))`, with the two consecutive linear layers merged."""
        weight, bias = self._merged()
        hidden = F.relu(_pointwise(self.expand, features))
        return F.linear(hidden.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)

    def folded(self, share: float) -> "FoldedTranslator":
        """`forward_back` times `share` as a separate module."""
        weight, bias = self._merged()
        return FoldedTranslator(self, weight * share, bias * share)

    def _merged(self) -> tuple[Tensor, Tensor]:
        """Weight (C, hidden) and bias (C) of `project` after `predict`."""
        assert self.project is not None  # for the type checker: the owner built it
        return self.project.weight @ self.predict.weight, self.project.weight @ self.predict.bias + self.project.bias


class FoldedTranslator(nn.Module):
    """A translator reduced to its share in the fusion, for prediction."""

    def __init__(self, translator: Translator, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.input_size = translator.input_size
        self.shared = translator.shared
        self.expand = translator.expand
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = nn.Parameter(bias.detach(), requires_grad=False)

    def forward_back(self, features: Tensor) -> Tensor:
        """float (B, C, h, w) of the student -> its share in the fused map, float (B, C, h, w)."""
        hidden = F.relu(_pointwise(self.expand, features))
        return F.linear(hidden.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)


class MTDFSegmenter(Segmenter):
    """The student with its translators."""

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        task: Task,
        *,
        translators: Mapping[str, Translator],
        fusion_weights: Mapping[str, float],
        student_weight: float = 0.8,
        fill: Sequence[float] | None = None,
        tile: int = 518,
        align_corners: bool = True,
    ) -> None:
        """Store the parts.

        Args:
            backbone: four maps; the last one is translated and fused.
            head: takes the four maps.
            task: classes and bands.
            translators: by teacher name.
            fusion_weights: by teacher name, share of its features in the last map; empty without fusion.
            student_weight: share of the student's own last map in the fusion.
            fill: per band, scaled units: value of pixels without data; None uses the normalization mean.
            tile: training crop side in pixels, the preferred tile of a transformer.
            align_corners: of the resize of the logits to the image.
        """
        info, hint = backbone.info, preferred_tile(backbone, tile)
        super().__init__(task, input_multiple=info.input_multiple, fill=fill or info.mean, tile=hint)
        self.backbone = backbone
        self.head = head
        self.translators = nn.ModuleDict(translators)
        self.fusion_weights = dict(fusion_weights)
        self.student_weight = student_weight
        self.align_corners = align_corners

    def start_parts(self) -> Mapping[str, Sequence[nn.Module]]:
        """See `Segmenter.start_parts`."""
        parts = {"backbone": (self.backbone,), "decoder": (self.head,)}
        return parts | ({"translators": (self.translators,)} if self.translators else {})

    def forward(self, images: Tensor) -> Tensor:
        """See `Segmenter.forward`. Each translator is merged with its projection."""
        maps = self.backbone(images)
        if not self.fusion_weights:
            return self._decode(maps, images)
        features = self._translator_inputs(images, maps[-1], self.fusion_weights)
        back = {name: self._translator(name).forward_back(features[name]) for name in self.fusion_weights}
        return self._decode(self._fuse(maps, back), images)

    def fold(self) -> None:
        """Merge translators with their projections and drop those that the fusion does not use; see `Segmenter.fold`.

        `forward` is unchanged up to rounding; `forward_translated` can no longer be called.
        """
        self.translators = nn.ModuleDict(
            {name: self._translator(name).folded(weight) for name, weight in self.fusion_weights.items()}
        )
        self.fusion_weights = dict.fromkeys(self.fusion_weights, 1.0)

    def forward_translated(self, images: Tensor, channel_mask: Tensor | None = None) -> StudentOutput:
        """`forward` that also returns the predicted teacher maps.

        Args:
            images: float (B, C, H, W), scaled units.
            channel_mask: float (B, channels), multiplied with the channels of all maps before the head.
        """
        maps = self.backbone(images)
        features = self._translator_inputs(images, maps[-1], self.translators)
        translated = {name: self._translator(name)(features[name]) for name in self.translators}
        if self.fusion_weights:
            maps = self._fuse(
                maps, {name: self._translator(name).back(translated[name]) for name in self.fusion_weights}
            )
        if channel_mask is not None:
            maps = tuple(x * channel_mask[:, :, None, None] for x in maps)
        return StudentOutput(self._decode(maps, images), translated)

    def _translator(self, name: str) -> Translator:
        return self.translators[name]  # type: ignore[return-value]

    def _translator_inputs(self, images: Tensor, last: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """Teacher name -> student features (B, C, h, w); runs the backbone once more per additional input size."""
        passes: dict[int, Tensor] = {}
        features = {}
        for name in names:
            translator = self._translator(name)
            size = translator.input_size
            if size is None:
                features[name] = last
            elif translator.shared:
                grid = size // self.backbone.info.strides[-1]
                features[name] = resize(last, (grid, grid), align_corners=True)
            else:
                if size not in passes:
                    # both passes use the same batch-norm statistics at prediction; only full images are recorded
                    with unrecorded_statistics(self.backbone):
                        passes[size] = self.backbone(resize(images, (size, size), align_corners=True))[-1]
                features[name] = passes[size]
        return features

    def _fuse(self, maps: Sequence[Tensor], back: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Mix projected features into the last map; resized after the projection, which has fewer channels."""
        *finer, last = maps
        mixed = self.student_weight * last
        for name, weight in self.fusion_weights.items():
            mixed = mixed + weight * resize(back[name], last.shape[-2:], align_corners=True)
        return (*finer, mixed)

    def _decode(self, maps: Sequence[Tensor], images: Tensor) -> Tensor:
        return resize_logits(self.head(maps), images.shape[-2:], align_corners=self.align_corners)


def _pointwise(layer: nn.Module, features: Tensor) -> Tensor:
    """Apply a linear layer to the channels of (B, C, h, w); a ViT's maps, views of tokens, are not copied."""
    return layer(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


def build_segmenter(recipe: MTDFRecipe, task: Task) -> MTDFSegmenter:
    """Build the network untrained, without opening a file or building a teacher.

    Raises:
        RecipeError: parts of the recipe do not fit together.
    """
    student = create_backbone(recipe.student, task, load_weights=False)
    with torch.device("meta"):  # only their widths are needed
        teachers = {
            config.name: create_backbone(config.backbone, teacher_task(config, task), load_weights=False)
            for config in recipe.teachers
        }
    return assemble_segmenter(recipe, task, student, {name: t.info.channels[-1] for name, t in teachers.items()})


def assemble_segmenter(
    recipe: MTDFRecipe, task: Task, student: Backbone, teacher_channels: Mapping[str, int]
) -> MTDFSegmenter:
    """Build translators and head of a recipe for a given student; see `build_segmenter`.

    Args:
        recipe: the whole recipe.
        task: classes and bands.
        student: returns four maps.
        teacher_channels: teacher name -> channels of its map.
    """
    info = student.info
    if recipe.complementary_dropout and len(set(info.channels)) > 1:
        raise RecipeError(
            f"complementary_dropout: needs maps of equal width; those of {info.name} have {info.channels} channels. "
            "Choose a ViT, or leave it out."
        )
    head = _make_head(recipe, info, task.num_classes)
    fused = {t.name: t.fusion_weight for t in recipe.teachers if recipe.fusion and t.fusion_weight > 0}
    translators = {
        config.name: Translator(
            student_channels=info.channels[-1],
            teacher_channels=teacher_channels[config.name],
            hidden=recipe.translator_width,
            input_size=config.input_size,
            shared=config.student_pass == "shared",
            project=config.name in fused,
        )
        for config in recipe.teachers
    }
    return MTDFSegmenter(
        student,
        head,
        task,
        translators=translators,
        fusion_weights=fused,
        student_weight=recipe.student_weight,
        fill=task.offset if recipe.padding == "black" else info.mean,
        tile=crop_sizes(recipe)["labeled"],
        align_corners=recipe.decoder is None or recipe.decoder.type == "dpt",
    )


def _make_head(recipe: MTDFRecipe, info: BackboneInfo, num_classes: int) -> nn.Module:
    if recipe.decoder is not None:
        return fitting_decoder(recipe.decoder, info, num_classes)
    try:
        return DPTHead(
            info.channels, info.strides, num_classes, widths=recipe.decoder_widths, features=recipe.decoder_features
        )
    except ValueError as error:
        raise RecipeError(f"student: {error}. Set student.out_indices.") from None


def teacher_task(config: TeacherConfig, task: Task) -> Task:
    """The task restricted to a teacher's bands.

    Raises:
        DataError: a band that the task does not have.
        RecipeError: the teacher's pretrained weights need three bands, but it would get another number.
    """
    seen = task if config.bands is None else task_with_bands(task, config.bands)
    if config.backbone.weights == "pretrained" and len(seen.bands) != 3:
        raise RecipeError(
            f"teachers: {config.name!r} was pretrained on red, green and blue and stays frozen, but would get "
            f"{list(seen.bands)}. Name three bands in its `bands`, or give weights for these bands."
        )
    return seen


def crop_sizes(recipe: MTDFRecipe) -> dict[str, int]:
    """Stream in use -> side of its training crops in pixels."""
    read = recipe.stream_names() if recipe.unlabeled else ("labeled",)
    return {name: recipe.data.augment_of(name).crop_size for name in read}
