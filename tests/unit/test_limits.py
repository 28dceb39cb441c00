"""Recipes that ask for too much are refused before anything is allocated."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rsseg.checkpoint import ModelHeader, write_model
from rsseg.errors import MachineError, RecipeError, RssegError, WeightsError
from rsseg.inference.network import load_segmenter
from rsseg.methods import base
from rsseg.methods.registry import method_for, segmenter_for
from rsseg.recipe import Recipe, RecipeSource, packaged_recipes, parse_recipe
from tests.conftest import rgb_task
from tests.training.recipes import tiny_recipe


def changed(recipe: str, *overrides: str) -> Recipe:
    path = packaged_recipes()[f"{recipe}.yaml"]
    return parse_recipe(RecipeSource(recipe, path.read_text(encoding="utf-8")), overrides)


@pytest.mark.parametrize(
    ("recipe", "key", "value"),
    [
        ("grass", "fmm.depth", 100_000),
        ("grass", "fmm.heads", 10**6),
        ("grass", "fam.grid", 10**6),
        ("grass", "decoder.channels", 10**9),
        ("grass", "decoder.pool_scales", [1] * 1000),
        ("grass", "decoder.pool_scales", [10**9]),
        ("grass", "neck.scales", [1e9]),
        ("grass", "neck.width", 10**12),
        ("grass", "aux", [{"level": 10**9}]),
        ("grass", "aux", [{"num_convs": 10**6}]),
        ("grass", "student.image_size", 10**9),
        ("grass", "teacher.out_indices", list(range(65))),
        ("potsdam-1pct", "translator_width", 10**9),
        ("potsdam-1pct", "decoder_widths", [1, 1, 1, 10**9]),
        ("potsdam-1pct", "decoder_features", 10**9),
        ("dasegnet-potsdam-irrg-to-vaihingen", "decoder.channels", 10**9),
        ("dasegnet-potsdam-irrg-to-vaihingen", "decoder.dilations", [10**9]),
        ("dasegnet-potsdam-irrg-to-vaihingen", "neck.min_width", 10**9),
        ("dasegnet-potsdam-irrg-to-vaihingen", "adversarial.base_channels", 10**9),
        ("dasegnet-recommended", "self_training.masked.patch", 10**9),
        ("demo-supervised", "decoder.channels", 10**9),
        ("demo-supervised", "decoder.dilations", [10**9]),
    ],
)
def test_absurd_sizes_are_refused_with_their_key(recipe: str, key: str, value: object) -> None:
    with pytest.raises(RecipeError, match=key.replace(".", r"\.")):
        changed(recipe, f"{key}={json.dumps(value)}")


@pytest.mark.parametrize("build", [segmenter_for, method_for])
def test_network_that_does_not_fit_is_refused_while_it_is_built(
    build: object, rgb_dataset: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "LARGEST_NETWORK", 10_000)
    with pytest.raises(MachineError, match=r"network of more than 1e-05 billion parameters.*Choose a smaller backbone"):
        build(tiny_recipe(rgb_dataset), rgb_task())  # type: ignore[operator, arg-type]
    monkeypatch.undo()
    assert build(tiny_recipe(rgb_dataset), rgb_task())  # type: ignore[operator, arg-type]


def test_failed_allocation_is_a_limit_of_the_machine() -> None:
    with pytest.raises(MachineError, match="too large for this machine"), base.bounded_parameters():
        torch.nn.Linear(10**8, 10**8)
    with pytest.raises(RuntimeError, match="tensor size"), base.bounded_parameters():
        torch.zeros(2) @ torch.zeros(3)


@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        ("grass", "student"),
        ("potsdam-1pct", "student"),
        ("dasegnet-recommended", "backbone"),
        ("demo-supervised", "backbone"),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_network_that_trains_is_stored_in_float32(recipe: str, key: str, dtype: str) -> None:
    with pytest.raises(RecipeError, match=rf"{key}: dtype: {dtype} is for frozen teachers"):
        changed(recipe, f"{key}.dtype={dtype}")


@pytest.mark.parametrize(
    ("changes", "error"),
    [({"decoder": {"type": "segformer", "channels": 10**9}}, WeightsError), ({}, MachineError)],
)
def test_header_that_asks_for_a_huge_network_is_refused(
    changes: dict[str, Any], error: type[RssegError], rgb_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(rgb_dataset).model_dump(mode="json")
    header = ModelHeader(recipe=recipe | changes, task=rgb_task(), backbones={}, training={}, made_with={})
    write_model(tmp_path / "huge.safetensors", {"a": torch.ones(1)}, header)
    monkeypatch.setattr(base, "LARGEST_NETWORK", 10_000)
    with pytest.raises(error, match=r"decoder\.channels|billion parameters"):
        load_segmenter(tmp_path / "huge.safetensors")
