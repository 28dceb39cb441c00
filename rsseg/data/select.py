"""Which images of an index feed a stream or a split."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rsseg.config import SelectConfig
from rsseg.data.index import IndexItem, SegmentationIndex
from rsseg.errors import DataError


def select_items(index: SegmentationIndex, select: SelectConfig, *, split: str, seed: int) -> tuple[IndexItem, ...]:
    """Images that meet all conditions of `select`, in the order of the index.

    Args:
        index: prepared dataset.
        select: conditions; its `path` and `augment` are not looked at.
        split: taken where `select.split` is None.
        seed: decides `fraction` and `count`, so that a selection and its `complement` share no image.

    Raises:
        DataError: nothing is left, an unknown split or image is named, or more images are wanted than there are.
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
    """Image names in a list; every one must be in the index."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: the list of images cannot be read: {error}.") from None
    names = {line.strip() for line in lines if line.strip()}
    unknown = sorted(names - {item.image for item in index.items})
    if unknown:
        raise DataError(
            f"{file}: {len(unknown)} images are not in the index of {index.root}, the first is {unknown[0]!r}. "
            f"Write them as the index does, such as {index.items[0].image!r}."
        )
    return names


def _share(pool: Sequence[IndexItem], select: SelectConfig, seed: int, *, where: str) -> list[IndexItem]:
    """The seeded part of the pool that `fraction` or `count` ask for."""
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
        raise DataError(f"{where}: {count} images are wanted, but there are {len(pool)}.")
    order = np.random.default_rng([seed, len(pool)]).permutation(len(pool)).tolist()
    picked = _one_of_each_class(pool, order)[:count]
    picked += [i for i in order if i not in set(picked)][: count - len(picked)]
    return [pool[i] for i in sorted(picked)]


def _one_of_each_class(pool: Sequence[IndexItem], order: Sequence[int]) -> list[int]:
    """Few images that together show every class: for the rarest class still missing, the image that adds most."""
    shown = [{k for k, pixels in enumerate(item.classes or ()) if pixels} for item in pool]
    missing = set().union(*shown)
    picked: list[int] = []
    while missing:
        rarest = min(sorted(missing), key=lambda k: sum(k in classes for classes in shown))
        best = max((i for i in order if rarest in shown[i]), key=lambda i: len(shown[i] & missing))
        picked.append(best)
        missing -= shown[best]
    return picked
