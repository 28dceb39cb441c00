"""Tensor names of other libraries' backbones, converted to timm's and ours."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from rsseg.foreign import rename

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
