"""Complete the index of a dataset: read every image and mask once, check and measure them."""

import difflib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rsseg.data.index import IndexItem, SegmentationIndex
from rsseg.data.labels import LabelTable
from rsseg.datasets.measure import Moments, in_order, measure_item, open_image
from rsseg.datasets.prepare.plan import Plan
from rsseg.datasets.prepare.transfer import Transfer
from rsseg.datasets.splits import TRAIN
from rsseg.errors import DataError
from rsseg.task import Task

_SAMPLES = 4_000_000
"""Total number of sampled pixels for percentiles."""
_LEAST_STD = 1e-6
"""Lower bound of the standard deviation, for constant bands."""


class _Facts(NamedTuple):
    bands: tuple[str, ...]
    dtype: str
    counts: tuple[int, ...] | None
    moments: Moments


def finish_index(
    folder: Path,
    plan: Plan,
    how: Transfer | None,
    items: Sequence[IndexItem],
    *,
    scale: Literal["auto"] | tuple[float, float],
    jobs: int,
    progress: Callable[[str, int, int], None],
) -> SegmentationIndex:
    """Check all files and complete the index.

    Args:
        folder: the items' paths are relative to it.
        plan: classes, labels and bands.
        how: conversions of the files; None for generated ones.
        items: images with splits, without class counts.
        scale: see `PrepareOptions.scale`.
        jobs: threads.
        progress: called with the stage, and the numbers of finished and of all images.

    Raises:
        DataError: no image, no labeled pixel in the training masks, an unreadable file, different sizes, band counts or
            pixel types, an undeclared mask value.
    """
    basis = _reference_split(items)
    label_map = plan.labels.label_map if how is None else how.label_map
    labels = LabelTable(label_map, len(plan.labels.classes))
    bands = plan.bands or (plan.card.bands if how is None else how.variant.bands) or None
    nodata = None if plan.stretch else plan.nodata
    samples = max(_SAMPLES // len(items), 64)

    def read(item: IndexItem) -> _Facts:
        files = [folder / part for part in item.image.split("|")]
        mask = None if item.mask is None else folder / item.mask
        with open_image(files, bands, nodata=nodata, zero_collar=plan.zero_collar) as raster:
            wanted = samples if item.split == basis else 0
            moments, found = measure_item(raster, mask, labels, len(plan.labels.classes), samples=wanted)
        counts = None if found is None else tuple(int(count) for count in found[:-1])
        return _Facts(bands or _distinct(raster.info.band_names), raster.info.dtype, counts, moments)

    facts = list(in_order(read, items, jobs, lambda done, total: progress("check images and masks", done, total)))
    _check_alike(items, facts)
    measured = [fact for item, fact in zip(items, facts, strict=True) if item.split == basis]
    task = _task(plan, facts[0], reduce(Moments.joined, [fact.moments for fact in measured]), scale)
    for note in _check_labels(plan, basis, [fact.counts for fact in measured if fact.counts is not None]):
        progress(note, 1, 1)
    counted = [item.model_copy(update={"classes": fact.counts}) for item, fact in zip(items, facts, strict=True)]
    return SegmentationIndex(
        task=task,
        label_map=label_map,
        ignore_zero_collar=plan.zero_collar,
        nodata=nodata,
        source_features={} if plan.drawing is None else plan.drawing.counts(),
        items=tuple(counted),
        root=folder,
    )


def _reference_split(items: Sequence[IndexItem]) -> str:
    """The split whose statistics define the scaling: `train`, or the first split if there is none."""
    if not items:
        raise DataError(
            "no image is left: all are without data, or smaller than a tile. Check the nodata value and --tile."
        )
    splits = Counter(item.split for item in items)
    nearest = difflib.get_close_matches(TRAIN, splits, n=1)
    if nearest and TRAIN not in splits:
        raise DataError(
            f"no image is in the split {TRAIN!r}; there are {dict(splits)}. "
            f"Name the training split `train`; for a folder, with --split-as {nearest[0]}=train."
        )
    return TRAIN if TRAIN in splits else next(iter(splits))


def _check_labels(plan: Plan, split: str, counts: Sequence[tuple[int, ...]]) -> list[str]:
    """Notes about classes without a labeled pixel; raises `DataError` if no pixel of the masks has a class."""
    if not counts:
        return []
    total = np.sum(counts, axis=0)
    if not total.any():
        raise DataError(
            f"no labeled pixel in {len(counts)} mask(s) of the split {split!r}: all are ignored or without image data. "
            "Check the mask values, the ignored ones and the nodata value."
        )
    missing = [info.name for info, count in zip(plan.labels.classes, total, strict=True) if not count]
    return [f"no labeled pixel in the split {split!r}: {', '.join(missing)}"] if missing else []


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    return names if len(set(names)) == len(names) else tuple(f"band_{i}" for i in range(1, len(names) + 1))


def _check_alike(items: Sequence[IndexItem], facts: Sequence[_Facts]) -> None:
    for item, fact in zip(items, facts, strict=True):
        if fact.bands != facts[0].bands or fact.dtype != facts[0].dtype:
            raise DataError(
                f"{item.image} has the bands {list(fact.bands)} of {fact.dtype}, but {items[0].image} has "
                f"{list(facts[0].bands)} of {facts[0].dtype}. All images must agree; if only the names differ, "
                "pass the right ones with --bands."
            )


def _task(plan: Plan, first: _Facts, train: Moments, scale: Literal["auto"] | tuple[float, float]) -> Task:
    if not train.pixels:
        raise DataError("no pixel of the images has data. Check the nodata value.")
    low, high = _limits(first.dtype, train, scale)
    factor = 1 / (high - low)
    shift = -low * factor
    mean, std = train.mean() * factor + shift, np.maximum(train.std() * factor, _LEAST_STD)
    return Task(
        name=plan.name,
        classes=plan.labels.classes,
        bands=first.bands,
        dtype=first.dtype,
        scale=_numbers(factor),
        offset=_numbers(shift),
        mean=_numbers(mean),
        std=_numbers(std),
        gsd_m=plan.gsd_m,
    )


def _limits(
    dtype: str, train: Moments, scale: Literal["auto"] | tuple[float, float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Stored values that are scaled to 0 and 1, per band."""
    bands = len(train.sums)
    if scale != "auto":
        return np.full(bands, scale[0]), np.full(bands, scale[1])
    if dtype == "uint8":
        return np.zeros(bands), np.full(bands, 255.0)
    low, high = np.percentile(np.concatenate(train.samples, axis=1).astype(np.float64), (1, 99), axis=1)
    return low, np.where(high > low, high, low + 1)


def _numbers(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(value) + 0.0 for value in values)
