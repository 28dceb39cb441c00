"""The only module that imports timm: networks of the zoo without heads, and timm's facts about them."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from rsseg.backbones.bodies import PositionMode, Pyramid, TokenMaps, resample_positions
from rsseg.backbones.zoo import OutNorm
from rsseg.errors import RecipeError


@contextmanager
def _without_idle_imports() -> Iterator[None]:
    """Hide from timm and torchvision what they import, but is not used here; what is imported already stays.

    Importing torch's compiler, for a few marks, takes longer than importing torch, and `wandb`, for timm's training
    log, a tenth of it.
    """
    hidden = {"wandb": None} if "wandb" not in sys.modules else {}
    sys.modules |= hidden  # type: ignore[arg-type]  # None: the import fails, which timm expects
    try:
        with _without_compiler():
            yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextmanager
def _without_compiler() -> Iterator[None]:
    names = ("torch._dynamo", "torch._dynamo.utils")
    if names[0] in sys.modules:
        yield
        return
    compiler, utilities = (ModuleType(name) for name in names)
    compiler.__path__ = []  # a package
    compiler.disable = lambda function=None, *_, **__: function or (lambda f: f)  # type: ignore[attr-defined]
    utilities.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
    sys.modules |= dict(zip(names, (compiler, utilities), strict=True))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        if vars(torch).get("_dynamo") is compiler:
            del torch._dynamo


def _is_compile_supported(device: str) -> bool:
    from torch._dynamo.utils import is_compile_supported

    return bool(is_compile_supported(device))


with _without_idle_imports():
    import timm
    from timm.layers import Conv2dSame as Conv2dSame
    from timm.layers import convert_sync_batchnorm
    from timm.models import eva, swin_transformer, vision_transformer_sam
    from timm.models.vision_transformer import VisionTransformer

_Conversion = Callable[[Mapping[str, Tensor], nn.Module], Mapping[str, Tensor]]
_CONVERSIONS: Mapping[type[nn.Module], _Conversion] = MappingProxyType(
    {
        eva.Eva: eva.checkpoint_filter_fn,
        swin_transformer.SwinTransformer: swin_transformer.checkpoint_filter_fn,
        vision_transformer_sam.VisionTransformerSAM: vision_transformer_sam.checkpoint_filter_fn,
    }
)

LEVELS = 4
"""Levels of every pyramid; level 0 has stride 4."""


@dataclass(frozen=True)
class Architecture:
    """A network by timm's name; `arguments` override its defaults (depths, widths, ...)."""

    name: str
    bands: int = 3
    drop_path: float = 0.0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    norm_eps: float | None = None
    """Eps of every LayerNorm; None keeps timm's."""


@dataclass(frozen=True)
class Built:
    """A body and timm's facts about it.

    channels, strides  per returned map
    mean, std          of the weights: red, green, blue in 0..1
    first_conv         name of the convolution that reads the bands, in the network
    """

    body: Pyramid | TokenMaps
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    first_conv: str


def synchronize_batch_norms(module: nn.Module) -> None:
    """Let all batch norms inside a module compute their statistics over all processes; in place."""
    for name, child in module.named_children():
        module.add_module(name, convert_sync_batchnorm(child))


def build_pyramid(
    architecture: Architecture, *, levels: Sequence[int] = range(LEVELS), out_norm: OutNorm = "none"
) -> Built:
    """A pyramid with random weights.

    Args:
        architecture: the network.
        levels: 0 to 3, in the order of the returned maps; stages above the highest are omitted.
        out_norm: which of them get their own LayerNorm; `last` is level 3.

    Raises:
        RecipeError: a level that does not exist.
    """
    _check_indices(levels, LEVELS, f"{architecture.name}: a pyramid's levels")
    network = _create(architecture)
    info = list(network.feature_info)
    first = len(info) - LEVELS  # some networks also have a level of stride 2
    network.prune_intermediate_layers([first + level for level in sorted(levels)], prune_norm=True)
    if "head" in dict(network.named_children()):
        network.head = nn.Identity()  # some versions of timm keep the head's norm, which would never get gradients
    body = Pyramid(
        network,
        indices={level: first + level for level in levels},
        channels={level: info[first + level]["num_chs"] for level in levels},
        normed=_normed(levels, out_norm, last=LEVELS - 1),
        stages=list(_stages(network, [entry["module"] for entry in info[first:]])),
    )
    return _built(network, body, [info[first + level] for level in levels])


def build_vit(
    architecture: Architecture,
    *,
    out_indices: Sequence[int],
    out_norm: OutNorm = "none",
    position: PositionMode = "timm",
    image_size: int | None = None,
) -> Built:
    """A vision transformer with random weights.

    Args:
        architecture: the network.
        out_indices: zero-based blocks, in the order of the returned maps; blocks above the highest are omitted.
        out_norm: which of them pass the network's final norm; `last` is the network's last block, if returned.
        position: resampling of the position table at other sizes.
        image_size: side in pixels that the position table is resized to, rounded up to whole patches; None keeps it.

    Raises:
        RecipeError: a block that does not exist, or an option of a position table or final norm that the network
            lacks.
    """
    network = _create(architecture)
    _check_indices(out_indices, len(network.blocks), f"{architecture.name}: the blocks")
    has_table = isinstance(network, VisionTransformer)
    if not has_table and (position != "timm" or image_size is not None):
        raise RecipeError(
            f"{architecture.name} has no position table that can be resampled. Leave out pos_embed and image_size."
        )
    normed = _normed(out_indices, out_norm, last=len(network.blocks) - 1)
    if normed and isinstance(network, vision_transformer_sam.VisionTransformerSAM):
        raise RecipeError(f"{architecture.name} has no final norm. Leave out out_norm, or set it to none.")
    info = list(network.feature_info)
    network.prune_intermediate_layers(sorted(out_indices), prune_norm=not normed)
    body = TokenMaps(network, out_indices=out_indices, normed=normed, position=position if has_table else None)
    if image_size is not None:
        cells = -(-image_size // info[0]["reduction"])
        table = resample_positions(network.pos_embed, (cells, cells), prefix=body.position_prefix, mode=position)
        network.pos_embed = nn.Parameter(table.detach().clone())
    return _built(network, body, [info[index] for index in out_indices])


def complete_network(architecture: Architecture) -> nn.Module:
    """The network as in its weights file, with head, for red, green and blue, on the meta device."""
    with torch.device("meta"):
        return timm.create_model(architecture.name, **architecture.arguments)  # type: ignore[no-any-return]


def in_timm_names(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors that timm's files may still store under the original authors' names."""
    convert = _CONVERSIONS.get(type(network))
    return dict(convert(tensors, network) if convert else tensors)


def _create(architecture: Architecture) -> Any:
    network = timm.create_model(
        architecture.name,
        in_chans=architecture.bands,
        num_classes=0,
        drop_path_rate=architecture.drop_path,
        **architecture.arguments,
    )
    if isinstance(network, swin_transformer.SwinTransformer):
        network.patch_embed.dynamic_img_pad = True  # pad sides that are not a multiple of 4
    if architecture.norm_eps is not None:
        for module in network.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = architecture.norm_eps
    return network


def _built(network: Any, body: Pyramid | TokenMaps, info: Sequence[Mapping[str, Any]]) -> Built:
    known = network.pretrained_cfg
    return Built(
        body=body,
        channels=tuple(entry["num_chs"] for entry in info),
        strides=tuple(entry["reduction"] for entry in info),
        mean=tuple(known["mean"]),
        std=tuple(known["std"]),
        first_conv=known["first_conv"],
    )


def _stages(network: nn.Module, ends: Sequence[str]) -> Iterator[list[nn.Module]]:
    """Parts of the network up to and including each of `ends`, in the order of computation."""
    wanted = iter(ends)
    end = next(wanted)
    parts: list[nn.Module] = []
    for name, part in _parts(network, {end.partition(".")[0] for end in ends if "." in end}):
        parts.append(part)
        if name == end:
            yield parts
            parts = []
            if (end := next(wanted, "")) == "":
                return


def _parts(network: nn.Module, containers: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """Direct children, those of `containers` one by one."""
    for name, child in network.named_children():
        if name in containers:
            yield from ((f"{name}.{inner}", part) for inner, part in child.named_children())
        else:
            yield name, child


def _normed(out_indices: Sequence[int], out_norm: OutNorm, *, last: int) -> tuple[int, ...]:
    """The members of `out_indices` that pass a norm."""
    return tuple(index for index in out_indices if out_norm == "all" or (out_norm == "last" and index == last))


def _check_indices(indices: Sequence[int], count: int, what: str) -> None:
    if not indices or min(indices) < 0 or max(indices) >= count or len(set(indices)) != len(indices):
        raise RecipeError(f"{what} are 0 to {count - 1}, each at most once; out_indices is {list(indices)}.")
