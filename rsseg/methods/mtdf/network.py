"""The student of RS-MTDF, which is all that ships: backbone, feature translators, fusion and DPT head."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsseg.backbones.zoo import Backbone
from rsseg.layers.dpt import DPTHead, resize
from rsseg.methods.base import Segmenter, TileHint
from rsseg.task import Task


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
        assert self.project is not None
        weight = self.project.weight @ self.predict.weight
        bias = self.project.weight @ self.predict.bias + self.project.bias
        hidden = F.relu(_pointwise(self.expand, features))
        return F.linear(hidden.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


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
        tile: int = 518,
    ) -> None:
        """Join the parts.

        Args:
            backbone: four taps; the last one is translated and fused.
            head: takes the four maps.
            task: classes and bands.
            translators: by teacher name.
            fusion_weights: by teacher name, share of its features in the last map; empty: no fusion.
            student_weight: share of the student's own last map in the fusion.
            tile: training crop side in pixels, the preferred tile.
        """
        info = backbone.info
        # Attention sees the whole tile, so tiles stay at the training size.
        hint = TileHint(size=tile, overlap=tile // 4, flexible=info.kind == "pyramid")
        super().__init__(task, input_multiple=info.input_multiple, fill=info.mean, tile=hint)
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
        features = self._translator_inputs(images, maps[-1])
        back = {name: self._translator(name).forward_back(features[name]) for name in self.fusion_weights}
        return self._decode(self._fuse(maps, back), images)

    def forward_translated(self, images: Tensor, channel_mask: Tensor | None = None) -> StudentOutput:
        """Like `forward`, but also returns the predicted teacher maps.

        Args:
            images: float (B, C, H, W), scaled units.
            channel_mask: float (B, channels), factors of the channels of all maps that reach the head.
        """
        maps = self.backbone(images)
        features = self._translator_inputs(images, maps[-1])
        translated = {name: self._translator(name)(features[name]) for name in self.translators}
        if self.fusion_weights:
            maps = self._fuse(maps, {name: self._translator(name).back(translated[name]) for name in self.fusion_weights})
        if channel_mask is not None:
            maps = tuple(x * channel_mask[:, :, None, None] for x in maps)
        return StudentOutput(self._decode(maps, images), translated)

    def _translator(self, name: str) -> Translator:
        return self.translators[name]  # type: ignore[return-value]

    def _translator_inputs(self, images: Tensor, last: Tensor) -> dict[str, Tensor]:
        """Per teacher the student's features (B, C, h, w); one further pass per input size that needs one."""
        passes: dict[int, Tensor] = {}
        features = {}
        for name in self.translators:
            translator = self._translator(name)
            size = translator.input_size
            if size is None:
                features[name] = last
            elif translator.shared:
                grid = size // self.backbone.info.strides[-1]
                features[name] = resize(last, (grid, grid))
            else:
                if size not in passes:
                    passes[size] = self.backbone(resize(images, (size, size)))[-1]
                features[name] = passes[size]
        return features

    def _fuse(self, maps: Sequence[Tensor], back: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Mix the projected features into the last map. They are resized after the projection: fewer channels."""
        *finer, last = maps
        mixed = self.student_weight * last
        for name, weight in self.fusion_weights.items():
            mixed = mixed + weight * resize(back[name], (last.shape[-2], last.shape[-1]))
        return (*finer, mixed)

    def _decode(self, maps: Sequence[Tensor], images: Tensor) -> Tensor:
        return resize(self.head(maps), (images.shape[-2], images.shape[-1]))


def _pointwise(layer: nn.Module, features: Tensor) -> Tensor:
    """Apply a linear layer to the channels of (B, C, h, w). A ViT's maps are tokens seen as NCHW: no copy is made."""
    return layer(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]
