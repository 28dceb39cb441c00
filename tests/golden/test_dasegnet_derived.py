"""Cases derived from ST-DASegNet's recorded ones: each passes, and fails with a wrong value."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rsseg.methods.dasegnet.network import DASegNet
from tests.golden.builders import images_of
from tests.golden.dasegnet_build import make_method
from tests.golden.derive import Edit, Meta, derive, drop, fails, put, read, recorded, spoil, write
from tests.golden.harness import load_case, run_case
from tests.golden.test_dasegnet import DRIVERS

SEGMENTOR = "encode_decode_resnet"


def windows(net: DASegNet, images: Tensor, crop: list[int], stride: list[int]) -> Tensor:
    """Independent implementation of mmsegmentation's sliding windows."""
    height, width = images.shape[-2:]
    total = torch.zeros(len(images), net.task.num_classes, height, width)
    count = torch.zeros(1, 1, height, width)
    for row in range(max(height - crop[0] + stride[0] - 1, 0) // stride[0] + 1):
        for col in range(max(width - crop[1] + stride[1] - 1, 0) // stride[1] + 1):
            bottom, right = min(row * stride[0] + crop[0], height), min(col * stride[1] + crop[1], width)
            top, left = max(bottom - crop[0], 0), max(right - crop[1], 0)
            total[..., top:bottom, left:right] += net(images[..., top:bottom, left:right])
            count[..., top:bottom, left:right] += 1
    return total / count


def sliding(crop: list[int], stride: list[int], names: dict[str, str], *, stored_as: torch.dtype) -> Edit:
    """Add a sliding-window test configuration, a second, smaller view of the images, and results under given names."""

    def edit(meta: Meta, tensors: dict[str, Tensor]) -> None:
        meta["segmentor"]["test_cfg"] = {"mode": "slide", "crop_size": crop, "stride": stride}
        second = F.interpolate(tensors["img_u8"].float(), size=(48, 64), mode="bilinear").round().to(torch.uint8)
        net, images = segmenter_of(meta, tensors), images_of(tensors["img_u8"])
        with torch.no_grad():
            first, other = (windows(net, view, crop, stride) for view in (images, images_of(second)))
        enlarged = F.interpolate(other, size=images.shape[-2:], mode="bilinear")
        both = (first.softmax(1) + enlarged.softmax(1)) / 2
        results = {
            "view": second if stored_as == torch.uint8 else images_of(second),
            "slide": first,
            "probability": first.softmax(1),
            "class": first.argmax(1).to(torch.uint8),
            "several": both.argmax(1)[:, None].to(torch.uint8),
        }
        tensors |= {names[name]: value for name, value in results.items() if name in names}

    return edit


def segmenter_of(meta: Meta, tensors: dict[str, Tensor]) -> DASegNet:
    source = recorded("dasegnet", SEGMENTOR)
    case = load_case(source, DRIVERS)
    return make_method(case, {}).segmenter.eval()


NAMES = {
    "short": {"view": "img2", "slide": "slide_logits", "probability": "prob", "class": "pred", "several": "aug_pred"},
    "long": {
        "view": "img_rescaled_u8",
        "slide": "logits_slide",
        "probability": "softmax",
        "class": "argmax",
        "several": "multi_scale.argmax",
    },
}


@pytest.mark.parametrize(
    ("crop", "stride", "style"),
    [([64, 64], [32, 32], "short"), ([48, 56], [24, 40], "long"), ([96, 96], [64, 64], "short")],
    ids=["square", "not square", "larger than the image"],
)
def test_windows_and_a_second_view(crop: list[int], stride: list[int], style: str, tmp_path: Path) -> None:
    names = NAMES[style]
    source = recorded("dasegnet", SEGMENTOR)
    dtype = torch.uint8 if names["view"].endswith("u8") else torch.float32
    meta, tensors = read(source)
    sliding(crop, stride, names, stored_as=dtype)(meta, tensors)
    run_case(write(tmp_path / f"{SEGMENTOR}.json", meta, tensors), DRIVERS)
    wrong = {name for key, name in names.items() if key != "view"}
    for name in wrong:
        tensors[name] = tensors[name] + 1
    case = load_case(write(tmp_path / f"{SEGMENTOR}.json", meta, tensors), DRIVERS)
    DRIVERS[case.kind](case)
    assert {difference.label for difference in case.comparison.differences} == wrong


def test_several_views_of_which_one_is_recorded_fail(tmp_path: Path) -> None:
    edit = sliding([64, 64], [32, 32], NAMES["short"], stored_as=torch.float32)
    fails(derive(recorded("dasegnet", SEGMENTOR), tmp_path, edit, drop("img2")), DRIVERS, match="several views")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("segmentor.backbone_s.avg_down", True),
        ("segmentor.backbone_t.style", "caffe"),
        ("segmentor.decode_head_t.channels", 13),
        ("segmentor.decode_head_s.align_corners", True),
        ("segmentor.test_cfg.flip", True),
        ("segmentor.train_cfg", {"disc_steps": 2}),
        ("segmentor.discriminator_s.norm_cfg.type", "BN"),
        ("segmentor.dsk_neck.L", 16),
        ("segmentor.dsk_neck.temperature", 2.0),
    ],
)
def test_a_changed_setting_of_a_segmentor_fails(path: str, value: object, tmp_path: Path) -> None:
    fails(derive(recorded("dasegnet", SEGMENTOR), tmp_path, put(path, value)), DRIVERS)


GAN_FORMULAS = {
    "hinge": (
        lambda x, real: sum(max(0.0, 1 - v if real else 1 + v) for v in x) / len(x),
        lambda x, real: -sum(x) / len(x),
    ),
    "wgan": (
        lambda x, real: (-1 if real else 1) * sum(x) / len(x),
        lambda x, real: (-1 if real else 1) * sum(x) / len(x),
    ),
    "wgan-logistic-ns": (
        lambda x, real: sum(math.log1p(math.exp(-v if real else v)) for v in x) / len(x),
        lambda x, real: sum(math.log1p(math.exp(-v if real else v)) for v in x) / len(x),
    ),
}
"""Loss -> formulas for the discriminator and for the generator."""


def gan_rows(meta: Meta, tensors: dict[str, Tensor]) -> None:
    x = tensors["input"].double().flatten().tolist()
    meta["values"] = [
        {
            "gan_type": name,
            "loss_weight": 0.5,
            "real_label_val": 1.0,
            "fake_label_val": 0.0,
            "target_is_real": int(real),
            "is_disc": is_disc,
            "value": formulas[0](x, real) if is_disc else 0.5 * formulas[1](x, real),
        }
        for name, formulas in GAN_FORMULAS.items()
        for real in (True, False)
        for is_disc in (True, False)
    ]


def test_every_gan_loss_of_the_published_code(tmp_path: Path) -> None:
    source = recorded("dasegnet", "gan_loss")
    run_case(derive(source, tmp_path, gan_rows), DRIVERS)
    for row in range(12):
        wrong = put(f"values.{row}.value", 7.0)
        fails(derive(source, tmp_path, gan_rows, wrong), DRIVERS, match=f"row {row},")
    fails(derive(source, tmp_path, gan_rows, put("values.0.gan_type", "relativistic")), DRIVERS)


TILES: list[dict[str, Any]] = [
    {
        "script": "GF-2",
        "source_name": name,
        "height": 6800,
        "width": 7200,
        "clip": 1024,
        "stride": 1024,
        "count": 42,
        "first_file": "GF2_PMS1__L1A0000564539-MSS1_0_0_1024_1024.png",
        "last_file": "GF2_PMS1__L1A0000564539-MSS1_6144_5120_7168_6144.png",
        "x_starts": [0, 1024, 2048, 3072, 4096, 5120, 6144],
        "y_starts": [0, 1024, 2048, 3072, 4096, 5120],
        "covered": [7168, 6144],
    }
    for name in ("GF2_PMS1__L1A0000564539-MSS1.tif", "GF2_PMS1__L1A0000564539-MSS1_label.tif")
]
TILES += [
    {
        "script": "CITY-OSM",
        "source_name": name,
        "height": 1100,
        "width": 1030,
        "clip": 512,
        "stride": 512,
        "count": 4,
        "first_file": "paris46_0_0_512_512.png",
        "last_file": "paris46_512_512_1024_1024.png",
        "covered": [1024, 1024],
    }
    for name in ("paris46_image.png", "paris46_labels.png")
]
TILES += [
    {
        "script": "vaihingen",
        "source_name": name,
        "height": 800,
        "width": 1100,
        "clip": 512,
        "stride": 256,
        "count": 6,
        "first_file": "area12_0_0_512_512.png",
        "last_file": "area12_512_256_1024_768.png",
        "x_starts": [0, 256, 512],
        "y_starts": [0, 256],
    }
    for name in ("top_mosaic_09cm_area12.tif", "top_mosaic_09cm_area12_noBoundary.tif")
]
TILES += [
    {
        "script": "potsdam",
        "source_name": f"top_potsdam_7_7_{suffix}.tif",
        "height": 1400,
        "width": 1600,
        "clip": 512,
        "stride": 512,
        "count": 6,
        "first_file": "7_7_0_0_512_512.png",
        "last_file": "7_7_1024_512_1536_1024.png",
    }
    for suffix in ("RGB", "IRRG", "RGBIR", "label", "label_noBoundary")
]


@pytest.mark.parametrize("row", TILES, ids=lambda row: row["source_name"])
def test_tiles_of_images_and_labels_of_every_published_script(row: dict[str, Any], tmp_path: Path) -> None:
    source = recorded("dasegnet", "tiling")
    run_case(derive(source, tmp_path, put("rows", [row]), name="tiling_labels"), DRIVERS)
    for key, wrong in (("count", 5), ("first_file", "x_0_0_512_512.png"), ("source_name", "holiday.jpg")):
        fails(derive(source, tmp_path, put("rows", [row | {key: wrong}])), DRIVERS)


def test_tiles_at_another_stride_than_published(tmp_path: Path) -> None:
    """Potsdam's script takes the number of tiles from the stride and their distance from the tile."""
    row = TILES[-1] | {"stride": 256, "x_starts": [0, 512, 1024, 1088], "y_starts": [0, 512, 888], "count": 12}
    del row["last_file"]
    run_case(derive(recorded("dasegnet", "tiling"), tmp_path, put("rows", [row])), DRIVERS)


@pytest.mark.parametrize(
    ("script", "colours", "values"),
    [
        ("GF-2", [(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 255, 255), (255, 255, 0), (0, 0, 255)], [0, 1, 2, 3, 3, 4]),
        ("CITY-OSM", [(255, 255, 255), (0, 0, 255), (255, 0, 0), (12, 34, 56)], [0, 1, 2, 0]),
        ("vaihingen", [(0, 0, 0), (255, 255, 255), (0, 0, 255), (255, 255, 0), (1, 2, 3)], [0, 1, 2, 5, 0]),
    ],
)
def test_label_colours_of_every_published_script(
    script: str, colours: list[tuple[int, int, int]], values: list[int], tmp_path: Path
) -> None:
    def paint(meta: Meta, tensors: dict[str, Tensor]) -> None:
        meta["script"] = script
        height, width = tensors["label"].shape
        index = torch.arange(height * width).reshape(height, width) % len(colours)
        tensors["rgb"] = torch.tensor(colours, dtype=torch.uint8)[index]
        label = torch.tensor(values, dtype=torch.uint8)[index]
        label[:, width // 8 * 8 :] = 255
        label[height // 8 * 8 :] = 255
        tensors["label"] = label

    source = recorded("dasegnet", "label_colours_potsdam")
    run_case(derive(source, tmp_path, paint, name="label_colours_other"), DRIVERS)
    fails(derive(source, tmp_path, paint, spoil("label")), DRIVERS)


def test_fewer_training_steps_without_pseudo_labels(tmp_path: Path) -> None:
    def shorten(meta: Meta, tensors: dict[str, Tensor]) -> None:
        del meta["steps"][2:]
        del meta["steps"][0]["update_norm"]

    source, edits = recorded("dasegnet", "train_step_single_t"), (shorten, drop("step1.pseudo", "step2."))
    run_case(derive(source, tmp_path, *edits), DRIVERS)
    fails(derive(source, tmp_path, *edits, put("steps.1.grad_norm.dsk_neck", 5.0)), DRIVERS, match="dsk_neck")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("optimizers.backbone_s.paramwise_cfg.custom_keys", {"bias": {"decay_mult": 0.0}}),
        ("optimizers.backbone_t.lr", 1e-3),
        ("optimizers.dsk_neck.clip_grad", 1.0),
        ("optimizers.discriminator_s.type", "SGD"),
        ("segmentor.cross_EMA.type", "whole"),
        ("segmentor.cross_EMA.pseudo_threshold", 0.9),
        ("segmentor.cross_EMA.warm_up", 100),
    ],
)
def test_a_changed_setting_of_training_steps_fails(path: str, value: object, tmp_path: Path) -> None:
    fails(derive(recorded("dasegnet", "train_step_single_t"), tmp_path, put(path, value)), DRIVERS)


@pytest.mark.parametrize(
    ("source", "prefixes", "key"),
    [
        ("ml_dskneck", ("grad.", "cot_"), "out_t.3"),
        ("ds2neck", ("grad.param.",), "grad.x_s.0"),
        ("mit_tiny", ("grad.x",), "out.3"),
        ("segformer_head", ("grad.", "state_after."), "loss_ce_weighted"),
        ("sep_aspp_head", ("grad.x.",), "grad.param.bottleneck.conv.weight"),
        ("discriminator_nc2", ("grad.param.", "sw_softmax", "loss_real_is_disc"), "loss_fake"),
        ("sw_softmax", ("grad.", "cot"), "out"),
    ],
)
def test_a_part_with_fewer_results(source: str, prefixes: tuple[str, ...], key: str, tmp_path: Path) -> None:
    run_case(derive(recorded("dasegnet", source), tmp_path, drop(*prefixes)), DRIVERS)
    fails(derive(recorded("dasegnet", source), tmp_path, drop(*prefixes), spoil(key)), DRIVERS)
