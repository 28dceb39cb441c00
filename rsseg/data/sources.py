"""The prepared datasets of a recipe, and the selection of images for a stream or a split."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rsseg.config import DataConfig, SelectConfig
from rsseg.data.dataset import SampleReader
from rsseg.data.index import IndexItem, SegmentationIndex, match_classes, merge_classes
from rsseg.errors import DataError
from rsseg.task import Task, task_with_bands
from rsseg.text import read_lines


class Source(NamedTuple):
    """Selected images, their reader, and their own task (scaling and band names can differ between datasets).

    zoom: factor on the image size that gives the model's ground sampling distance if `data.match_gsd` is set, else 1.
    """

    items: tuple[IndexItem, ...]
    reader: SampleReader
    task: Task
    zoom: float = 1.0


class Datasets:
    """The prepared datasets of a recipe. Each index is parsed once; make one instance per run and pass it on."""

    def __init__(self, data: DataConfig, seed: int = 0) -> None:
        """Files are opened later; `seed` is that of random selections."""
        self._data, self._seed = data, seed
        self._indices: dict[Path, SegmentationIndex] = {}

    def index(self, path: Path | None = None) -> SegmentationIndex:
        """The index of a dataset as stored; None reads `data.path`. Raises `DataError`."""
        path = path or self._data.path
        if path not in self._indices:
            self._indices[path] = SegmentationIndex.load(path)
        return self._indices[path]

    @property
    def task(self) -> Task:
        """Task of `data.path` with `data.classes` merged, restricted to `data.bands`. Raises `DataError`."""
        data, index = self._data, self.index()
        task = (index if data.classes is None else merge_classes(index, data.classes)).task
        return task if data.bands is None else task_with_bands(task, data.bands)

    def open(self, select: SelectConfig, split: str, task: Task, *, masks: bool) -> Source:
        """Select images and prepare to read them.

        Args:
            select: which images of which dataset.
            split: used where `select` names none.
            task: the model's; classes are matched by name, after the recipe's merges; bands must exist.
            masks: every selected image must have a mask.

        Raises:
            DataError: no dataset, nothing selected, classes that do not match, missing bands or masks, no ground
                sampling distance although `data.match_gsd` needs it.
        """
        path = select.path or self._data.path
        index = self.index(path)
        merge = select.classes or (self._data.classes if path == self._data.path else None)
        # A dataset that already has the merged classes needs no merge.
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
        items = select_items(index, select, split=split, seed=self._seed)
        unlabeled = [item.image for item in items if item.mask is None]
        if masks and unlabeled:
            raise DataError(
                f"{path}: {len(unlabeled)} of the {len(items)} selected images have no mask, the first is "
                f"{unlabeled[0]}. Choose another split or list, or prepare the dataset with masks."
            )
        reader = SampleReader(index, bands, cache=self._data.cache)
        return Source(items, reader, own, _zoom(task, own) if self._data.match_gsd else 1.0)


def _zoom(task: Task, own: Task) -> float:
    """Size of an image at the model's ground sampling distance over its own size."""
    for what in (task, own):
        if what.gsd_m is None:
            raise DataError(
                f"data.match_gsd: {what.name} has no ground sampling distance. Prepare it again with gsd_m in its "
                "class file, or leave match_gsd out."
            )
    return float(own.gsd_m) / float(task.gsd_m)  # type: ignore[arg-type]


def select_items(index: SegmentationIndex, select: SelectConfig, *, split: str, seed: int) -> tuple[IndexItem, ...]:
    """Images that satisfy all conditions of `select`, in the order of the index.

    Args:
        index: prepared dataset.
        select: conditions; `path` and `augment` are ignored.
        split: used where `select.split` is None.
        seed: of `fraction` and `count`; a selection and its `complement` share no image.

    Raises:
        DataError: nothing is selected, an unknown split or image, or a `count` above the number of images.
    """
    split = select.split or split
    pool = [item for item in index.items if item.split == split]
    if not pool:
        raise DataError(f"{index.root}: the split {split!r} is empty; the index has {list(index.splits())}.")
    if select.domain is not None:
        domains = sorted({item.domain for item in pool if item.domain is not None})
        pool = [item for item in pool if item.domain == select.domain]
        if not pool:
            raise DataError(f"{index.root}: split {split!r} has no domain {select.domain!r}; it has {domains}.")
    chosen = pool
    if select.items is not None:
        names = _listed(select.items, index)
        chosen = [item for item in pool if item.image in names]
    chosen = _share(chosen, select, seed, where=f"{index.root}, split {split!r}")
    if select.complement:
        taken = {item.image for item in chosen}
        chosen = [item for item in pool if item.image not in taken]
    if not chosen:
        what = "complement leaves no image" if select.complement else f"no image of {select.items} is in it"
        raise DataError(f"{index.root}, split {split!r}: {what}. Choose another split, list or share.")
    return tuple(chosen)


def _listed(file: Path, index: SegmentationIndex) -> set[str]:
    """Image names listed in a file; each must be in the index."""
    names = set(read_lines(file))
    unknown = sorted(names - {item.image for item in index.items})
    if unknown:
        raise DataError(
            f"{file}: {len(unknown)} images are not in the index of {index.root}, the first is {unknown[0]!r}. "
            f"Write them as the index does, such as {index.items[0].image!r}."
        )
    return names


def _share(pool: Sequence[IndexItem], select: SelectConfig, seed: int, *, where: str) -> list[IndexItem]:
    """Random part of the pool of size `fraction` or `count`."""
    if select.fraction is not None and select.count is not None:
        raise DataError(f"{where}: both fraction and count are given. Keep one of them.")
    if select.fraction is None and select.count is None:
        return list(pool)
    count = select.count or round((select.fraction or 1) * len(pool))
    if not count:
        raise DataError(
            f"{where}: a fraction of {select.fraction} of {len(pool)} images selects none. Raise it, or set count: 1."
        )
    if count > len(pool):
        raise DataError(f"{where}: count is {count}, but there are {len(pool)} images.")
    order = np.random.default_rng([seed, len(pool)]).permutation(len(pool)).tolist()
    picked = _one_of_each_class(pool, order)[:count]
    picked += [i for i in order if i not in set(picked)][: count - len(picked)]
    return [pool[i] for i in sorted(picked)]


def _one_of_each_class(pool: Sequence[IndexItem], order: Sequence[int]) -> list[int]:
    """Greedy cover of all classes: for the rarest missing class, the image that adds the most missing classes."""
    shown = [{k for k, pixels in enumerate(item.classes or ()) if pixels} for item in pool]
    missing = set().union(*shown)
    picked: list[int] = []
    while missing:
        rarest = min(sorted(missing), key=lambda k: sum(k in classes for classes in shown))
        best = max((i for i in order if rarest in shown[i]), key=lambda i: len(shown[i] & missing))
        picked.append(best)
        missing -= shown[best]
    return picked
