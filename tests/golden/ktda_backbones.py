"""Golden cases of KTDA's student and teacher networks."""

import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from rsseg.backbones.backbone import Backbone, BackboneInfo
from rsseg.backbones.bodies import resample_positions
from rsseg.backbones.keys import convnext_from_mmpretrain, vit_from_mmpretrain
from rsseg.backbones.timm_adapter import Architecture, Built, build_pyramid, build_vit
from rsseg.backbones.zoo import create_backbone
from rsseg.config import BackboneConfig
from rsseg.methods.ktda.parts import FeatureAlignment
from rsseg.task import ClassInfo, Task
from tests.golden.harness import Case, Handler

UNIT_STATISTICS = Task(
    name="golden",
    classes=(ClassInfo(name="any", value=0, color=(0, 0, 0)),),
    bands=("red", "green", "blue"),
    scale=(1.0,) * 3,
    offset=(0.0,) * 3,
    mean=(0.0,) * 3,
    std=(1.0,) * 3,
)


def unnormalized(built: Built, patch: int | None) -> Backbone:
    """A backbone that takes the recorded inputs, which are normalized already."""
    info = BackboneInfo(
        name="golden",
        timm_name="golden",
        kind="vit" if patch else "pyramid",
        channels=built.channels,
        strides=built.strides,
        input_multiple=patch or max(built.strides),
        patch_size=patch,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        license="none",
    )
    return Backbone(info, built.body)


def check_gradients(case: Case, backbone: Backbone, recorded: Mapping[str, Tensor]) -> None:
    parameters = dict(backbone.named_parameters())
    assert recorded.keys() <= parameters.keys()
    for name, expected in recorded.items():
        torch.testing.assert_close(
            parameters[name].grad,
            expected,
            **case.tolerance("grad"),
            msg=lambda text, name=name: f"{case.name} {name}: {text}",
        )


def convnext(case: Case) -> None:
    hyper = case.meta["hyper"]
    arguments = {
        "depths": tuple(hyper["arch"]["depths"]),
        "dims": tuple(hyper["arch"]["channels"]),
        "ls_init_value": hyper["layer_scale_init_value"] or None,
    }
    architecture = Architecture(
        "convnextv2_base" if hyper.get("use_grn") else "convnext_base",
        drop_path=hyper["drop_path_rate"],
        arguments=arguments,
    )
    backbone = unnormalized(build_pyramid(architecture, levels=hyper["out_indices"], out_norm="all"), None)
    backbone.load_state_dict(convnext_from_mmpretrain(case.group("sd")))
    for number, image in enumerate(case.sequence("in")):
        image.requires_grad_()
        maps = backbone(image)
        for i, tap in enumerate(maps):
            case.check(tap, f"out.{i}")
        torch.autograd.backward(maps, case.sequence("cot"))
        case.check(image.grad, f"grad.in.{number}", "grad")
    check_gradients(case, backbone, convnext_from_mmpretrain(case.group("grad.sd")))


def vision_transformer(case: Case) -> None:
    hyper = case.meta["hyper"]
    arch, patch = hyper["arch"], hyper["patch_size"]
    arguments = {
        "patch_size": patch,
        "embed_dim": arch["embed_dims"],
        "depth": arch["num_layers"],
        "num_heads": arch["num_heads"],
        "mlp_ratio": arch["feedforward_channels"] / arch["embed_dims"],
        "init_values": hyper["layer_scale_init_value"],
    }
    built = build_vit(
        Architecture("vit_base_patch14_dinov2", arguments=arguments),
        out_indices=hyper["out_indices"],
        out_norm="last",
        position="bicubic",
        image_size=hyper["img_size"],
    )
    built.body.freeze(hyper["frozen_stages"])
    backbone = unnormalized(built, patch).eval()
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    tensors = vit_from_mmpretrain(case.group("sd"))
    backbone.load_state_dict(tensors)
    images = case.sequence("in")
    for j, image in enumerate(images):
        for i, tap in enumerate(backbone(image)):
            case.check(tap, f"out.{j}.{i}")
    if "in.ckpt_pos_embed" in case.tensors:
        grid = tuple(case.meta["fixed_grid_from_img_size"])
        table = resample_positions(case.tensors["in.ckpt_pos_embed"], grid, prefix=1, mode="bicubic")
        case.check(table, "out.loaded_pos_embed")
        backbone.load_state_dict(tensors | vit_from_mmpretrain({"pos_embed": table}))
        for i, tap in enumerate(backbone(images[0])):
            case.check(tap, f"out.loaded.{i}")


def hashed(name: str, shape: torch.Size | tuple[int, ...], case_number: int) -> np.ndarray:
    """Numbers in [-0.5, 0.5) from the integer hash that such cases describe."""
    seed = zlib.crc32(name.encode()) ^ case_number
    index = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64)
    x = (index * np.uint64(2654435761) + np.uint64(seed * 40503 % 2**32)) & np.uint64(0xFFFFFFFF)
    for _ in range(2):
        x ^= x >> np.uint64(16)
        x = (x * np.uint64(73244475)) & np.uint64(0xFFFFFFFF)
    x ^= x >> np.uint64(16)
    return (x / 2.0**32 - 0.5).reshape(shape)


def hashed_parameter(name: str, shape: torch.Size, case_number: int) -> Tensor:
    u = hashed(name, shape, case_number)
    spread = 12**0.5
    if name.endswith(("pos_embed", "cls_token")):
        value = 0.1 * spread * u
    elif len(shape) >= 2:
        value = 0.9 / (u.size / shape[0]) ** 0.5 * spread * u
    elif "gamma" in name:
        value = 0.1 + 0.2 * (u + 0.5)
    elif name.endswith("weight"):
        value = 1 + 0.2 * spread * u
    else:
        value = 0.2 * spread * u
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def mmpretrain_names(backbone: Backbone) -> dict[str, str]:
    """Our names -> the reference's, found by asking the product's renaming about every reference name."""
    depths = [len(stage.blocks) for stage in backbone.body.network.stages]
    leaves = [f"downsample_layers.{i}.{j}.{leaf}" for i in range(4) for j in range(2) for leaf in ("weight", "bias")]
    leaves += [f"norm{i}.{leaf}" for i in range(4) for leaf in ("weight", "bias")]
    for stage, depth in enumerate(depths):
        for block in range(depth):
            parts = ("depthwise_conv", "norm", "pointwise_conv1", "pointwise_conv2")
            leaves += [f"stages.{stage}.{block}.{part}.{leaf}" for part in parts for leaf in ("weight", "bias")]
            leaves.append(f"stages.{stage}.{block}.gamma")
    marks = {name: torch.tensor(i) for i, name in enumerate(leaves)}
    return {ours: leaves[int(mark)] for ours, mark in convnext_from_mmpretrain(marks).items()}


def convnext_base_and_fam(case: Case) -> None:
    number = case.meta["case_number"]
    for name, expected in case.meta["self_check"].items():
        key = name.partition("[")[0]
        torch.testing.assert_close(hashed_parameter(key, torch.Size([1024]), number)[:4], torch.tensor(expected))
    backbone = create_backbone(
        BackboneConfig(name="convnext_base", weights="random", statistics="data"), UNIT_STATISTICS
    ).eval()
    names = mmpretrain_names(backbone)
    backbone.load_state_dict(
        {
            ours: hashed_parameter(f"backbone.{names[ours]}", tensor.shape, number)
            for ours, tensor in backbone.state_dict().items()
        }
    )
    shape = tuple(case.meta["input_shape"])
    image = torch.from_numpy((12**0.5 * hashed("image", shape, number)).astype(np.float32))
    with torch.no_grad():
        maps = backbone(image)
    for i, tap in enumerate(maps):
        case.check(tap[:, ::16, ::2, ::2], f"out.student.{i}")
    recorded = case.sequence("out.fam")
    fam = FeatureAlignment(backbone.info.channels, [tap.shape[1] * 16 for tap in recorded], grid=recorded[0].shape[-1])
    for name, parameter in fam.named_parameters():
        reference = name.replace("projections", "fam.convert")
        parameter.data = hashed_parameter(reference, parameter.shape, number)
    with torch.no_grad():
        for i, tap in enumerate(fam(maps, shape[-2:])):
            case.check(tap[:, ::16], f"out.fam.{i}")


HANDLERS: dict[str, Handler] = {
    "mmpretrain.ConvNeXt": convnext,
    "mmpretrain.VisionTransformer": vision_transformer,
    "ConvNeXt-B + FAM at real size, grass geometry": convnext_base_and_fam,
}
