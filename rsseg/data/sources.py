"""From a selection in a recipe to images that can be read."""

from typing import NamedTuple

from rsseg.config import BaseRecipe, SelectConfig
from rsseg.data.dataset import SampleReader
from rsseg.data.index import IndexItem, SegmentationIndex
from rsseg.data.select import select_items
from rsseg.errors import DataError
from rsseg.task import Task, check_same_classes, task_with_bands


class Source(NamedTuple):
    """Selected images, what reads them, and their own task (scaling can differ between datasets)."""

    items: tuple[IndexItem, ...]
    reader: SampleReader
    task: Task


def open_source(recipe: BaseRecipe, select: SelectConfig, split: str, task: Task, *, masks: bool) -> Source:
    """Open the dataset of a selection.

    Args:
        recipe: for data path, cache and seed.
        select: which images of which dataset.
        split: taken where `select` names none.
        task: the model's; classes must agree, bands must exist.
        masks: every selected image must have one.

    Raises:
        DataError: no dataset, nothing selected, other classes, missing bands or masks.
    """
    path = select.path or recipe.data.path
    index = SegmentationIndex.load(path)
    check_same_classes(task, index.task, what=f"the dataset {path}")
    own = task_with_bands(index.task, task.bands)
    items = select_items(index, select, split=split, seed=recipe.seed)
    unlabeled = [item.image for item in items if item.mask is None]
    if masks and unlabeled:
        raise DataError(
            f"{path}: {len(unlabeled)} of the {len(items)} selected images have no mask, the first is {unlabeled[0]}. "
            "Choose another split or list, or prepare the dataset with masks."
        )
    return Source(items, SampleReader(index, task.bands, cache=recipe.data.cache), own)
