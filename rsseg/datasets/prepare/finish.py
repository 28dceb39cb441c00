"""Complete the index of a dataset: read every image and mask once, check and measure them."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rsseg.data.index import IndexItem, LabelMap, SegmentationIndex
from rsseg.data.labels import LabelTable
from rsseg.datasets.measure import Moments, count_classes, in_order, measure_image, open_image
from rsseg.errors import DataError
from rsseg.task import ClassInfo, Task

TRAIN = "train"
_SAMPLES = 4_000_000
"""Pixels kept in all to find percentiles."""
_LEAST_STD = 1e-6
"""Keeps the normalization of a constant band from dividing by zero."""


class Subject(NamedTuple):
    """Facts about a dataset that are known before its files are opened."""

    name: str
    classes: tuple[ClassInfo, ...]
    label_map: LabelMap
    bands: tuple[str, ...] | None
    """None takes those of the images."""
    gsd_m: float | None = None
    nodata: float | None = None
    ignore_zero_collar: bool = False


class _Facts(NamedTuple):
    bands: tuple[str, ...]
    dtype: str
    counts: tuple[int, ...] | None
    moments: Moments


def finish_index(
    folder: Path,
    subject: Subject,
    items: Sequence[IndexItem],
    *,
    scale: Literal["auto"] | tuple[float, float],
    jobs: int,
    progress: Callable[[str, int, int], None],
) -> SegmentationIndex:
    """Check all files and complete the index.

    Args:
        folder: the items' paths are relative to it.
        subject: classes, labels and bands.
        items: images with splits, without class counts.
        scale: see `PrepareOptions.scale`.
        jobs: threads.
        progress: called with the stage, and the numbers of finished and of all images.

    Raises:
        DataError: no training image, an unreadable file, different sizes, band counts or pixel types, an undeclared
            mask value.
    """
    if not any(item.split == TRAIN for item in items):
        raise DataError(
            f"no image is in the split {TRAIN!r}; there are {dict(Counter(item.split for item in items))}. "
            "Name the training split `train`; for a folder, with --split-as FOLDER=train."
        )
    labels = LabelTable(subject.label_map, len(subject.classes))
    samples = max(_SAMPLES // len(items), 64)

    def read(item: IndexItem) -> _Facts:
        return _read(folder, item, subject, labels, samples if item.split == TRAIN else 0)

    facts = list(in_order(read, items, jobs, lambda done, total: progress("check images and masks", done, total)))
    _check_alike(items, facts)
    train = [fact.moments for item, fact in zip(items, facts, strict=True) if item.split == TRAIN]
    task = _task(subject, facts[0], reduce(Moments.joined, train), scale)
    counted = [item.model_copy(update={"classes": fact.counts}) for item, fact in zip(items, facts, strict=True)]
    return SegmentationIndex(
        task=task,
        label_map=subject.label_map,
        ignore_zero_collar=subject.ignore_zero_collar,
        nodata=subject.nodata,
        items=tuple(counted),
        root=folder,
    )


def _read(folder: Path, item: IndexItem, subject: Subject, labels: LabelTable, samples: int) -> _Facts:
    files = [folder / part for part in item.image.split("|")]
    nodata, collar = subject.nodata, subject.ignore_zero_collar
    with open_image(files, subject.bands, nodata=nodata, zero_collar=collar) as raster:
        info = raster.info
        bands = subject.bands or _distinct(info.band_names)
        moments = measure_image(raster, samples=samples)
    counts = None
    if item.mask is not None:
        found = count_classes(folder / item.mask, labels, len(subject.classes), (info.height, info.width))
        counts = tuple(int(count) for count in found[:-1])
    return _Facts(bands, info.dtype, counts, moments)


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


def _task(subject: Subject, first: _Facts, train: Moments, scale: Literal["auto"] | tuple[float, float]) -> Task:
    if not train.pixels:
        raise DataError("no pixel of the training images has data. Check the nodata value.")
    low, high = _limits(first.dtype, train, scale)
    factor = 1 / (high - low)
    shift = -low * factor
    mean, std = train.mean() * factor + shift, np.maximum(train.std() * factor, _LEAST_STD)
    return Task(
        name=subject.name,
        classes=subject.classes,
        bands=first.bands,
        dtype=first.dtype,
        scale=_numbers(factor),
        offset=_numbers(shift),
        mean=_numbers(mean),
        std=_numbers(std),
        gsd_m=subject.gsd_m,
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
