"""Every experiment of the publication's repository as a recipe, held against its count of trainable parameters."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from rsseg.methods.ktda.method import make_aux_head
from rsseg.methods.ktda.network import build_segmenter
from rsseg.methods.ktda.recipe import KTDARecipe
from rsseg.task import ClassInfo, Task

TASK = Task(
    name="grass",
    classes=tuple(ClassInfo(name=f"level {i}", value=i, color=(i, i, i)) for i in range(5)),
    bands=("red", "green", "blue"),
    scale=(1 / 255,) * 3,
    offset=(0.0,) * 3,
)

STUDENT = {"name": "convnext_base", "out_norm": "all"}
FEMTO = {"student": {"name": "convnextv2_femto", "out_norm": "all", "drop_path": 0.1}}
TINY_VIT = {"student": {"name": "tiny_vit_5m_224", "out_norm": "all"}}
LARGE = {"teacher": {"name": "vit_large_patch14_dinov2", "out_indices": [7, 11, 15, 23], "out_norm": "last"}}
MLP = {"fmm": {"type": "mlp"}}
SEGFORMER = {"decoder": {"type": "segformer", "channels": 256}, "neck": None}
NO_TEACHER = {"teacher": None, "fam": {"grid": 19, "width": 768}}
FOUR_AUX = {"aux": [{"level": i} for i in range(4)]}
SINGLE_SCALE = {
    "student": STUDENT | {"out_indices": [3]},
    "teacher": {"name": "vit_base_patch14_dinov2", "out_indices": [11], "out_norm": "last"},
    "neck": {"scales": [1]},
    "aux": [{"level": 0}],
}
FUSED = {"fuse": True, "neck": {"scales": [1]}, "aux": [{"level": 0}]}


def vit_blocks(depth: int) -> dict[str, Any]:
    return {"fmm": {"type": "vit_block", "depth": depth}}


# The publication takes TinyViT's levels after each stage's downsampling (128, 160, 320, 320 channels), ours come before
# it (64, 128, 160, 320): 256 channels less for the level norms, and for FAM at the teacher's width.
TINY_VIT_LEVELS = 2 * 256
TINY_VIT_B, TINY_VIT_L = TINY_VIT_LEVELS + 256 * 768, TINY_VIT_LEVELS + 256 * 1024

EXPERIMENTS: dict[str, tuple[Mapping[str, Any], int]] = {
    "a": (NO_TEACHER, 146_674_826),
    "fam": ({}, 146_674_826),
    "c": (MLP, 147_858_314),
    "d": ({"aux": []}, 144_903_557),
    "e": (MLP | {"distillation": {"alpha": 0}}, 147_858_314),
    "f": (MLP | {"distillation": {"alpha": 1}}, 147_858_314),
    "g": (SINGLE_SCALE | MLP, 113_237_578),
    "h": (FUSED | MLP, 113_929_802),
    "i": ({"fmm": {"type": "mlp", "depth": 2}}, 149_041_802),
    "j": ({"fmm": {"type": "mlp", "depth": 3}}, 150_225_290),
    "k": ({"fmm": {"type": "mlp", "depth": 4}}, 151_408_778),
    "l": (MLP | {"aux": []}, 146_087_045),
    "m": (vit_blocks(1), 175_026_314),
    "n": (vit_blocks(2), 203_377_802),
    "p, published": (vit_blocks(4), 260_080_778),
    "s": (FEMTO | SEGFORMER | MLP, 9_412_122),
    "t": (TINY_VIT | SEGFORMER | MLP, 9_795_934 - TINY_VIT_B),
    "u": (MLP | {"neck": None}, 124_259_210),
    "v": (MLP | SEGFORMER, 93_053_066),
    "w": (FEMTO | MLP, 64_217_370),
    "x": (TINY_VIT | MLP, 64_601_182 - TINY_VIT_B),
    "y": (LARGE | FEMTO | SEGFORMER, 9_265_946),
    "z": (LARGE | TINY_VIT | SEGFORMER, 9_703_006 - TINY_VIT_L),
    "aa": (LARGE | FEMTO | SEGFORMER | FOUR_AUX, 16_349_225),
    "ab": (LARGE | TINY_VIT | SEGFORMER | FOUR_AUX, 16_786_285 - TINY_VIT_L),
    "student frozen": (NO_TEACHER | MLP | {"student": STUDENT | {"frozen_stages": 4}}, 60_293_898),
    "not distilled": (NO_TEACHER | MLP, 147_858_314),
    "femto without fmm": (FEMTO | SEGFORMER, 8_228_634),
    "baseline": (
        {"teacher": None, "fam": None, "neck": None, "aux": [{"level": 2}]},
        121_991_306,
    ),
}


@pytest.mark.parametrize(("changes", "expected"), EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_experiment_trains_as_many_parameters_as_published(changes: Mapping[str, Any], expected: int) -> None:
    base = {
        "method": "ktda",
        "name": "experiment",
        "data": {"path": "data/grass", "augment": {"crop_size": 256}},
        "student": STUDENT,
        "teacher": {"name": "vit_base_patch14_dinov2", "out_norm": "last"},
        "fam": {"grid": 19},
        "neck": {},
        "aux": [{"level": 2}],
    }
    recipe = KTDARecipe.model_validate(base | dict(changes))
    with torch.device("meta"):
        segmenter = build_segmenter(recipe, TASK)
        heads = [make_aux_head(aux, segmenter.decoder.in_channels, TASK.num_classes) for aux in recipe.aux]
    trainable = [p for module in (segmenter, *heads) for p in module.parameters() if p.requires_grad]
    assert sum(parameter.numel() for parameter in trainable) == expected
