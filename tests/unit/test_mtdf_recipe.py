"""What an RS-MTDF recipe refuses, and what the published ones say."""

from typing import Any

import pytest
from pydantic import ValidationError

from rsseg.errors import DataError, RecipeError
from rsseg.methods.mtdf.method import build_method
from rsseg.methods.mtdf.network import build_segmenter
from rsseg.methods.mtdf.recipe import MTDFRecipe
from rsseg.recipe import load_recipe
from rsseg.task import ClassInfo, Task
from tests.unit.mtdf_models import FIXMATCH, PYRAMID, TASK, TEACHERS, VIT, batch_of, recipe_of

MULTISPECTRAL = Task(
    name="many",
    classes=(ClassInfo(name="a", value=0, color=(0, 0, 0)),),
    bands=("red", "green", "blue", "nir"),
    scale=(1.0,) * 4,
    offset=(0.0,) * 4,
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": [TEACHERS[0], TEACHERS[0]]}, "share a name"),
        ({"complementary_dropout": True}, "set strong_views to 2"),
        ({"only_teachers": ["vti"]}, "names 'vti'; the recipe's teachers are"),
        ({"optimizers": {"head": {}}}, r"optimizers: this recipe needs \['main'\]"),
        ({"data": {"path": "x", "streams": {"unlabelled": {}}}}, "unknown stream"),
    ],
)
def test_parts_that_do_not_fit_are_refused_with_the_recipe(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe_of(**changes)


@pytest.mark.parametrize("kept", [[], ["cnn"], ["vit"], ["vit", "cnn"]])
def test_ablations_keep_only_the_named_teachers(kept: list[str]) -> None:
    recipe = recipe_of(only_teachers=kept)
    assert [teacher.name for teacher in recipe.teachers] == kept
    assert MTDFRecipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_supervised_baseline_is_one_switch_and_reads_no_unlabeled_stream() -> None:
    streams = {"labeled": {"count": 2}, "unlabeled": {"count": 2, "augment": {"crop_size": 999}}}
    data = {"path": "x", "augment": {"crop_size": 32}, "streams": streams}
    method = build_method(recipe_of(data=data, unlabeled=False, only_teachers=[]), TASK)
    assert [spec.name for spec in method.streams] == ["labeled"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": VIT | {"out_indices": [1, 3]}}, r"four maps.*Set student\.out_indices"),
        ({"student": PYRAMID, "strong_views": 2, "complementary_dropout": True}, "Choose a ViT"),
    ],
)
def test_students_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_segmenter(recipe_of(FIXMATCH, **changes), TASK)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"path": "x", "augment": {"crop_size": 36}}}, r"crop_size: 36 pixels .* Take 32 or 40"),
        ({"teachers": [TEACHERS[1] | {"input_size": 50}]}, r"input_size of 'cnn': 50 pixels .* vit_mini_patch8"),
        ({"teachers": [TEACHERS[0] | {"input_size": 50}]}, r"input_size of 'vit': 50 pixels"),
        (
            {
                "data": {
                    "path": "x",
                    "augment": {"crop_size": 32},
                    "streams": {"unlabeled": {"augment": {"crop_size": 64}}},
                }
            },
            "share a batch",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_method(recipe_of(**changes), TASK)


def test_convolutional_teacher_takes_the_crop_of_a_patch_that_it_does_not_divide() -> None:
    data = {"path": "x", "augment": {"crop_size": 40}}
    recipe = recipe_of(data=data, teachers=[{"name": "cnn", "backbone": PYRAMID, "input_size": 40}])
    losses = build_method(recipe, TASK).train()(batch_of(), 0).losses
    assert losses["distill"].isfinite()


def test_pretrained_teacher_wants_three_bands() -> None:
    teacher = {"name": "dino", "backbone": {"name": "vit_base_patch14_dinov2"}}
    with pytest.raises(RecipeError, match=r"'dino' was pretrained on red, green and blue.*Name three bands"):
        build_segmenter(recipe_of(teachers=[teacher]), MULTISPECTRAL)
    with pytest.raises(DataError, match="'swir'"):
        build_segmenter(recipe_of(teachers=[teacher | {"bands": ["red", "green", "swir"]}]), MULTISPECTRAL)
    build_segmenter(recipe_of(teachers=[TEACHERS[0]]), MULTISPECTRAL)


@pytest.mark.parametrize(
    ("name", "steps", "labeled"),
    [("loveda-5pct", 71880, 504), ("potsdam-1pct", 24360, 32), ("deepglobe-10pct", 81300, 1204)],
)
def test_published_recipes_have_the_published_numbers(name: str, steps: int, labeled: int) -> None:
    recipe = load_recipe(name)
    assert recipe.method == "mtdf"
    assert recipe.trainer.steps == steps == 60 * recipe.trainer.eval_every
    assert recipe.data.streams["labeled"].count == recipe.data.streams["unlabeled"].count == labeled
    assert recipe.data.streams["unlabeled"].complement
    main = recipe.optimizers["main"]
    assert (main.lr, main.lr * recipe.head_lr_scale) == pytest.approx((5e-6, 2e-4))
    assert (recipe.student_weight, [t.fusion_weight for t in recipe.teachers]) == (0.8, [0.1, 0.1])
    assert not recipe.complementary_dropout
    assert recipe.strong_views == 1
