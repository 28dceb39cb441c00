"""A small KTDA recipe for runs of a few steps."""

from pathlib import Path
from typing import Any

import yaml

from rsseg.recipe import Recipe, RecipeSource, parse_recipe


def tiny_values(data: Path) -> dict[str, Any]:
    """Student from scratch, untrained teacher, crops of 32 pixels, dropout, stochastic depth, two micro-steps."""
    return {
        "method": "ktda",
        "name": "tiny",
        "seed": 5,
        "data": {"path": str(data), "augment": {"crop_size": 32}},
        "student": {"name": "convnext_mini", "weights": "random", "drop_path": 0.1},
        "teacher": {"name": "vit_mini_patch8", "weights": "random"},
        "fam": {},
        "distillation": {"weight": 0.1},
        "decoder": {"type": "segformer", "channels": 16},
        "optimizers": {"main": {"lr": 1e-3, "schedule": {"warmup_steps": 2}}},
        "trainer": {
            "steps": 6,
            "batch_size": 2,
            "grad_accum_steps": 2,
            "workers": 0,
            "eval_every": 3,
            "checkpoint_every": 2,
            "log_every": 2,
        },
    }


def tiny_recipe(data: Path, /, **changes: Any) -> Recipe:
    """`tiny_values` with keys of its parts replaced: `tiny_recipe(path, trainer={"steps": 2}, seed=7)`."""
    values = tiny_values(data)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            values[key] = values[key] | value
        else:
            values[key] = value
    return parse_recipe(RecipeSource("tiny", yaml.safe_dump(values)))
