"""Networks of ST-DASegNet's golden cases, built from the authors' settings out of product classes."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from rsseg.backbones.backbone import Backbone, BackboneInfo
from rsseg.backbones.timm_adapter import Architecture, build_pyramid
from rsseg.methods.dasegnet.recipe import DASegNetRecipe, DecoderConfig
from rsseg.task import ClassInfo, Task

RESNETS = {18: (BasicBlock, 1), 34: (BasicBlock, 1), 50: (Bottleneck, 4), 101: (Bottleneck, 4)}
RESNET_LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
DECODERS = {"SegformerHead": "segformer", "DepthwiseSeparableASPPHead": "deeplabv3plus"}


def image_of(stored: Tensor) -> Tensor:
    """The recorded exact transform; it stands for the students' own normalization."""
    return (stored.float() - 127.5) / 64


def make_task(num_classes: int) -> Task:
    classes = tuple(ClassInfo(name=f"c{i}", value=i, color=(i, 0, 0)) for i in range(num_classes))
    return Task(name="golden", classes=classes, bands=("red", "green", "blue"), scale=(1.0,) * 3, offset=(0.0,) * 3)


def make_backbone(config: Mapping[str, Any]) -> Backbone:
    """MixVisionTransformer or ResNetV1c; takes images that are normalized already."""
    match config["type"]:
        case "MixVisionTransformer":
            built = build_pyramid(mit(config))
            for stage, (patch, stride) in enumerate(zip(config["patch_sizes"], config["strides"], strict=True)):
                network = built.body.network
                embed = network.patch_embed if stage == 0 else network.stages[stage].downsample
                assert embed.proj.kernel_size == (patch, patch)
                embed.proj.stride = (stride, stride)
        case "ResNetV1c":
            built = build_pyramid(resnet(config))
            if config["depth"] < 50:
                for stage in (built.body.network.layer3, built.body.network.layer4):
                    for block in stage:  # their basic block dilates its first convolution only
                        block.conv2.dilation = block.conv2.padding = (1, 1)
        case other:
            raise AssertionError(f"no such backbone: {other}")
    info = BackboneInfo(
        name="golden",
        timm_name="",
        kind="pyramid",
        channels=built.channels,
        strides=built.strides,
        input_multiple=32,
        patch_size=None,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        license="",
    )
    return Backbone(info, built.body)


def mit(config: Mapping[str, Any]) -> Architecture:
    assert config["qkv_bias"]
    assert not (config["drop_rate"])
    assert not (config["attn_drop_rate"])
    return Architecture(
        "pvt_v2_b0",
        bands=config["in_channels"],
        drop_path=config["drop_path_rate"],
        arguments={
            "depths": config["num_layers"],
            "embed_dims": [config["embed_dims"] * heads for heads in config["num_heads"]],
            "num_heads": config["num_heads"],
            "sr_ratios": config["sr_ratios"],
            "mlp_ratios": (config["mlp_ratio"],) * config["num_stages"],
        },
        norm_eps=1e-6,
    )


def resnet(config: Mapping[str, Any]) -> Architecture:
    assert config["dilations"] == [1, 1, 2, 4]
    assert config["strides"] == [1, 2, 1, 1]
    assert config["contract_dilation"]
    assert config["style"] == "pytorch"
    block, _ = RESNETS[config["depth"]]
    base = config.get("base_channels", 64)
    return Architecture(
        "resnet18",
        arguments={
            "block": block,
            "layers": RESNET_LAYERS[config["depth"]],
            "channels": tuple(base * 2**i for i in range(4)),
            "stem_width": config.get("stem_channels", 64) // 2,
            "stem_type": "deep",
            "output_stride": 8,
        },
    )


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    assert not config["align_corners"]
    values: dict[str, Any] = {
        "type": DECODERS[config["type"]],
        "channels": config["channels"],
        "dropout": config["dropout_ratio"],
    }
    if values["type"] == "deeplabv3plus":
        values |= {"dilations": config["dilations"], "low_channels": config["c1_channels"]}
    return DecoderConfig(**values)


def make_recipe(segmentor: Mapping[str, Any], optimizers: Mapping[str, Any]) -> DASegNetRecipe:
    """The recipe that says what the authors' settings say."""
    ema, gan = segmentor["cross_EMA"], segmentor["discriminator_s"]["gan_loss"]
    assert segmentor["discriminator_s"] == segmentor["discriminator_t"]
    assert (gan["real_label_val"], gan["fake_label_val"]) == (1.0, 0.0)
    main = optimizers.get("backbone_s", {"type": "AdamW", "lr": 1e-4})
    head = optimizers.get("decode_head_s", main)
    values: dict[str, Any] = {
        "method": "dasegnet",
        "name": "golden",
        "data": {"path": ".", "augment": {"crop_size": 4096}},
        "trainer": {"batch_size": 2},
        "backbone": {"name": "mit_b0", "weights": "random"},
        "neck": neck_values(segmentor["dsk_neck"]),
        "decoder": decoder_config(segmentor["decode_head_s"]).model_dump(),
        "adversarial": {
            "weight": gan["loss_weight"],
            "loss": gan["gan_type"].lower(),
            "convs": segmentor["discriminator_s"]["num_conv"],
            "base_channels": segmentor["discriminator_s"]["base_channels"],
        },
        "self_training": {
            "weight": ema["training_ratio"],
            "confidence": ema["pseudo_threshold"],
            "rare_confidence": ema["pseudo_rare_threshold"],
            "class_weights": ema["pseudo_class_weight"],
            "missing_class_weights": "class_index",
            "teacher": {"type": ema["type"], "decay": ema["decay"]},
        },
        "source_decoder_weights": segmentor["decode_head_s"]["loss_decode"]["class_weight"],
        "target_decoder_weights": segmentor["decode_head_t"]["loss_decode"]["class_weight"],
        "head_lr_scale": head["lr"] / main["lr"],
        "optimizers": {
            ours: optimizer_values(optimizers.get(theirs, {"type": "Adam", "lr": 1e-4}))
            for ours, theirs in (
                ("main", "backbone_s"),
                ("disc_source", "discriminator_s"),
                ("disc_target", "discriminator_t"),
            )
        },
    }
    return DASegNetRecipe.model_validate(values)


def neck_values(config: Mapping[str, Any]) -> dict[str, Any]:
    # the authors' neck of several levels hands on L but not r, whose default is 8
    return {"type": config["dsk_type"], "reduction": 8, "min_width": config["L"]}


def optimizer_values(config: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: config[key] for key in ("lr", "betas", "weight_decay", "momentum", "eps") if key in config}
    return {"name": config["type"].lower(), "weight_decay": 0.0} | values


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    module.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, strict=True)


def grads(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in module.named_parameters()
    }
