"""Load checkpoints of classification or self-supervised networks into bodies without head.

Tensor names of other libraries become timm's, the first convolution is adapted to the bands of the task."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rsseg.backbones.bodies import Pyramid, TokenMaps, resample_positions
from rsseg.backbones.timm_adapter import LEVELS, Architecture, complete_network, in_timm_names
from rsseg.errors import DataError, WeightsError
from rsseg.foreign import odd_tensors_refused, rename
from rsseg.task import Task

RGB = ("red", "green", "blue")
_UNUSED = re.compile(r"mask_token|.*\.attention_bias_idxs")
"""Tensors that only pretraining uses or that follow from the architecture."""


def color_of(band: str) -> int | None:
    """Index of a band in red, green, blue by its name, ignoring case; None for any other band."""
    return RGB.index(band.lower()) if band.lower() in RGB else None


def pretrained_statistics(rgb: Sequence[float], bands: Sequence[str]) -> tuple[float, ...]:
    """One value per band: that of `rgb` for red, green and blue, the mean of the three for other bands."""
    mean = sum(rgb) / len(rgb)
    return tuple(mean if (color := color_of(band)) is None else rgb[color] for band in bands)


def data_statistics(task: Task) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the training images, scaled units.

    Raises:
        DataError: they were not measured, or a band is constant.
    """
    if task.mean is None or task.std is None:
        raise DataError(
            f"{task.name} has no mean and std, which `statistics: data` needs. "
            "Run `rsseg dataset stats` on it, or set statistics: pretrained."
        )
    if min(task.std) <= 0:
        band = task.bands[task.std.index(min(task.std))]
        raise DataError(f"band {band!r} of {task.name} is constant (std 0). Leave it out with data.bands.")
    return task.mean, task.std


def adapt_first_conv(weight: Tensor, bands: Sequence[str]) -> Tensor:
    """Convert the kernels of a first convolution to other bands than red, green, blue.

    Red, green and blue keep their kernels at any position; other bands get the mean of the three. All are scaled by
    3 / C, which preserves the response to a grey image.

    Args:
        weight: (D, 3, kh, kw), input channels red, green, blue.
        bands: C band names.

    Returns:
        (D, C, kh, kw).
    """
    mean = weight.mean(dim=1)
    colors = [color_of(band) for band in bands]
    kernels = [mean if color is None else weight[:, color] for color in colors]
    return torch.stack(kernels, dim=1) * (3 / len(bands))


_HEADS = re.compile(r"(classifier|head|decode_head|decode_head\..*|auxiliary_head)\..*")
_PREFIX = re.compile(r"^(backbone\.)?(segformer\.)?(encoder\.)?")

_RENAMINGS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # mmsegmentation
        (r"^layers\.(\d)\.0\.projection\.", r"stages.\1.embed.proj."),
        (r"^layers\.(\d)\.0\.norm\.", r"stages.\1.embed.norm."),
        (r"^layers\.(\d)\.1\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"^layers\.(\d)\.2\.", r"stages.\1.norm."),
        (r"\.attn\.attn\.in_proj_", r".attn.qkv."),
        (r"\.attn\.attn\.out_proj\.", r".attn.proj."),
        (r"\.ffn\.layers\.0\.", r".mlp.fc1."),
        (r"\.ffn\.layers\.1\.", r".mlp.dwconv."),
        (r"\.ffn\.layers\.4\.", r".mlp.fc2."),
        # NVlabs, whose stages count from 1
        (r"^patch_embed([1-4])\.", r"stages.+\1.embed."),
        (r"^block([1-4])\.(\d+)\.", r"stages.+\1.blocks.\2."),
        (r"^norm([1-4])\.", r"stages.+\1.norm."),
        # Hugging Face, files on the hub
        (r"^patch_embeddings\.(\d)\.proj\.", r"stages.\1.embed.proj."),
        (r"^patch_embeddings\.(\d)\.layer_norm\.", r"stages.\1.embed.norm."),
        (r"^block\.(\d)\.(\d+)\.layer_norm_([12])\.", r"stages.\1.blocks.\2.norm\3."),
        (r"^block\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"^layer_norm\.(\d)\.", r"stages.\1.norm."),
        (r"\.attention\.self\.(q|k|v)(?:uery|ey|alue)\.", r".attn.\1."),
        (r"\.attention\.self\.sr\.", r".attn.sr."),
        (r"\.attention\.self\.layer_norm\.", r".attn.norm."),
        (r"\.attention\.output\.dense\.", r".attn.proj."),
        (r"\.mlp\.dense([12])\.", r".mlp.fc\1."),
        # Hugging Face, transformers 5
        (r"^stages\.(\d)\.patch_embeddings\.proj\.", r"stages.\1.embed.proj."),
        (r"^stages\.(\d)\.patch_embeddings\.layer_norm\.", r"stages.\1.embed.norm."),
        (r"\.layernorm_before\.", r".norm1."),
        (r"\.layernorm_after\.", r".norm2."),
        (r"\.attention\.(q|k|v)_proj\.", r".attn.\1."),
        (r"\.attention\.o_proj\.", r".attn.proj."),
        (r"\.attention\.sequence_reduction\.sequence_reduction\.", r".attn.sr."),
        (r"\.attention\.sequence_reduction\.layer_norm\.", r".attn.norm."),
        (r"^stages\.(\d)\.layer_norm\.", r"stages.\1.norm."),
        # all but mmsegmentation and timm
        (r"\.mlp\.dwconv\.dwconv\.", r".mlp.dwconv."),
        (r"^stages\.0\.embed\.|^stages\.\+1\.embed\.", r"patch_embed."),
    )
)


def mit_to_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a MiT, or of a whole model around it, under timm's `pvt_v2` names.

    Heads are dropped; timm's own and unknown names are unchanged, and the latter are reported on loading.
    """
    renamed: dict[str, Tensor] = {}
    apart: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        ours = _renamed(name)
        if ours is None:
            continue
        if found := re.fullmatch(r"(.*\.attn)\.(q|k|v|qkv)\.(weight|bias)", ours):
            apart.setdefault(f"{found[1]}.{{}}.{found[3]}", {})[found[2]] = tensor
        elif re.fullmatch(r".*\.mlp\.fc[12]\.weight", ours):
            renamed[ours] = tensor.flatten(1)  # a 1x1 convolution in mmsegmentation
        else:
            renamed[ours] = tensor
    for name, parts in apart.items():
        renamed |= {name.format(part): tensor for part, tensor in _packed(parts).items()}
    return renamed


def _renamed(name: str) -> str | None:
    name = _PREFIX.sub("", name)
    if _HEADS.fullmatch(name):
        return None
    for pattern, replacement in _RENAMINGS:
        name = pattern.sub(replacement, name)
    name = re.sub(r"^stages\.\+(\d)", lambda found: f"stages.{int(found[1]) - 1}", name)
    return re.sub(r"^stages\.(\d)\.embed\.", r"stages.\1.downsample.", name)


def _packed(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value as one, three or (already) two tensors -> timm's query and key-value."""
    if "qkv" in parts:
        query, key, value = parts["qkv"].chunk(3)
        return {"q": query, "kv": torch.cat([key, value])}
    if "k" in parts and "v" in parts:
        return {"q": parts["q"], "kv": torch.cat([parts["k"], parts["v"]])}
    return dict(parts)


_CONVNEXT = (
    (r"downsample_layers\.0\.(0|1)\.(weight|bias)", r"network.stem.\1.\2"),
    (r"downsample_layers\.([1-3])\.(0|1)\.(weight|bias)", r"network.stages.\1.downsample.\2.\3"),
    (r"stages\.(\d+)\.(\d+)\.depthwise_conv\.(weight|bias)", r"network.stages.\1.blocks.\2.conv_dw.\3"),
    (r"stages\.(\d+)\.(\d+)\.norm\.(weight|bias)", r"network.stages.\1.blocks.\2.norm.\3"),
    (r"stages\.(\d+)\.(\d+)\.pointwise_conv([12])\.(weight|bias)", r"network.stages.\1.blocks.\2.mlp.fc\3.\4"),
    (r"stages\.(\d+)\.(\d+)\.gamma", r"network.stages.\1.blocks.\2.gamma"),
    (r"stages\.(\d+)\.(\d+)\.grn\.gamma", r"network.stages.\1.blocks.\2.mlp.grn.weight"),
    (r"stages\.(\d+)\.(\d+)\.grn\.beta", r"network.stages.\1.blocks.\2.mlp.grn.bias"),
    (r"norm([0-3])\.(weight|bias)", r"norms.\1.\2"),
)

_VIT = (
    (r"cls_token", r"network.cls_token"),
    (r"pos_embed", r"network.pos_embed"),
    (r"patch_embed\.projection\.(weight|bias)", r"network.patch_embed.proj.\1"),
    (r"layers\.(\d+)\.ln([12])\.(weight|bias)", r"network.blocks.\1.norm\2.\3"),
    (r"layers\.(\d+)\.attn\.(qkv|proj)\.(weight|bias)", r"network.blocks.\1.attn.\2.\3"),
    (r"layers\.(\d+)\.attn\.gamma1\.weight", r"network.blocks.\1.ls1.gamma"),
    (r"layers\.(\d+)\.ffn\.layers\.0\.0\.(weight|bias)", r"network.blocks.\1.mlp.fc1.\2"),
    (r"layers\.(\d+)\.ffn\.layers\.1\.(weight|bias)", r"network.blocks.\1.mlp.fc2.\2"),
    (r"layers\.(\d+)\.ffn\.gamma2\.weight", r"network.blocks.\1.ls2.gamma"),
    (r"ln1\.(weight|bias)", r"network.norm.\1"),
)


def convnext_from_mmpretrain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of mmpretrain's ConvNeXt (V1 or V2) to our `Backbone`'s.

    Args:
        tensors: names without the `backbone.` prefix; Linear weights of the pointwise convolutions are 2-D.

    Raises:
        WeightsError: a name that such a network does not have.
    """
    return {f"body.{rename(name, _CONVNEXT, 'mmpretrain ConvNeXt')}": tensor for name, tensor in tensors.items()}


def vit_from_mmpretrain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of mmpretrain's VisionTransformer to our `Backbone`'s.

    Args:
        tensors: names without prefix. The position table keeps its grid; see `resample_positions`.

    Raises:
        WeightsError: a name that such a network does not have.
    """
    return {f"body.{rename(name, _VIT, 'mmpretrain VisionTransformer')}": tensor for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Source:
    """A weights file and its network.

    first_conv  convolution that reads red, green, blue
    final_norm  the classifier's norm, which initializes the norm of the last level; None if there is none
    """

    path: Path
    architecture: Architecture
    first_conv: str
    final_norm: str | None


def load_pretrained(body: Pyramid | TokenMaps, source: Source, bands: Sequence[str]) -> None:
    """Fill a body from a .safetensors file in timm's names; 16-bit files become float32.

    The first convolution is adapted to `bands`, the position table to the body's grid. Tensors of the head and of
    omitted stages are dropped. The norms of a pyramid's levels start at 1 and 0 if the file has none.

    Raises:
        WeightsError: the file is unreadable or does not fit; names the first missing and unexpected tensor.
    """
    try:
        stored = load_file(source.path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{source.path} cannot be read: {error}. Fetch or convert it again.") from None
    bad = next((name for name, tensor in stored.items() if tensor.is_complex() or not tensor.isfinite().all()), None)
    if bad is not None:
        raise WeightsError(f"{source.path}: {bad[:200]!r} has complex or infinite values. Fetch or convert it again.")
    tensors = {name: tensor.float() for name, tensor in stored.items()}
    complete, wanted = complete_network(source.architecture), body.network.state_dict()
    with odd_tensors_refused(source.path, source.architecture.name):
        if source.architecture.name.startswith("pvt_v2"):
            tensors = mit_to_timm(tensors)
        tensors = {n: tensor for n, tensor in in_timm_names(complete, tensors).items() if not _UNUSED.fullmatch(n)}
        _check_names(source, tensors, wanted, known=complete.state_dict())
        _adapt(body, tensors, source, bands)
    for name, tensor in wanted.items():
        if tensors[name].shape != tensor.shape:
            raise WeightsError(
                f"{source.path}: {name!r} has the shape {tuple(tensors[name].shape)}, {source.architecture.name} "
                f"needs {tuple(tensor.shape)}. Give the weights of that network."
            )
    body.network.load_state_dict({name: tensors[name] for name in wanted})
    if isinstance(body, Pyramid):
        _start_last_norm(body, tensors, source.final_norm)


def _check_names(
    source: Source, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], known: Mapping[str, Tensor]
) -> None:
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in known]
    if missing or unexpected:
        found = [f"{what} {names[0][:200]!r}" for what, names in (("no", missing), ("an unknown", unexpected)) if names]
        raise WeightsError(
            f"{source.path} has {' and '.join(found)} ({len(missing)} missing, {len(unexpected)} unexpected). "
            f"Give a file of {source.architecture.name} in timm's names."
        )


def _adapt(body: Pyramid | TokenMaps, tensors: dict[str, Tensor], source: Source, bands: Sequence[str]) -> None:
    first = f"{source.first_conv}.weight"
    if tensors[first].shape[1] == len(RGB):
        tensors[first] = adapt_first_conv(tensors[first], bands)
    if isinstance(body, TokenMaps) and body.position is not None:
        cells = body.network.pos_embed.shape[1] - body.position_prefix
        side = round(cells**0.5)
        tensors["pos_embed"] = resample_positions(
            tensors["pos_embed"], (side, side), prefix=body.position_prefix, mode=body.position
        )


def _start_last_norm(body: Pyramid, tensors: Mapping[str, Tensor], final_norm: str | None) -> None:
    last = str(LEVELS - 1)
    if final_norm is None or f"{final_norm}.weight" not in tensors or last not in body.norms:
        return
    body.norms[last].load_state_dict({name: tensors[f"{final_norm}.{name}"] for name in ("weight", "bias")})
