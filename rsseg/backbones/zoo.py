"""Build a backbone from an entry of the zoo and a recipe's options."""

from types import MappingProxyType

import torch

from rsseg.backbones.backbone import Backbone, BackboneInfo
from rsseg.backbones.bands import data_statistics, pretrained_statistics
from rsseg.backbones.bodies import TokenMaps
from rsseg.backbones.loading import Source, load_pretrained
from rsseg.backbones.table import ZooEntry, find_entry
from rsseg.backbones.timm_adapter import Architecture, Built, build_pyramid, build_vit
from rsseg.backbones.weights import check_weights
from rsseg.config import BackboneConfig
from rsseg.errors import RecipeError
from rsseg.task import Task

_DTYPES = MappingProxyType({"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16})


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
