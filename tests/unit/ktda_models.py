"""Tiny KTDA models that tests share: real backbones of the zoo with random weights."""

from typing import Any

import torch

from rsseg.data.streams import Batch, Samples
from rsseg.methods.ktda.method import KTDAMethod, build_method
from rsseg.methods.ktda.recipe import KTDARecipe
from tests.conftest import rgb_task

TASK = rgb_task()

PLAIN = {
    "method": "ktda",
    "name": "tiny",
    "data": {"path": "unused", "augment": {"crop_size": 32}},
    "student": {"name": "convnext_mini", "weights": "random"},
    "decoder": {"channels": 8},
    "trainer": {"batch_size": 2, "steps": 10},
}

TAUGHT = PLAIN | {
    "teacher": {"name": "vit_mini_patch8", "weights": "random"},
    "fam": {},
    "neck": {},
    "fmm": {"type": "mlp"},
    "aux": [{"channels": 8}],
}


def recipe_of(base: dict[str, Any] = TAUGHT, **changes: Any) -> KTDARecipe:
    return KTDARecipe.model_validate(base | changes)


def method_of(base: dict[str, Any] = TAUGHT, **changes: Any) -> KTDAMethod:
    torch.manual_seed(0)
    return build_method(recipe_of(base, **changes), TASK)


def batch_of(height: int = 32, width: int = 32, *, labeled: bool = True) -> Batch:
    draw = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, height, width, generator=draw)
    masks = torch.randint(0, 3, (2, height, width), generator=draw) if labeled else torch.full((2, height, width), 255)
    return {"labeled": Samples(images, torch.ones_like(masks, dtype=torch.bool), masks)}
