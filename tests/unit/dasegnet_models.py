"""A small ST-DASegNet for unit tests."""

from pathlib import Path
from typing import Any

import torch

from rsseg.data.streams import Batch, Samples
from rsseg.methods.dasegnet.method import DASegNetMethod, build_method
from rsseg.methods.dasegnet.recipe import DASegNetRecipe
from rsseg.task import Task
from tests.conftest import rgb_task

SIDE = 64
TOKENS = {"name": "convnext_mini", "weights": "random", "out_indices": [0, 1]}
BATCH_NORM = {"name": "resnet18", "weights": "random", "out_indices": [0, 1]}


def make_recipe(**changes: Any) -> DASegNetRecipe:
    """Stride-8 features, so that crops of 64 pixels satisfy the discriminators; changes replace whole parts."""
    values: dict[str, Any] = {
        "method": "dasegnet",
        "name": "unit",
        "data": {"path": Path("unset"), "augment": {"crop_size": SIDE}},
        "trainer": {"batch_size": 2},
        "backbone": TOKENS,
        "decoder": {"channels": 8, "dropout": 0.0},
        "adversarial": {"convs": 1, "base_channels": 4},
        "self_training": {"confidence": 0.3},
        "optimizers": {name: {"lr": 1e-3} for name in ("main", "disc_source", "disc_target")},
    }
    return DASegNetRecipe.model_validate(values | changes)


def make_method(task: Task | None = None, **changes: Any) -> DASegNetMethod:
    torch.manual_seed(0)
    return build_method(make_recipe(**changes), task or rgb_task()).train()


def make_batch(*, strong: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(1)

    def images() -> torch.Tensor:
        return torch.rand(2, 3, SIDE, SIDE, generator=generator)

    valid = torch.ones(2, SIDE, SIDE, dtype=torch.bool)
    masks = torch.randint(0, 3, (2, SIDE // 16, SIDE // 16), generator=generator)
    masks = masks.repeat_interleave(16, 1).repeat_interleave(16, 2)
    return {
        "source": Samples(images(), valid, masks),
        "target": Samples(images(), valid, strong=images()[:, None] if strong else None),
    }
