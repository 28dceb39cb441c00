"""Source and target that differ in band order, band names and ground sampling distance."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rsseg.config import SelectConfig
from rsseg.data.index import SegmentationIndex
from rsseg.data.sources import Datasets
from rsseg.data.streams import StreamSpec, training_batches
from rsseg.errors import DataError
from rsseg.evaluation.model import evaluate
from rsseg.methods.base import Segmenter, TileHint
from rsseg.task import Task
from tests.conftest import PlainRecipe, rgb_task, with_changes


def redeclare(root: Path, **changes: Any) -> None:
    index = SegmentationIndex.load(root)
    index.model_copy(update={"task": index.task.model_copy(update=changes)}).save(root)


def first_image(recipe: PlainRecipe, select: SelectConfig, task: Task) -> np.ndarray:
    source = Datasets(recipe.data, recipe.seed).open(select, "train", task, masks=False)
    return source.reader.image(source.items[0])[0]


def test_bands_in_another_order_are_taken_by_name(plain_recipe: PlainRecipe, color_mask_dataset: Path) -> None:
    task = rgb_task()
    before = first_image(plain_recipe, SelectConfig(path=color_mask_dataset), task)
    redeclare(color_mask_dataset, bands=("blue", "green", "red"))
    after = first_image(plain_recipe, SelectConfig(path=color_mask_dataset), task)
    assert np.array_equal(after, before[::-1])


def test_bands_of_other_names_are_taken_where_the_recipe_names_them(
    plain_recipe: PlainRecipe, color_mask_dataset: Path
) -> None:
    task = rgb_task()
    before = first_image(plain_recipe, SelectConfig(path=color_mask_dataset), task)
    redeclare(color_mask_dataset, bands=("nir", "red", "green"))
    with pytest.raises(DataError, match=r"band 'blue' is not among .*'nir'.*`bands`"):
        first_image(plain_recipe, SelectConfig(path=color_mask_dataset), task)
    select = SelectConfig(path=color_mask_dataset, bands=("nir", "red", "green"))
    assert np.array_equal(first_image(plain_recipe, select, task), before)


def matched(recipe: PlainRecipe, other: Path) -> PlainRecipe:
    """Crops of 256 pixels without scaling; the unlabeled images come from another dataset."""
    data = {"match_gsd": True, "augment": {"crop_size": 256, "hflip": 0.0}, "streams": {"unlabeled": {"path": other}}}
    return with_changes(recipe, data=data)  # type: ignore[no-any-return]


def test_training_images_come_at_the_models_ground_sampling_distance(
    plain_recipe: PlainRecipe, rgb_dataset: Path, color_mask_dataset: Path
) -> None:
    redeclare(color_mask_dataset, gsd_m=2.0)
    task = rgb_task().model_copy(update={"gsd_m": 1.0})
    specs = [StreamSpec(name, "train", masks=False, fill=(0.0,) * 3) for name in ("labeled", "unlabeled")]
    redeclare(rgb_dataset, gsd_m=1.0)
    batch = next(training_batches(matched(plain_recipe, color_mask_dataset), specs, task, device="cpu", start_step=0))
    sizes = {
        name: {tuple(v.any(i).sum().item() for i in (1, 0)) for v in samples.valid} for name, samples in batch.items()
    }
    own = {(40 + 3 * n, 64 - 5 * n) for n in range(5)}
    assert sizes["labeled"] <= own
    assert sizes["unlabeled"] <= {(2 * height, 2 * width) for height, width in own}


class Looking(Segmenter):
    """Keeps the sizes that it sees."""

    def __init__(self, task: Task) -> None:
        super().__init__(task, input_multiple=1, fill=(0.0,) * 3, tile=TileHint(512, 0, flexible=True))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(tuple(images.shape[-2:]))
        return torch.zeros(len(images), 3, *images.shape[-2:])


def test_images_are_scored_at_the_models_ground_sampling_distance_and_in_their_own_pixels(
    plain_recipe: PlainRecipe, color_mask_dataset: Path
) -> None:
    redeclare(color_mask_dataset, gsd_m=0.5)
    looking = Looking(rgb_task().model_copy(update={"gsd_m": 1.0}))
    select = SelectConfig(path=color_mask_dataset)
    recipe = matched(plain_recipe, color_mask_dataset)
    source = Datasets(recipe.data).open(select, "test", looking.task, masks=True)
    result = evaluate(looking, recipe, source, device="cpu")
    assert looking.seen == [(31, 15)]  # of 61 x 29
    assert result.scores.pixels == 61 * 29


def test_ground_sampling_distance_must_be_declared_and_can_not_act_on_squeezed_images(
    plain_recipe: PlainRecipe, color_mask_dataset: Path
) -> None:
    recipe = matched(plain_recipe, color_mask_dataset)
    with pytest.raises(DataError, match="tiny has no ground sampling distance"):
        Datasets(recipe.data).open(SelectConfig(), "train", rgb_task(), masks=False)
    with pytest.raises(ValidationError, match="fit: squeeze"):
        with_changes(recipe, data={"augment": {"fit": "squeeze"}})
    with pytest.raises(ValidationError, match=r"eval\.mode: resized"):
        with_changes(recipe, eval={"mode": "resized"})
