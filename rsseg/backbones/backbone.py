"""Common interface of backbones: images in, feature maps out, normalization inside; built from a recipe's options."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsseg.backbones.bodies import TokenMaps
from rsseg.backbones.loading import Source, data_statistics, load_pretrained, pretrained_statistics
from rsseg.backbones.timm_adapter import Architecture, Built, build_pyramid, build_vit
from rsseg.backbones.zoo import WeightsFile, ZooEntry, check_weights, find_entry
from rsseg.config import BackboneConfig
from rsseg.errors import RecipeError
from rsseg.task import Task

_DTYPES = MappingProxyType({"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16})


@dataclass(frozen=True)
class BackboneInfo:
    """Facts about a backbone for decoders and model headers.

    channels, strides  per returned map
    input_multiple     input sides should be multiples of it, in pixels
    patch_size         pixels; None for a pyramid
    mean, std          per band of the task, scaled units
    license            of the pretrained weights
    """

    name: str
    timm_name: str
    kind: Literal["pyramid", "vit"]
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    input_multiple: int
    patch_size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    license: str


class Backbone(nn.Module):
    """A network that normalizes its own input, so that several backbones can share a batch.

    `weights` is the file of its tensors; None if they are random or loaded by the caller.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        info: BackboneInfo,
        body: nn.Module,
        *,
        pad: Literal["corner", "error"] = "corner",
        dtype: torch.dtype = torch.float32,
        weights: WeightsFile | None = None,
    ) -> None:
        """Wrap a body.

        Args:
            info: describes `body` and the normalization.
            body: normalized images (B, C, H, W) in `dtype` -> one NCHW map per output index.
            pad: treatment of a ViT input that is not a multiple of the patch, see `BackboneConfig`.
            dtype: storage and compute type of `body`; maps are returned in float32.
            weights: file of the tensors.
        """
        super().__init__()
        self.info = info
        self.body = body.to(dtype)
        self.pad = pad
        self.dtype = dtype
        self.weights = weights
        for name in ("mean", "std"):
            values = torch.tensor(getattr(info, name), dtype=torch.float32).reshape(-1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of images.

        Args:
            images: float (B, C, H, W) in scaled units, bands in the task's order.

        Returns:
            One float (B, channels[i], H / strides[i], W / strides[i]) per index; a ViT rounds up, a pyramid as its
            convolutions do.
        """
        return self.forward_normalized(self.normalize(images))

    def parameters_by_depth(self) -> list[list[nn.Parameter]]:
        """All parameters from input to output: a transformer's embedding and blocks, a pyramid's levels."""
        return self.body.parameters_by_depth()  # type: ignore[no-any-return, operator]

    def normalize(self, images: Tensor) -> Tensor:
        """(images - mean) / std, per band, float32."""
        return (images.float() - self.mean) / self.std

    def forward_normalized(self, images: Tensor) -> tuple[Tensor, ...]:
        """Like `forward` for images (B, C, H, W) that are already normalized."""
        maps = self.body(self._padded(images).to(self.dtype))
        if self.dtype == torch.float32:
            return tuple(maps)
        return tuple(level.float() for level in maps)

    def _padded(self, images: Tensor) -> Tensor:
        if self.info.patch_size is None:
            return images
        height, width = images.shape[-2:]
        bottom, right = -height % self.info.input_multiple, -width % self.info.input_multiple
        if not bottom and not right:
            return images
        if self.pad == "error":
            raise RecipeError(
                f"{self.info.name} got {height} x {width} pixels, which is not a multiple of its patch of "
                f"{self.info.patch_size}. Choose such a crop and tile size, or set pad: corner."
            )
        return F.pad(images, (0, right, 0, bottom))


def create_backbone(config: BackboneConfig, task: Task, *, load_weights: bool = True) -> Backbone:
    """Build a backbone for the bands of a task.

    Args:
        config: the recipe's part.
        task: its bands determine kernels and statistics.
        load_weights: False keeps random tensors and reads no file, for callers that load a checkpoint.

    Raises:
        RecipeError: unknown name, or options that the network does not support.
        WeightsError: weights are missing or do not fit.
        DataError: `statistics: data` without measured statistics.
    """
    return assemble(find_entry(config.name), config, task, load_weights=load_weights)


def assemble(entry: ZooEntry, config: BackboneConfig, task: Task, *, load_weights: bool) -> Backbone:
    """`create_backbone` for an entry that need not be in the zoo."""
    weights = check_weights(config) if load_weights else None  # fail before building the network
    architecture = Architecture(
        entry.timm_name,
        bands=len(task.bands),
        drop_path=config.drop_path,
        arguments=entry.arguments,
        norm_eps=entry.norm_eps,
    )
    built = _build(entry, config, architecture)
    if weights is not None:
        source = Source(weights.path, architecture, first_conv=built.first_conv, final_norm=entry.final_norm)
        load_pretrained(built.body, source, task.bands)
    built.body.freeze(config.frozen_stages)
    if config.checkpoint:
        if not isinstance(built.body, TokenMaps) or built.body.position is None:
            raise RecipeError(
                f"checkpoint: works for vision transformers with a position table, not for {entry.name}. Leave it out."
            )
        built.body.checkpoint = True
    return Backbone(
        _info(entry, config, task, built),
        built.body,
        pad=config.pad,
        dtype=_DTYPES[config.dtype],
        weights=weights,
    )


def _build(entry: ZooEntry, config: BackboneConfig, architecture: Architecture) -> Built:
    out_indices = entry.out_indices if config.out_indices is None else config.out_indices
    out_norm = config.out_norm or entry.out_norm
    if entry.kind == "pyramid":
        if config.pos_embed != "timm" or config.pos_embed_round_trip or config.image_size is not None:
            raise RecipeError(
                f"{entry.name} has no position table. Leave out pos_embed, its round trip and image_size."
            )
        return build_pyramid(architecture, levels=out_indices, out_norm=out_norm)
    # a resized table resamples pretrained weights a second time, so only on request
    relaid = config.pos_embed_round_trip or config.weights == "random"
    return build_vit(
        architecture,
        out_indices=out_indices,
        out_norm=out_norm,
        position=config.pos_embed,
        image_size=config.image_size if relaid else None,
    )


def _info(entry: ZooEntry, config: BackboneConfig, task: Task, built: Built) -> BackboneInfo:
    if config.statistics == "data":
        mean, std = data_statistics(task)
    else:
        mean, std = (pretrained_statistics(rgb, task.bands) for rgb in (built.mean, built.std))
    return BackboneInfo(
        name=entry.name,
        timm_name=entry.timm_name,
        kind=entry.kind,
        channels=built.channels,
        strides=built.strides,
        input_multiple=entry.patch_size or max(built.strides),
        patch_size=entry.patch_size,
        mean=mean,
        std=std,
        license=entry.license,
    )
