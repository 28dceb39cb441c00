"""Tiny RS-MTDF models that tests share: real backbones of the zoo with random weights."""

from typing import Any

import torch

from rsseg.data.streams import Batch, Samples
from rsseg.methods.mtdf.method import MTDFMethod, build_method
from rsseg.methods.mtdf.recipe import MTDFRecipe
from rsseg.task import IGNORE_INDEX
from tests.conftest import rgb_task

CROP = 32

VIT = {"name": "vit_mini_patch8", "weights": "random"}
PYRAMID = {"name": "convnext_mini", "weights": "random"}

TASK = rgb_task()

FIXMATCH = {
    "method": "mtdf",
    "name": "tiny",
    "data": {"path": "unused", "augment": {"crop_size": CROP}},
    "student": VIT,
    "decoder_widths": [4, 6, 8, 10],
    "decoder_features": 8,
    "confidence": 0.3,
    "translator_width": 12,
}

TEACHERS = [
    {"name": "vit", "backbone": VIT | {"out_indices": [3]}},
    {"name": "cnn", "backbone": PYRAMID | {"out_indices": [2]}, "input_size": 64, "loss_weight": 2.0},
]

TAUGHT = FIXMATCH | {"teachers": TEACHERS}


def recipe_of(base: dict[str, Any] = TAUGHT, **changes: Any) -> MTDFRecipe:
    return MTDFRecipe.model_validate(base | changes)


def method_of(base: dict[str, Any] = TAUGHT, **changes: Any) -> MTDFMethod:
    torch.manual_seed(0)
    return build_method(recipe_of(base, **changes), TASK)


def batch_of(*, views: int = 1, labels: bool = True, valid: bool = True) -> Batch:
    draw = torch.Generator().manual_seed(1)

    def images(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, 3, CROP, CROP, generator=draw)

    masks = torch.randint(0, 3, (2, CROP, CROP), generator=draw)
    everywhere = torch.full((2, CROP, CROP), valid)
    mix = torch.zeros(2, views, CROP, CROP, dtype=torch.bool)
    mix[0, :, 4:20, 8:28] = True
    return {
        "labeled": Samples(images(2), everywhere, masks if labels else torch.full_like(masks, IGNORE_INDEX)),
        "unlabeled": Samples(images(2), everywhere, strong=images(2, views), mix=mix),
    }
