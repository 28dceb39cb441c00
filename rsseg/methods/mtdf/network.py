"""The student of RS-MTDF, which is all that ships: backbone, feature translators, fusion and DPT head."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsseg.backbones.backbone import Backbone
from rsseg.backbones.zoo import create_backbone
from rsseg.errors import RecipeError
from rsseg.layers.blocks import resize, resize_logits, unrecorded_statistics
from rsseg.layers.dpt import DPTHead
from rsseg.methods.base import Segmenter, TileHint
from rsseg.methods.mtdf.recipe import MTDFRecipe, TeacherConfig
from rsseg.task import Task, task_with_bands


@dataclass(frozen=True)
class StudentOutput:
    """What one pass of the student gives for training.

    logits      float (B, K, H, W)
    translated  teacher name -> float (B, D, h, w): the prediction of that teacher's map
    """

    logits: Tensor
    translated: Mapping[str, Tensor]


class Translator(nn.Module):
    """Predicts one teacher's map from the student's last map, and leads the prediction back for the fusion.

    Every layer works on each position alone, so the order of layer and resize is free.
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
            input_size: side in pixels of the image that the student sees for this teacher; None: the full crop.
            shared: take the features of the full crop instead, resized to the grid of an image of `input_size`.
            project: build the way back to the student's channels.
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
        """`back(forward(features))` with the two layers that have no ReLU between them multiplied out."""
        weight, bias = self._multiplied_out()
        hidden = F.relu(_pointwise(self.expand, features))
        return F.linear(hidden.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)

    def folded(self, share: float) -> "FoldedTranslator":
        """`forward_back` times `share` as a module of its own."""
        weight, bias = self._multiplied_out()
        return FoldedTranslator(self, weight * share, bias * share)

    def _multiplied_out(self) -> tuple[Tensor, Tensor]:
        """Weight (C, hidden) and bias (C) of `project` after `predict`."""
        assert self.project is not None  # for the type checker: the owner built it
        return self.project.weight @ self.predict.weight, self.project.weight @ self.predict.bias + self.project.bias


class FoldedTranslator(nn.Module):
    """What is left of a translator where nothing but its share in the fusion is wanted."""

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
    """The student. Prediction needs the translators, but no teacher."""

    def __init__(
        self,
        backbone: Backbone,
        head: DPTHead,
        task: Task,
        *,
        translators: Mapping[str, Translator],
        fusion_weights: Mapping[str, float],
        student_weight: float = 0.8,
        fill: Sequence[float] | None = None,
        tile: int = 518,
    ) -> None:
        """Join the parts.

        Args:
            backbone: four maps; the last one is translated and fused.
            head: takes the four maps.
            task: classes and bands.
            translators: by teacher name.
            fusion_weights: by teacher name, share of its features in the last map; empty: no fusion.
            student_weight: share of the student's own last map in the fusion.
            fill: per band, scaled units: value of pixels without data; None takes the normalization mean.
            tile: training crop side in pixels, the preferred tile.
        """
        info = backbone.info
        # Attention sees the whole tile, so tiles stay at the training size.
        hint = TileHint(size=tile, overlap=tile // 4, flexible=info.kind == "pyramid")
        super().__init__(task, input_multiple=info.input_multiple, fill=fill or info.mean, tile=hint)
        self.backbone = backbone
        self.head = head
        self.translators = nn.ModuleDict(translators)
        self.fusion_weights = dict(fusion_weights)
        self.student_weight = student_weight

    def forward(self, images: Tensor) -> Tensor:
        """See `Segmenter.forward`. Translators and projections are multiplied out where training needs both apart."""
        maps = self.backbone(images)
        if not self.fusion_weights:
            return self._decode(maps, images)
        features = self._translator_inputs(images, maps[-1], self.fusion_weights)
        back = {name: self._translator(name).forward_back(features[name]) for name in self.fusion_weights}
        return self._decode(self._fuse(maps, back), images)

    def fold(self) -> None:
        """Multiply out translators and projections, and leave out what the fusion does not use; see `Segmenter.fold`.

        `forward` stays as it was up to rounding; `forward_translated` cannot be called any more.
        """
        self.translators = nn.ModuleDict(
            {name: self._translator(name).folded(weight) for name, weight in self.fusion_weights.items()}
        )
        self.fusion_weights = dict.fromkeys(self.fusion_weights, 1.0)

    def forward_translated(self, images: Tensor, channel_mask: Tensor | None = None) -> StudentOutput:
        """Like `forward`, but also returns the predicted teacher maps.

        Args:
            images: float (B, C, H, W), scaled units.
            channel_mask: float (B, channels), factors of the channels of all maps that reach the head.
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
        """Per named teacher the student's features (B, C, h, w); one further pass per input size that needs one."""
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
                    # At prediction batch norms of both passes share the statistics: those of the full images.
                    with unrecorded_statistics(self.backbone):
                        passes[size] = self.backbone(resize(images, (size, size), align_corners=True))[-1]
                features[name] = passes[size]
        return features

    def _fuse(self, maps: Sequence[Tensor], back: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Mix the projected features into the last map. They are resized after the projection: fewer channels."""
        *finer, last = maps
        mixed = self.student_weight * last
        for name, weight in self.fusion_weights.items():
            mixed = mixed + weight * resize(back[name], last.shape[-2:], align_corners=True)
        return (*finer, mixed)

    def _decode(self, maps: Sequence[Tensor], images: Tensor) -> Tensor:
        return resize_logits(self.head(maps), images.shape[-2:], align_corners=True)


def _pointwise(layer: nn.Module, features: Tensor) -> Tensor:
    """Apply a linear layer to the channels of (B, C, h, w). A ViT's maps are tokens seen as NCHW: no copy is made."""
    return layer(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


def build_segmenter(recipe: MTDFRecipe, task: Task) -> MTDFSegmenter:
    """The network with untrained weights; opens no file and builds no teacher.

    Raises:
        RecipeError: parts of the recipe do not fit together.
    """
    student = create_backbone(recipe.student, task, load_weights=False)
    with torch.device("meta"):  # only their widths matter here
        teachers = {
            config.name: create_backbone(config.backbone, teacher_task(config, task), load_weights=False)
            for config in recipe.teachers
        }
    return assemble_segmenter(recipe, task, student, {name: t.info.channels[-1] for name, t in teachers.items()})


def assemble_segmenter(
    recipe: MTDFRecipe, task: Task, student: Backbone, teacher_channels: Mapping[str, int]
) -> MTDFSegmenter:
    """Translators and head as the recipe says, round a given student; see `build_segmenter`.

    Args:
        recipe: the whole recipe.
        task: classes and bands.
        student: returns four maps.
        teacher_channels: by teacher name, channels of its map.
    """
    info = student.info
    if recipe.complementary_dropout and len(set(info.channels)) > 1:
        raise RecipeError(
            f"complementary_dropout: drops the same channels of all maps, but {info.name} has maps of {info.channels} "
            "channels. Choose a ViT, or leave it out."
        )
    try:
        head = DPTHead(
            info.channels,
            info.strides,
            task.num_classes,
            widths=recipe.decoder_widths,
            features=recipe.decoder_features,
        )
    except ValueError as error:
        raise RecipeError(f"student: {error}. Set student.out_indices.") from None
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
    )


def teacher_task(config: TeacherConfig, task: Task) -> Task:
    """The task as a teacher sees it: its bands only.

    Raises:
        DataError: a band that the task does not have.
        RecipeError: pretrained weights see red, green and blue, the teacher would get another number of bands.
    """
    seen = task if config.bands is None else task_with_bands(task, config.bands)
    if config.backbone.weights == "pretrained" and len(seen.bands) != 3:
        raise RecipeError(
            f"teachers: {config.name!r} was trained on red, green and blue and does not learn here; it would get "
            f"{list(seen.bands)}. Name three bands in its `bands`, or give weights of a network for these bands."
        )
    return seen


def crop_sizes(recipe: MTDFRecipe) -> dict[str, int]:
    """Side in pixels of the training crops, by stream that is read."""
    read = recipe.stream_names() if recipe.unlabeled else ("labeled",)
    return {name: recipe.data.augment_of(name).crop_size for name in read}
