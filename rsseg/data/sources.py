"""From a selection in a recipe to images that can be read."""

from typing import NamedTuple

from rsseg.config import BaseRecipe, SelectConfig
from rsseg.data.classes import match_classes, merge_classes
from rsseg.data.dataset import SampleReader
from rsseg.data.index import IndexItem, SegmentationIndex
from rsseg.data.select import select_items
from rsseg.errors import DataError
from rsseg.task import Task, task_with_bands


class Source(NamedTuple):
    """Selected images, what reads them, and their own task (scaling and band names can differ between datasets).

    zoom: what brings the images to the model's ground sampling distance if the recipe wants that, else 1.
    """

    items: tuple[IndexItem, ...]
    reader: SampleReader
    task: Task
    zoom: float = 1.0


def open_source(recipe: BaseRecipe, select: SelectConfig, split: str, task: Task, *, masks: bool) -> Source:
    """Open the dataset of a selection.

    Args:
        recipe: for data path, cache and seed.
        select: which images of which dataset.
        split: taken where `select` names none.
        task: the model's; classes are matched by name, after merges that the recipe asks for; bands must exist.
        masks: every selected image must have one.

    Raises:
        DataError: no dataset, nothing selected, classes that do not match, missing bands or masks, no ground
            sampling distance where it is needed.
    """
    path = select.path or recipe.data.path
    index = SegmentationIndex.load(path)
    merge = select.classes or (recipe.data.classes if path == recipe.data.path else None)
    # a dataset that already has the merged classes can take another's place
    if merge is not None and set(index.task.class_names) != set(task.class_names):
        index = merge_classes(index, merge)
    index = match_classes(index, task.classes, what=f"the dataset {path}")
    bands = select.bands or task.bands
    if len(bands) != len(task.bands):
        raise DataError(
            f"{path}: {len(bands)} bands are chosen ({', '.join(bands)}), but the task has {len(task.bands)}: "
            f"{', '.join(task.bands)}. Name one for each in `bands`."
        )
    own = task_with_bands(index.task, bands)
    items = select_items(index, select, split=split, seed=recipe.seed)
    unlabeled = [item.image for item in items if item.mask is None]
    if masks and unlabeled:
        raise DataError(
            f"{path}: {len(unlabeled)} of the {len(items)} selected images have no mask, the first is {unlabeled[0]}. "
            "Choose another split or list, or prepare the dataset with masks."
        )
    reader = SampleReader(index, bands, cache=recipe.data.cache)
    return Source(items, reader, own, _zoom(task, own) if recipe.data.match_gsd else 1.0)


def _zoom(task: Task, own: Task) -> float:
    """Size of an image at the model's ground sampling distance over its own size."""
    for what in (task, own):
        if what.gsd_m is None:
            raise DataError(
                f"data.match_gsd: {what.name} does not say its ground sampling distance. Prepare it again with gsd_m "
                "in its class file, or leave match_gsd out."
            )
    return float(own.gsd_m) / float(task.gsd_m)  # type: ignore[arg-type]
