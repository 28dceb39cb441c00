"""The network that ships: two students, the disentangled neck, and two decoders whose logits are averaged."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsseg.backbones.backbone import Backbone, create_backbone
from rsseg.layers.blocks import has_batch_norm, resize_logits
from rsseg.layers.decoders import SegFormerHead, SeparableASPPHead
from rsseg.methods.base import Segmenter, TileHint
from rsseg.methods.dasegnet.recipe import DASegNetRecipe, DecoderConfig, NeckConfig
from rsseg.task import Task

Pair = tuple[Tensor, Tensor]
"""Source style and target style of one image, same shape."""


class DistinctPurification(nn.Module):
    """DSM: distributes each channel over the two styles by weights that sum to 1 and depend on both.

    Source: ST-DASegNet's `DSKNeck`; its softmax over two logits is the sigmoid of their difference.
    """

    def __init__(self, channels: int, config: NeckConfig) -> None:
        super().__init__()
        width = max(channels // config.reduction, config.min_width)
        self.squeeze = nn.Linear(channels, width)
        self.weigh_source = nn.Linear(width, channels)
        self.weigh_target = nn.Linear(width, channels)

    def forward(self, source: Tensor, target: Tensor) -> Pair:
        """Two (N, C, H, W) -> the same two, each times its share of the channel."""
        squeezed = self.squeeze((source + target).mean(dim=(2, 3)))
        weight = self.weigh_source.weight - self.weigh_target.weight
        bias = self.weigh_source.bias - self.weigh_target.bias
        share = torch.sigmoid(F.linear(squeezed, weight, bias))[..., None, None]
        return source * share, target * (1.0 - share)


class UniversalExtraction(nn.Module):
    """DUM: channel attention that favours channels unlike the features common to both styles.

    Source: the attention of ST-DASegNet's `DS2Neck`. The paper draws a softmax, but the code computes a soft minimum,
    as this does. Energies are sums over positions, which sharpen the attention on larger maps, or means.
    """

    def __init__(self, channels: int, config: NeckConfig) -> None:
        super().__init__()
        self.energies = config.energies
        self.out_channels = max(channels // config.reduction, config.min_width)
        self.common = _conv(channels, channels)
        self.reduce_source = _conv(channels, self.out_channels)
        self.reduce_target = _conv(channels, self.out_channels)

    def forward(self, source: Tensor, target: Tensor) -> Pair:
        """Two (N, C, H, W) -> two (N, out_channels, H, W)."""
        size = source.shape[-2:]
        common = F.relu(self.common((source + target) / 2)).flatten(2).transpose(1, 2)
        rows = (source.flatten(2), target.flatten(2))
        # energies reach the hundreds, where the soft minimum is almost hard: half precision would select other channels
        with torch.autocast(source.device.type, enabled=False):
            scale = 1.0 if self.energies == "sum" else 1.0 / common.shape[1]
            source_energy, target_energy = (scale * torch.bmm(row.float(), common.float()) for row in rows)
            attention = (torch.softmax(-source_energy, dim=-1) + torch.softmax(-target_energy, dim=-1)) / 2
        mixed_source, mixed_target = (
            torch.bmm(attention.to(row.dtype), row).reshape(row.shape[0], -1, *size) for row in rows
        )
        return F.relu(self.reduce_source(mixed_source)), F.relu(self.reduce_target(mixed_target))


class DisentangledLevel(nn.Module):
    """DSM, followed by the channels of a DUM if `universal`."""

    def __init__(self, channels: int, config: NeckConfig, *, universal: bool) -> None:
        super().__init__()
        self.distinct = DistinctPurification(channels, config)
        self.universal = UniversalExtraction(channels, config) if universal else None
        self.out_channels = channels + (self.universal.out_channels if self.universal is not None else 0)

    def forward(self, source: Tensor, target: Tensor) -> Pair:
        """Two (N, C, H, W) -> two (N, out_channels, H, W)."""
        distinct = self.distinct(source, target)
        if self.universal is None:
            return distinct  # type: ignore[no-any-return]
        universal = self.universal(source, target)
        return torch.cat([distinct[0], universal[0]], dim=1), torch.cat([distinct[1], universal[1]], dim=1)


class DisentangledNeck(nn.Module):
    """One level module per used pyramid level; other levels are returned unchanged."""

    def __init__(self, in_channels: Sequence[int], config: NeckConfig, *, used: Sequence[int] | None = None) -> None:
        """Build the levels.

        Args:
            in_channels: of each level.
            config: of all levels; `ds2` has the DUM at the last level only.
            used: levels that a decoder reads; None for all. Modules of other levels would never get gradients.
        """
        super().__init__()
        last = len(in_channels) - 1
        made = {
            str(i): DisentangledLevel(channels, config, universal=config.type == "ds2" and i == last)
            for i, channels in enumerate(in_channels)
            if used is None or i in used
        }
        self.levels = nn.ModuleDict(made)
        self.out_channels: tuple[int, ...] = tuple(
            made[str(i)].out_channels if str(i) in made else channels for i, channels in enumerate(in_channels)
        )
        """Channels of every returned level."""

    def forward(
        self, source: Sequence[Tensor], target: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Two pyramids of the same images, source style and target style -> both refined."""
        pairs = [
            self.levels[str(i)](s, t) if str(i) in self.levels else (s, t)
            for i, (s, t) in enumerate(zip(source, target, strict=True))
        ]
        return tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


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
