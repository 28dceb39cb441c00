"""ST-DASegNet's networks, built from the authors' settings out of product classes."""

from collections.abc import Mapping
from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from rsseg.backbones.backbone import Backbone
from rsseg.backbones.timm_adapter import Architecture, Built, build_pyramid
from rsseg.methods.dasegnet.importer import rename_tensors, unread_neck_levels
from rsseg.methods.dasegnet.method import DASegNetMethod, assemble_method
from rsseg.methods.dasegnet.network import assemble, build_decoder
from rsseg.methods.dasegnet.recipe import DASegNetRecipe, DecoderConfig
from tests.golden.builders import check_loss, check_norm, make_task, unnormalized
from tests.golden.case import Case
from tests.golden.settings import Settings, plain

BLOCKS = {18: BasicBlock, 34: BasicBlock, 50: Bottleneck, 101: Bottleneck, 152: Bottleneck}
LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
OUTPUT_STRIDES = {((1, 2, 1, 1), (1, 1, 2, 4)): 8, ((1, 2, 2, 1), (1, 1, 1, 2)): 16, ((1, 2, 2, 2), (1, 1, 1, 1)): 32}
"""ResNet's strides and dilations per stage -> timm's output stride."""
DECODERS = {"SegformerHead": "segformer", "DepthwiseSeparableASPPHead": "deeplabv3plus"}
INPUT_MULTIPLE = 32


def make_backbone(config: Settings) -> Backbone:
    """MixVisionTransformer or ResNetV1c; takes images that are normalized already."""
    config.expect("num_stages", 4)
    config.expect("out_indices", [0, 1, 2, 3])
    config.expect("pretrained", None)
    make = {"MixVisionTransformer": mit, "ResNetV1c": resnet}
    assert config["type"] in make, f"there is no backbone {config['type']!r}"
    bands = config.get("in_channels", 3)
    return unnormalized(make[config["type"]](config), multiple=INPUT_MULTIPLE, bands=bands)


def mit(config: Settings) -> Built:
    for key, value in (("qkv_bias", True), ("drop_rate", 0.0), ("attn_drop_rate", 0.0), ("with_cp", False)):
        config.expect(key, value)
    architecture = Architecture(
        "pvt_v2_b0",
        bands=config.get("in_channels", 3),
        drop_path=config["drop_path_rate"],
        arguments={
            "depths": plain(config["num_layers"]),
            "embed_dims": [config["embed_dims"] * heads for heads in config["num_heads"]],
            "num_heads": plain(config["num_heads"]),
            "sr_ratios": plain(config["sr_ratios"]),
            "mlp_ratios": (config["mlp_ratio"],) * len(config["num_heads"]),
        },
        norm_eps=1e-6,
    )
    built = build_pyramid(architecture)
    network = built.body.network
    for stage, (patch, stride) in enumerate(zip(config["patch_sizes"], config["strides"], strict=True)):
        embed = network.patch_embed if stage == 0 else network.stages[stage].downsample
        assert embed.proj.kernel_size == (patch, patch), f"patch_sizes: stage {stage} has {embed.proj.kernel_size}"
        embed.proj.stride = (stride, stride)
    return built


def resnet(config: Settings) -> Built:
    check_norm(config)
    for key, value in (
        ("style", "pytorch"),
        ("contract_dilation", True),
        ("deep_stem", True),
        ("avg_down", False),
        ("norm_eval", False),
        ("frozen_stages", -1),
    ):
        config.expect(key, value)
    depth, base = config["depth"], config.get("base_channels", 64)
    geometry = tuple(plain(config["strides"])), tuple(plain(config["dilations"]))
    architecture = Architecture(
        "resnet18",
        bands=config.get("in_channels", 3),
        arguments={
            "block": BLOCKS[depth],
            "layers": LAYERS[depth],
            "channels": tuple(base * 2**i for i in range(4)),
            "stem_width": config.get("stem_channels", 64) // 2,
            "stem_type": "deep",
            "output_stride": OUTPUT_STRIDES[geometry],
        },
    )
    built = build_pyramid(architecture)
    if BLOCKS[depth] is BasicBlock:
        for stage in (built.body.network.layer3, built.body.network.layer4):
            for block in stage:  # their basic block dilates its first convolution only
                block.conv2.dilation = block.conv2.padding = (1, 1)
    return built


def decoder_config(config: Settings) -> DecoderConfig:
    check_norm(config)
    for key, value in (("align_corners", False), ("interpolate_mode", "bilinear"), ("ignore_index", 255)):
        config.expect(key, value)
    plain([config["in_channels"], config.get("c1_in_channels")])  # strict loading checks the widths
    values: dict[str, Any] = {
        "type": DECODERS[config["type"]],
        "channels": config["channels"],
        "dropout": config["dropout_ratio"],
    }
    if values["type"] == "deeplabv3plus":
        config.expect("in_index", 3, -1)
        values |= {"dilations": plain(config["dilations"]), "low_channels": config["c1_channels"]}
    else:
        config.expect("in_index", [0, 1, 2, 3])
    return DecoderConfig(**values)


def neck_values(config: Settings) -> dict[str, Any]:
    """Keyword arguments of our neck of several levels."""
    config.expect("type", "ML_DSKNeck")
    config.expect("in_index", list(range(len(config["in_channels"]))))
    plain(config.get("r"))  # the authors' neck of several levels hands on L but not r, whose default is 8
    return {"type": config["dsk_type"], "reduction": 8, "min_width": config["L"]}


def gan_values(config: Settings) -> dict[str, Any]:
    """Loss and weights of a discriminator's GAN loss."""
    config.expect("type", "GANLoss")
    return {
        "loss": config["gan_type"].lower(),
        "weight": config.get("loss_weight", 1.0),
        "real_value": config.get("real_label_val", 1.0),
        "fake_value": config.get("fake_label_val", 0.0),
    }


def discriminator_values(config: Settings) -> dict[str, Any]:
    """Keyword arguments of our discriminator, `in_channels` left out."""
    config.expect("type", "AdapSegDiscriminator")
    config.expect("norm_cfg", {"type": "IN"})
    plain(config["in_channels"])  # strict loading checks the width
    return {"convs": config["num_conv"], "base_channels": config["base_channels"]}


def make_recipe(segmentor: Settings, optimizers: Mapping[str, Settings]) -> DASegNetRecipe:
    """Recipe equivalent to the authors' settings."""
    segmentor.expect("type", "EncoderDecoder_forSTDASegNet")
    segmentor.expect("pretrained", None)
    segmentor.expect("train_cfg", {}, None)
    unknown = set(plain(segmentor.get("test_cfg") or {})) - {"mode", "crop_size", "stride"}
    assert not unknown, f"test_cfg: unknown {sorted(unknown)}"
    ema, gan = segmentor["cross_EMA"], gan_values(segmentor["discriminator_s"]["gan_loss"])
    assert plain(segmentor["discriminator_s"]) == plain(segmentor["discriminator_t"])
    assert (gan["real_value"], gan["fake_value"]) == (1.0, 0.0)
    heads = (segmentor["decode_head_s"], segmentor["decode_head_t"], ema["decode_head_EMA"])
    weights = [check_loss(head) for head in heads]
    assert {entry["loss_weight"] for entry in weights} == {1.0}
    decoders = [decoder_config(head) for head in heads]
    assert decoders[0] == decoders[1] == decoders[2]
    assert len({head["num_classes"] for head in heads}) == 1
    main = optimizers.get("backbone_s", Settings({"type": "AdamW", "lr": 1e-4}))
    head = optimizers.get("decode_head_s", main)
    values: dict[str, Any] = {
        "method": "dasegnet",
        "name": "golden",
        "data": {"path": ".", "augment": {"crop_size": 4096}},
        "trainer": {"batch_size": 2},
        "backbone": {"name": "mit_b0", "weights": "random"},
        "neck": neck_values(segmentor["dsk_neck"]),
        "decoder": decoders[0].model_dump(),
        "adversarial": {
            "weight": gan["weight"],
            "loss": gan["loss"],
            **discriminator_values(segmentor["discriminator_s"]),
        },
        "self_training": {
            "weight": ema["training_ratio"],
            "confidence": ema["pseudo_threshold"],
            "rare_confidence": ema["pseudo_rare_threshold"],
            "class_weights": plain(ema["pseudo_class_weight"]),
            "missing_class_weights": "class_index",
            "teacher": {"type": ema["type"], "decay": ema["decay"]},
        },
        "source_decoder_weights": plain(weights[0]["class_weight"]),
        "target_decoder_weights": plain(weights[1]["class_weight"]),
        "head_lr_scale": head["lr"] / main["lr"],
        "weight_decay_exempt": "names_with_norm" if exempts_norms(main) else "none",
        "optimizers": {name: {"name": "adamw", "lr": 1e-4} for name in ("main", "disc_source", "disc_target")},
    }
    plain(segmentor["dsk_neck"]["in_channels"])
    return DASegNetRecipe.model_validate(values)


def exempts_norms(optimizer: Settings) -> bool:
    """Whether an optimizer's settings exempt norms from weight decay.

    Two further keys of the authors' match no parameter of a sub-module: `head`, which asks for a higher rate, and
    `pos_block`.
    """
    custom = plain(optimizer.get("paramwise_cfg", Settings({"custom_keys": {}})))["custom_keys"]
    assert set(custom) <= {"norm", "head", "pos_block"}, f"paramwise_cfg: unknown {sorted(custom)}"
    assert custom.get("norm", {"decay_mult": 0.0}) == {"decay_mult": 0.0}
    return "norm" in custom


def make_method(case: Case, optimizers: Mapping[str, Settings]) -> DASegNetMethod:
    """The method of a case's settings, with its tensors."""
    segmentor = case.meta["segmentor"]
    recipe = make_recipe(segmentor, optimizers)
    task = make_task(segmentor["decode_head_s"]["num_classes"])
    students = (make_backbone(segmentor["backbone_s"]), make_backbone(segmentor["backbone_t"]))
    segmenter = assemble(recipe, task, students)

    def fresh(part: str) -> nn.Module:
        if part == "backbone_target":
            return make_backbone(segmentor["cross_EMA"]["backbone_EMA"])
        return build_decoder(recipe.decoder, segmenter.decoder_channels, task.num_classes)

    if "backbone_EMA" in segmentor["cross_EMA"]:
        plain(segmentor["cross_EMA"]["backbone_EMA"])  # not every kind of teacher has one
    method = assemble_method(recipe, segmenter, fresh)
    renamed = our_names(method, case.group("init") or case.group("state"))
    own = method.state_dict()
    assert set(renamed) == set(own), set(renamed) ^ set(own)
    method.load_state_dict({name: tensor.clone() for name, tensor in renamed.items()})
    return method


def our_names(method: DASegNetMethod, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' tensors under the names of the method's state dict, without neck levels that no decoder reads."""
    tensors = rename_tensors(state)
    unread = unread_neck_levels(tensors.segmenter, method.segmenter.state_dict())
    renamed = {f"segmenter.{name}": tensor for name, tensor in tensors.segmenter.items() if name not in unread}
    renamed |= tensors.discriminators
    for name, tensor in tensors.teacher.items():
        part, _, rest = name.partition(".")
        renamed[f"teacher.averages.{part}.module.{rest}"] = tensor
    return renamed
