"""A plain network, one backbone and one decoder, and the choice of what of it trains, such as low-rank adapters."""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsseg.backbones.backbone import Backbone, BackboneInfo, create_backbone
from rsseg.backbones.bodies import TokenMaps
from rsseg.backbones.zoo import find_entry
from rsseg.config import BackboneConfig
from rsseg.errors import RecipeError
from rsseg.layers.blocks import resize_logits
from rsseg.layers.decoders import (
    PYRAMID_FACTORS,
    DPTHead,
    LinearHead,
    SegFormerHead,
    SeparableASPPHead,
    TokenPyramid,
    UPerNet,
)
from rsseg.layers.ema import Frozen
from rsseg.methods.base import ParamGroup, Segmenter, preferred_tile
from rsseg.methods.plain_recipe import DecoderConfig, PlainConfig
from rsseg.task import Task


class LowRank(nn.Module):
    """scale * up @ down, added to the weight of a linear layer; 0 at initialization (Hu et al., arXiv 2106.09685)."""

    def __init__(self, in_features: int, out_features: int, *, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as nn.Linear

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in_features) -> term to add to the layer's output, (..., out_features)."""
        return F.linear(self.scale * F.linear(inputs, self.down), self.up)

    def delta(self) -> Tensor:
        """Term to add to the layer's weight, (out_features, in_features)."""
        return self.scale * self.up @ self.down


class LowRankAdapters(nn.Module):
    """One `LowRank` per chosen linear layer of a network; does not contain the network."""

    def __init__(self, network: nn.Module, targets: Sequence[str], *, rank: int, alpha: float) -> None:
        """Build the adapters.

        Args:
            network: network to adapt.
            targets: last names of linear layers, such as `qkv`; each must occur.
            rank: rank of the products.
            alpha: the products are multiplied by alpha / rank.

        Raises:
            ValueError: no linear layer has one of the names.
        """
        super().__init__()
        linear = {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear)}
        known = {name.rpartition(".")[2] for name in linear}
        if unknown := [target for target in targets if target not in known]:
            raise ValueError(f"no linear layer is called {unknown[0]!r}; there are {sorted(known)}")
        chosen = {name: m for name, m in linear.items() if name.rpartition(".")[2] in targets}
        self.names = tuple(chosen)
        self.layers = nn.ModuleList(
            LowRank(m.in_features, m.out_features, rank=rank, scale=alpha / rank) for m in chosen.values()
        )

    @contextmanager
    def added_to(self, network: nn.Module) -> Iterator[None]:
        """Context in which the chosen layers of `network` return their output plus the adapters' term."""

        def adding(addition: nn.Module) -> Any:
            return lambda _, inputs, output: output + addition(inputs[0])

        hooks = [
            network.get_submodule(name).register_forward_hook(adding(addition))
            for name, addition in zip(self.names, self.layers, strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def merge(self, base: nn.Module, into: nn.Module) -> None:
        """Write the weights of `base` plus the adapters into `into`, a network of the same architecture."""
        for name, addition in zip(self.names, self.layers, strict=True):
            weight = cast(Tensor, base.get_submodule(name).weight)
            cast(Tensor, into.get_submodule(name).weight).copy_(weight + cast(LowRank, addition).delta())


class PlainSegmenter(Segmenter):
    """Backbone -> decoder -> logits, resized to the image."""

    def __init__(
        self, task: Task, backbone: Backbone, decoder: nn.Module, *, align_corners: bool, crop_size: int
    ) -> None:
        """Store the parts.

        Args:
            task: classes and bands.
            backbone: images to maps.
            decoder: maps to logits of any resolution.
            align_corners: of the resize to the image.
            crop_size: side of the training crops in pixels, also the tile size of a transformer.
        """
        info, tile = backbone.info, preferred_tile(backbone, crop_size)
        super().__init__(task, input_multiple=info.input_multiple, fill=info.mean, tile=tile)
        self.backbone, self.decoder = backbone, decoder
        self.align_corners, self.crop_size = align_corners, crop_size

    def forward(self, images: Tensor) -> Tensor:
        """float (B, C, H, W) in scaled units -> float logits (B, K, H, W)."""
        return self.decode(self.backbone(images), images.shape[-2:])

    def low_resolution_logits(self, images: Tensor) -> Tensor:
        """See `Segmenter.low_resolution_logits`."""
        return self(images) if self.align_corners else self.decoder(self.backbone(images))  # type: ignore[no-any-return]

    def with_backbone(self, backbone: Backbone) -> "PlainSegmenter":
        """A segmenter that shares this decoder, with another backbone of the same architecture."""
        return PlainSegmenter(
            self.task, backbone, self.decoder, align_corners=self.align_corners, crop_size=self.crop_size
        )

    def start_parts(self) -> Mapping[str, Sequence[nn.Module]]:
        """See `Segmenter.start_parts`."""
        return {"backbone": (self.backbone,), "decoder": (self.decoder,)}

    def decode(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """The backbone's maps -> float32 logits (B, K, *size)."""
        return resize_logits(self.decoder(maps), size, align_corners=self.align_corners)


class TunedNetwork(nn.Module):
    """A plain network of which everything, the decoder, or decoder and low-rank adapters train.

    A backbone that does not train is `Frozen`: no gradient, no optimizer, and not in the saved state.
    """

    def __init__(self, segmenter: PlainSegmenter, config: PlainConfig) -> None:
        """Split the network into trained and frozen parts.

        Raises:
            RecipeError: the backbone cannot be adapted as `config` says.
        """
        super().__init__()
        self.config = config
        self.decoder = segmenter.decoder
        self.adapters = _adapters(config, segmenter.backbone) if config.tune == "lora" else None
        self.backbone = segmenter.backbone if config.tune == "full" else None
        self.frozen = None if self.backbone is not None else Frozen(segmenter.backbone)
        # The shipped network shares the decoder, and the backbone unless there are adapters: then it has a copy, into
        # which they are merged. It is no submodule, so that its tensors are not saved twice.
        merged = None if self.adapters is None else segmenter.with_backbone(copy.deepcopy(segmenter.backbone))
        self._shipped = (merged or segmenter,)
        body = segmenter.backbone.body
        if self.adapters is not None and isinstance(body, TokenMaps):  # blocks that are computed again need them again
            body.again_in = partial(self.adapters.added_to, segmenter.backbone)

    def forward(self, images: Tensor) -> Tensor:
        """float (B, C, H, W) in scaled units -> float logits (B, K, H, W)."""
        return self._shipped[0].decode(self._maps(images), images.shape[-2:])

    def shipped(self) -> PlainSegmenter:
        """The network without adapters; their current values are merged into its weights."""
        shipped = self._shipped[0]
        if self.adapters is not None and self.frozen is not None:
            self.adapters.merge(self.frozen.module, into=shipped.backbone)
        return shipped

    def param_groups(self) -> Sequence[ParamGroup]:
        """Trainable parameters by learning rate and weight decay."""
        groups: dict[tuple[float, float | None], list[nn.Parameter]] = defaultdict(list)
        for parameter, rate in self._rates():
            groups[rate, 0.0 if parameter.ndim <= 1 else None].append(parameter)
        return [ParamGroup(params, rate, decay) for (rate, decay), params in groups.items()]

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
                rate = self.config.layer_decay ** (len(depths) - 1 - depth)
                yield from ((p, rate) for p in parameters if p.requires_grad)
        for module in (self.decoder, self.adapters):
            if module is not None:
                yield from ((p, self.config.head_lr_scale) for p in module.parameters())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.adapters is not None:
            self._shipped[0].backbone._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _adapters(plain: PlainConfig, backbone: Backbone) -> LowRankAdapters:
    name, config = backbone.info.name, plain.lora
    if backbone.info.kind != "vit":
        raise RecipeError(
            f"tune: lora adapts the linear layers of a vision transformer, but the backbone {name} is a "
            f"{backbone.info.kind}. Set tune: full or frozen, or choose a ViT (`rsseg backbone ls`)."
        )
    try:
        return LowRankAdapters(backbone, config.targets, rank=config.rank, alpha=config.alpha)
    except ValueError as error:
        raise RecipeError(f"lora.targets: {name}: {error}.") from None


def build_plain(
    backbone: BackboneConfig, decoder: DecoderConfig, task: Task, *, crop_size: int, load_weights: bool = False
) -> PlainSegmenter:
    """Build a plain network: an untrained decoder, and a backbone with pretrained weights or untrained.

    Raises:
        RecipeError: backbone and decoder do not fit together.
        WeightsError: weights are missing or do not fit.
    """
    if decoder.type == "deeplabv3plus":  # reads the first and the last map
        indices = backbone.out_indices or find_entry(backbone.name).out_indices
        backbone = backbone.model_copy(update={"out_indices": (indices[0], indices[-1])})
    return assemble_plain(create_backbone(backbone, task, load_weights=load_weights), decoder, task, crop_size)


def assemble_plain(backbone: Backbone, config: DecoderConfig, task: Task, crop_size: int) -> PlainSegmenter:
    """Build the decoder on a given backbone; see `build_plain`."""
    decoder = fitting_decoder(config, backbone.info, task.num_classes)
    return PlainSegmenter(task, backbone, decoder, align_corners=config.type == "dpt", crop_size=crop_size)


def fitting_decoder(config: DecoderConfig, info: BackboneInfo, num_classes: int) -> nn.Module:
    """`make_decoder` that raises `RecipeError` if the decoder cannot use the backbone's maps."""
    try:
        return make_decoder(config, info, num_classes)
    except ValueError as error:
        raise RecipeError(
            f"decoder.type: {config.type!r} does not fit {info.name}: {error}. "
            "Choose another decoder, or set backbone.out_indices."
        ) from None


def make_decoder(config: DecoderConfig, info: BackboneInfo, num_classes: int) -> nn.Module:
    """Build an untrained decoder: the backbone's maps -> logits (B, K, h, w).

    Raises:
        ValueError: the decoder cannot use these maps.
    """
    match config.type:
        case "segformer":
            return SegFormerHead(
                info.channels,
                num_classes,
                channels=config.channels or 256,
                dropout=config.dropout,
            )
        case "linear":
            return LinearHead(info.channels, num_classes)
        case "dpt":
            return DPTHead(
                info.channels, info.strides, num_classes, widths=config.widths, features=config.channels or 64
            )
        case "upernet":
            head: nn.Module = UPerNet(
                info.channels,
                num_classes,
                channels=config.channels or 512,
                pool_scales=config.pool_scales,
                dropout=config.dropout,
            )
        case "deeplabv3plus":
            head = SeparableASPPHead(
                info.channels,
                num_classes,
                channels=config.channels or 512,
                dilations=config.dilations,
                dropout=config.dropout,
            )
    if info.kind == "pyramid":
        return head
    factors = (4, 1) if config.type == "deeplabv3plus" else PYRAMID_FACTORS
    return nn.Sequential(TokenPyramid(info.channels, factors), head)
