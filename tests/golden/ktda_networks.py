"""KTDA's networks from the settings of a golden case, and their parameters: stored, or made by the case's rules."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rsseg.backbones.loading import convnext_from_mmpretrain, vit_from_mmpretrain
from rsseg.backbones.timm_adapter import Architecture, Built, build_pyramid, build_vit
from rsseg.methods.ktda.importer import rename_tensors
from rsseg.methods.ktda.recipe import AuxConfig, DecoderConfig, DistillationConfig, FmmConfig
from tests.golden.builders import check_loss, check_norm
from tests.golden.settings import Settings, plain

CONVNEXT = {
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
}
"""mmpretrain's architectures: depths and channels."""

VIT = {
    "deit-small": (384, 12, 6, 1536),
    "dinov2-small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
}
"""mmpretrain's architectures: width, layers, heads, width of the MLP."""

FMM_TYPES = {"mlp": "mlp", "vitBlock": "vit_block"}
DECODER_TYPES = {"UPerHead": "upernet", "SegformerHead": "segformer"}


def student_body(hyper: Settings) -> Built:
    """mmpretrain's ConvNeXt, V1 or V2; every returned map has a LayerNorm of its own."""
    hyper.expect("type", "mmpretrain.ConvNeXt")
    hyper.expect("gap_before_final_norm", False)
    hyper.expect("linear_pw_conv", True)
    hyper.expect("stem_patch_size", 4)
    arch = plain(hyper.get("arch", "tiny"))
    depths, channels = CONVNEXT[arch] if isinstance(arch, str) else (arch.pop("depths"), arch.pop("channels"))
    assert isinstance(arch, str) or not arch, f"arch: unknown {arch}"
    arguments: dict[str, Any] = {"depths": tuple(depths), "dims": tuple(channels)}
    arguments["ls_init_value"] = hyper.get("layer_scale_init_value", 1e-6) or None
    if hyper.get("use_grn", False):
        arguments["use_grn"] = True
    architecture = Architecture(
        "convnext_tiny",
        bands=hyper.get("in_channels", 3),
        drop_path=hyper.get("drop_path_rate", 0.0),
        arguments=arguments,
    )
    levels = [level % 4 for level in plain(hyper.get("out_indices", [3]))]
    built = build_pyramid(architecture, levels=levels, out_norm="all")
    built.body.freeze(hyper.get("frozen_stages", 0))
    return built


def teacher_body(hyper: Settings) -> Built:
    """mmpretrain's VisionTransformer: the final norm on the last block's map only, plain bicubic positions."""
    hyper.expect("type", "mmpretrain.VisionTransformer")
    hyper.expect("out_type", "featmap")
    for key, value in (("with_cls_token", True), ("qkv_bias", True), ("pre_norm", False), ("drop_rate", 0.0)):
        hyper.expect(key, value)
    hyper.expect("interpolate_mode", "bicubic")
    hyper.expect("drop_path_rate", 0.0)
    arch = plain(hyper["arch"])
    if isinstance(arch, str):
        width, depth, heads, hidden = VIT[arch]
    else:
        names = ("embed_dims", "num_layers", "num_heads", "feedforward_channels")
        width, depth, heads, hidden = (arch.pop(name) for name in names)
        assert not arch, f"arch: unknown {arch}"
    patch = hyper.get("patch_size", 16)
    arguments = {
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": hidden / width,
        "init_values": hyper.get("layer_scale_init_value", 0.0) or None,
    }
    built = build_vit(
        Architecture("vit_base_patch14_dinov2", bands=hyper.get("in_channels", 3), arguments=arguments),
        out_indices=[tap % depth for tap in plain(hyper.get("out_indices", [-1]))],
        out_norm="last" if hyper.get("final_norm", True) else "none",
        position="bicubic",
        image_size=_side(hyper.get("img_size", 224)),
    )
    built.body.freeze(min(hyper.get("frozen_stages", 0), depth))
    return built


def _side(size: Any) -> int:
    sides = {size} if isinstance(size, int) else set(plain(size))
    assert len(sides) == 1, f"img_size: {size} is not square"
    return int(sides.pop())


def fmm_config(hyper: Settings, norm_eps: float) -> FmmConfig:
    hyper.expect("type", "FMM")
    hyper.expect("qkv_bias", True)
    hyper.expect("mlp_ratio", 4, 4.0)
    return FmmConfig(
        type=FMM_TYPES[hyper.get("model_type", "mlp")],
        depth=hyper.get("mlp_nums", 1),
        rank_dim=hyper.get("rank_dim", 4),
        heads=hyper.get("num_heads", 8),
        norm_eps=norm_eps,
    )


def decoder_config(hyper: Settings, kind: str | None = None) -> DecoderConfig:
    """`kind` is the reference class, if the settings do not name it."""
    _check_head(hyper)
    hyper.expect("interpolate_mode", "bilinear")
    values = {"pool_scales": tuple(plain(hyper["pool_scales"]))} if "pool_scales" in hyper else {}
    return DecoderConfig(
        type=DECODER_TYPES[hyper.get("type", kind)],
        channels=hyper["channels"],
        dropout=hyper.get("dropout_ratio", 0.1),
        align_corners=hyper.get("align_corners", False),
        **values,
    )


def aux_config(hyper: Settings, *, level: int) -> AuxConfig:
    hyper.expect("type", "FCNHead")
    hyper.expect("kernel_size", 3)
    hyper.expect("dilation", 1)
    _check_head(hyper)
    return AuxConfig(
        level=level,
        channels=hyper["channels"],
        num_convs=hyper.get("num_convs", 2),
        concat_input=hyper.get("concat_input", True),
        dropout=hyper.get("dropout_ratio", 0.1),
        weight=check_loss(hyper)["loss_weight"],
    )


def _check_head(hyper: Settings) -> None:
    check_norm(hyper)
    assert check_loss(hyper)["class_weight"] is None, "class weights are not supported in KTDA's heads"
    hyper.expect("ignore_index", 255)
    hyper.expect("input_transform", "multiple_select", "resize_concat")


def distillation_config(hyper: Settings) -> DistillationConfig:
    return DistillationConfig(alpha=hyper.get("alpha", 0.5), temperature=hyper.get("temperature", 1.0))


def own_names(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors of one part under our names, by the importer's renaming of whole checkpoints."""
    names = {name: own_name(f"{prefix}.{name}") for name in tensors}
    return {names[n].removeprefix("aux_heads.").partition(".")[2]: tensor for n, tensor in tensors.items()}


def own_name(name: str) -> str:
    """Our name of a tensor of the segmenter, `aux_heads...` or `teacher...`."""
    renamed = rename_tensors({name: torch.empty(0)})
    (own,) = (
        *renamed.segmenter,
        *(f"aux_heads.{key}" for key in renamed.aux_heads),
        *(f"teacher.{key}" for key in renamed.teacher),
    )
    return own


def without_unused_parts(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop stages and blocks after the last returned one: the original keeps them, ours does not."""
    return {name: tensor for name, tensor in tensors.items() if name in own or "body.network." not in name}


def load_backbone(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    module.load_state_dict(without_unused_parts(tensors, module.state_dict()), strict=True)


def student_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return convnext_from_mmpretrain(tensors)


def teacher_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return vit_from_mmpretrain(tensors)
