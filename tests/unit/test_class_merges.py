"""Classes of datasets become those of a task, by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from rsseg.config import MergeConfig, SelectConfig
from rsseg.data.index import SegmentationIndex, match_classes, merge_classes
from rsseg.data.sources import Datasets
from rsseg.errors import DataError
from tests.conftest import PlainRecipe, with_changes


def merge(**values: Any) -> MergeConfig:
    return MergeConfig.model_validate(values)


def test_merged_classes_add_up_in_masks_and_counts(plain_recipe: PlainRecipe) -> None:
    classes = {"into": {"wet": ["water"], "dry": ["field", "road"]}}
    recipe = with_changes(plain_recipe, data={"classes": classes})
    task = Datasets(recipe.data).task
    assert task.class_names == ("wet", "dry")
    assert task.classes[1].color == (255, 0, 0)
    plain, merged = (
        Datasets(r.data).open(SelectConfig(), "train", t, masks=True)
        for r, t in ((plain_recipe, Datasets(plain_recipe.data).task), (recipe, task))
    )
    for before, after in zip(plain.items, merged.items, strict=True):
        assert before.classes is not None
        assert after.classes == (before.classes[2], before.classes[0] + before.classes[1])
        expected = np.array([1, 1, 0], np.uint8)[plain.reader.mask(before)]
        np.testing.assert_array_equal(merged.reader.mask(after), expected)


def test_ignored_classes_are_255(plain_recipe: PlainRecipe) -> None:
    recipe = with_changes(plain_recipe, data={"classes": {"into": {"a": ["road"]}, "ignore": ["water", "field"]}})
    source = Datasets(recipe.data).open(SelectConfig(), "train", Datasets(recipe.data).task, masks=True)
    assert set(np.unique(source.reader.mask(source.items[0]))) == {0, 255}


def test_every_class_must_be_named_and_known(rgb_dataset: Path) -> None:
    index = SegmentationIndex.load(rgb_dataset)
    with pytest.raises(DataError, match="the merge leaves out road, water"):
        merge_classes(index, merge(into={"a": ("field",)}))
    with pytest.raises(DataError, match="it has no rode and the merge leaves out road"):
        merge_classes(index, merge(into={"a": ("field", "rode"), "b": ("water",)}))
    with pytest.raises(ValidationError, match="'field' is named twice"):
        merge(into={"a": ("field",)}, ignore=("field",))


def test_another_order_of_the_same_classes_is_matched_by_name(rgb_dataset: Path) -> None:
    index = SegmentationIndex.load(rgb_dataset)
    turned = match_classes(index, index.task.classes[::-1], what="it")
    assert turned.label_map.values == {0: 2, 1: 1, 2: 0, 255: 255}
    counts = index.items[0].classes
    assert counts is not None
    assert turned.items[0].classes == counts[::-1]
    renamed = (index.task.classes[0].model_copy(update={"name": "meadow"}), *index.task.classes[1:])
    expected = "the target: .*expected meadow, road, water: it lacks meadow and also has field"
    with pytest.raises(DataError, match=expected):
        match_classes(index, renamed, what="the target")


def test_bands_of_another_dataset_take_the_places_of_the_tasks(
    plain_recipe: PlainRecipe, color_mask_dataset: Path
) -> None:
    task = Datasets(plain_recipe.data).task
    select = SelectConfig(path=color_mask_dataset, bands=("blue", "red", "green"))
    source = Datasets(plain_recipe.data).open(select, "train", task, masks=True)
    straight = Datasets(plain_recipe.data).open(SelectConfig(path=color_mask_dataset), "train", task, masks=True)
    image, _ = source.reader.image(source.items[0])
    np.testing.assert_array_equal(image, straight.reader.image(straight.items[0])[0][[2, 0, 1]])
    with pytest.raises(DataError, match=r"2 bands are chosen \(red, blue\), but the task has 3"):
        Datasets(plain_recipe.data).open(SelectConfig(bands=("red", "blue")), "train", task, masks=True)
