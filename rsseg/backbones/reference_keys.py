"""Names of other libraries' networks, turned into the names of our `Backbone`.

A Backbone stores a timm network under `body.network` and a pyramid's own norms under `body.norms.<level>`.
"""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from rsseg.errors import WeightsError

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
    return _renamed(tensors, _CONVNEXT, "mmpretrain ConvNeXt")


def vit_from_mmpretrain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of mmpretrain's VisionTransformer to our `Backbone`'s.

    Args:
        tensors: names without prefix. The position table keeps its grid; see `position.resample_positions`.

    Raises:
        WeightsError: a name that such a network does not have.
    """
    return _renamed(tensors, _VIT, "mmpretrain VisionTransformer")


def _renamed(tensors: Mapping[str, Tensor], rules: Sequence[tuple[str, str]], source: str) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in rules:
            if match := re.fullmatch(pattern, name):
                renamed[f"body.{match.expand(replacement)}"] = tensor
                break
        else:
            raise WeightsError(f"{name!r} is not a tensor of a {source}. Give a checkpoint of that network.")
    return renamed
