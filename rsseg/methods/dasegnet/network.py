"""The network that ships: two students, the disentangled neck, and two decoders whose logits are averaged."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rsseg.backbones.backbone import Backbone
from rsseg.backbones.zoo import create_backbone
from rsseg.layers.blocks import has_batch_norm, resize_logits
from rsseg.layers.decoders import SegFormerHead, SeparableASPPHead
from rsseg.methods.base import Segmenter, TileHint
from rsseg.methods.dasegnet.neck import DisentangledNeck
from rsseg.methods.dasegnet.recipe import DASegNetRecipe, DecoderConfig
from rsseg.task import Task

Maps = tuple[Tensor, ...]


@dataclass(frozen=True)
class Styles:
    """Feature maps of both students for the same images, one per level: raw, and refined by the neck."""

    source: Maps
    target: Maps
    refined_source: Maps
    refined_target: Maps


class DASegNet(Segmenter):
    """Two students, in source style and target style, that both process every image."""

    def __init__(
        self,
        task: Task,
        backbones: tuple[Backbone, Backbone],
        decoders: tuple[nn.Module, nn.Module],
        *,
        neck: DisentangledNeck | None,
        tile: TileHint,
        side_by_side: bool = False,
    ) -> None:
        """Store the parts, source style first.

        Args:
            task: classes and bands.
            backbones: two backbones of the same architecture.
            decoders: refined maps of all levels -> logits.
            neck: None passes the students' maps to their decoders unchanged.
            tile: preferred tiling.
            side_by_side: run the students on two CUDA streams.
        """
        info = backbones[0].info
        super().__init__(task, input_multiple=info.input_multiple, fill=info.mean, tile=tile)
        self.backbone_source, self.backbone_target = backbones
        self.neck = neck
        self.side_by_side = side_by_side
        self.decoder_source, self.decoder_target = decoders
        channels = backbones[0].info.channels
        self.decoder_channels: tuple[int, ...] = channels if neck is None else neck.out_channels
        self.batching = not has_batch_norm(backbones[0])

    def start_parts(self) -> Mapping[str, Sequence[nn.Module]]:
        """See `Segmenter.start_parts`. A plain network initializes both students, and without neck both decoders."""
        parts = {"backbone": (self.backbone_source, self.backbone_target)}
        return parts if self.neck is not None else parts | {"decoder": (self.decoder_source, self.decoder_target)}

    def forward(self, images: Tensor) -> Tensor:
        """float (B, C, H, W) in scaled units -> mean logits of both decoders (B, K, H, W)."""
        return resize_logits(self.low_resolution_logits(images), images.shape[-2:])

    def low_resolution_logits(self, images: Tensor) -> Tensor:
        """See `Segmenter.low_resolution_logits`."""
        (view,) = self.styles(images)
        return (self.decoder_source(view.refined_source) + self.decoder_target(view.refined_target)) / 2  # type: ignore[no-any-return]

    def styles(self, *batches: Tensor) -> list[Styles]:
        """Maps of several image batches, such as source and target.

        Batches of the same shape are concatenated, except for students with batch norm, which must not mix domains and
        process them in the given order.
        """
        if len(batches) > 1 and self.batching and len({batch.shape[1:] for batch in batches}) == 1:
            (joint,) = self.styles(torch.cat(batches))
            return _split(joint, [len(batch) for batch in batches])
        pairs = [self._students(batch) for batch in batches]
        return [Styles(source, target, *self.refine(source, target)) for source, target in pairs]

    def refine(self, source: Maps, target: Maps) -> tuple[Maps, Maps]:
        """Both styles of the same images -> the decoders' inputs."""
        return (source, target) if self.neck is None else self.neck(source, target)

    def _students(self, images: Tensor) -> tuple[Maps, Maps]:
        if not (self.side_by_side and images.is_cuda):
            return self.backbone_source(images), self.backbone_target(images)
        main, side = torch.cuda.current_stream(), _side_stream(images.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            target = self.backbone_target(images)
        source = self.backbone_source(images)
        main.wait_stream(side)
        images.record_stream(side)
        for level in target:
            level.record_stream(main)
        return source, target


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for the whole process: the allocator keeps memory by stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def build_decoder(config: DecoderConfig, in_channels: Sequence[int], num_classes: int) -> nn.Module:
    """Build an untrained decoder."""
    match config.type:
        case "segformer":
            return SegFormerHead(in_channels, num_classes, channels=config.channels, dropout=config.dropout)
        case "deeplabv3plus":
            return SeparableASPPHead(
                in_channels,
                num_classes,
                channels=config.channels,
                dilations=config.dilations,
                low_channels=config.low_channels,
                dropout=config.dropout,
            )


def build_segmenter(recipe: DASegNetRecipe, task: Task, *, load_weights: bool = False) -> DASegNet:
    """Build the network of a recipe; `load_weights` loads the students' pretrained weights, else all are random."""
    source, target = (create_backbone(recipe.backbone, task, load_weights=load_weights) for _ in range(2))
    return assemble(recipe, task, (source, target))


def assemble(recipe: DASegNetRecipe, task: Task, backbones: tuple[Backbone, Backbone]) -> DASegNet:
    """Build neck and decoders for two given students."""
    channels = backbones[0].info.channels
    neck = None
    if recipe.neck is not None:
        used = None if recipe.decoder.type == "segformer" else (0, len(channels) - 1)
        neck = DisentangledNeck(channels, recipe.neck, used=used)
    refined = channels if neck is None else neck.out_channels
    # the DUM's attention depends on the size of its map, so tiles are as large as crops unless configured
    side = recipe.eval.tile or recipe.data.augment_of("source").crop_size
    decoders = tuple(build_decoder(recipe.decoder, refined, task.num_classes) for _ in range(2))
    return DASegNet(
        task,
        backbones,
        (decoders[0], decoders[1]),
        neck=neck,
        tile=TileHint(size=side, overlap=side // 4, flexible=False),
        side_by_side=recipe.side_by_side,
    )


def _split(joint: Styles, counts: Sequence[int]) -> list[Styles]:
    """One Styles per batch of a concatenation."""
    parts = [
        [torch.split(level, list(counts)) for level in maps]
        for maps in (joint.source, joint.target, joint.refined_source, joint.refined_target)
    ]
    return [Styles(*(tuple(level[i] for level in maps) for maps in parts)) for i in range(len(counts))]
