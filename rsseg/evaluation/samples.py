"""Whole images of a split, one at a time, for scoring."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsseg.config import BaseRecipe, SelectConfig
from rsseg.data.dataset import SampleReader
from rsseg.data.index import IndexItem
from rsseg.data.sources import open_source
from rsseg.task import Task


@dataclass(frozen=True)
class EvalSample:
    """One image.

    name   as in the index
    image  float32 (C, H, W), scaled units, undefined where not valid
    valid  bool (H, W), False without data
    mask   uint8 (H, W), class index or 255 (also without data); None if masks were not asked for
    """

    name: str
    image: NDArray[np.float32]
    valid: NDArray[np.bool_]
    mask: NDArray[np.uint8] | None


class EvalSamples:
    """The images of a split that fall to one rank; iterating reads them one by one."""

    def __init__(
        self, items: tuple[IndexItem, ...], reader: SampleReader, task: Task, *, masks: bool, zoom: float = 1.0
    ) -> None:
        """`task` gives the scaling, `masks` says whether they are read, `zoom` is for who predicts: see `Source`."""
        self._items, self._reader, self._masks = items, reader, masks
        self.zoom = zoom
        self._scale = np.array(task.scale, np.float32)[:, None, None]
        self._offset = np.array(task.offset, np.float32)[:, None, None]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[EvalSample]:
        for item in self._items:
            if self._masks:
                pixels, valid, mask = self._reader.sample(item)
            else:
                (pixels, valid), mask = self._reader.image(item), None
            image = np.ascontiguousarray(pixels, np.float32) * self._scale + self._offset
            yield EvalSample(item.image, image, valid, mask)


def evaluation_samples(
    recipe: BaseRecipe,
    select: SelectConfig,
    split: str,
    task: Task,
    *,
    rank: int = 0,
    world_size: int = 1,
    masks: bool = True,
) -> EvalSamples:
    """Images of a split.

    Args:
        recipe: for data path, cache and seed.
        select: which images; its path, if any, is another dataset with the same classes and bands.
        split: taken where `select` names none.
        task: the model's.
        rank: this process; it gets every `world_size`-th image.
        world_size: number of processes.
        masks: read masks; a missing one is an error.

    Raises:
        DataError: nothing selected, other classes or bands, a missing mask; while iterating, unreadable files.
    """
    source = open_source(recipe, select, split, task, masks=masks)
    return EvalSamples(source.items[rank::world_size], source.reader, source.task, masks=masks, zoom=source.zoom)
