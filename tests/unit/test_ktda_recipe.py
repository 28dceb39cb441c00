"""What a KTDA recipe refuses, before and while building."""

from typing import Any

import pytest
from pydantic import ValidationError

from rsseg.errors import RecipeError
from rsseg.methods.ktda.method import build_method
from rsseg.methods.ktda.network import build_segmenter
from tests.unit.ktda_models import PLAIN, TASK, TAUGHT, recipe_of


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": TAUGHT["teacher"]}, "need feature alignment"),
        ({"fuse": True}, "need feature alignment"),
        ({"fam": {"width": 8}}, "without a teacher"),
        ({"optimizers": {"head": {}}}, r"optimizers: this recipe needs \['main'\]"),
        ({"trainer": {"batch_size": 1}}, "needs two samples"),
    ],
)
def test_parts_that_do_not_fit_are_refused_with_the_recipe(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe_of(PLAIN, **changes)


@pytest.mark.parametrize("decoder", [{"pool_scales": [2, 3]}, {"type": "segformer"}])
def test_single_samples_are_fine_without_a_pool_of_one_cell(decoder: dict[str, Any]) -> None:
    assert recipe_of(PLAIN, decoder=decoder, trainer={"batch_size": 1}).trainer.batch_size == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fam": {"width": 5}}, r"fam\.width: 5, but the teacher's maps have \[64"),
        ({"teacher": TAUGHT["teacher"] | {"out_indices": [0, 3]}}, r"teacher\.out_indices: the student has 4 levels"),
        ({"teacher": {"name": "convnext_mini", "weights": "random"}}, "not a vision transformer"),
        ({"neck": {"scales": [2, 1]}}, r"neck\.scales: 2 factors for 4 maps"),
        ({"fmm": {"type": "vit_block", "heads": 7}}, r"fmm\.heads: 64 channels"),
        ({"fmm": {"rank_dim": 100}}, r"fmm\.rank_dim: 100 is more than"),
    ],
)
def test_parts_that_do_not_fit_the_backbones_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_segmenter(recipe_of(TAUGHT, **changes), TASK)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fam": {"grid": 5}}, r"fam\.grid: 5, but the teacher makes 4 x 4 cells of a crop of 32"),
        ({"aux": [{"level": 4}]}, r"aux\.level: 4, but the decoder has 4 levels"),
    ],
)
def test_training_parts_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_method(recipe_of(TAUGHT, **changes), TASK)


@pytest.mark.parametrize(
    ("changes", "flexible"),
    [({}, True), ({"fam": {"grid": 4}}, False), ({"fmm": {"type": "vit_block"}}, False)],
)
def test_networks_trained_for_one_size_ask_for_tiles_of_it(changes: dict[str, Any], flexible: bool) -> None:
    tile = build_segmenter(recipe_of(TAUGHT, **changes), TASK).tile
    assert (tile.flexible, tile.size) == ((True, 1280) if flexible else (False, 32))
