"""Check a prepared dataset file by file, and measure it."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rsseg.data.index import IndexItem, SegmentationIndex
from rsseg.data.labels import LabelTable
from rsseg.datasets.measure import MaskError, Moments, Survey, count_classes, in_order, measure_item, open_image
from rsseg.datasets.splits import UNUSED, scene_of
from rsseg.errors import DataError
from rsseg.fields import Result
from rsseg.raster import Raster

Progress = Callable[[str, int, int], None]
_LEAST_PLACES = 3


class Problem(Result):
    """One defect of a prepared dataset."""

    file: str
    """Relative to the dataset's folder."""
    split: str
    reason: str


class SplitCount(Result):
    """Images of a split, and the class areas of their masks."""

    split: str
    domain: str | None
    images: int
    masks: int
    pixels: dict[str, int]
    """Per class name."""
    ignored: int
    """Mask pixels without a class."""


class ClassPlaces(Result):
    """How often and where a class is labeled."""

    name: str
    pixels: int
    ha: float | None
    """Area on the ground; None if the size of the pixels is unknown."""
    polygons: int
    """4-connected components of all masks; one that is cut by tiles counts once per tile."""
    features: int | None
    """Features of the vector file that the masks were drawn from; None for other datasets."""
    scenes: int
    splits: tuple[str, ...]

    @property
    def places(self) -> int:
        """Features, else polygons."""
        return self.polygons if self.features is None else self.features


class VerifyReport(Result):
    """Result of `verify`."""

    path: Path
    images: int
    masks: int
    splits: tuple[SplitCount, ...]
    classes: tuple[ClassPlaces, ...]
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems


class BandStatistics(Result):
    """One band over the valid pixels of a split; stored values, after scale and offset tags."""

    name: str
    mean: float
    std: float
    low: float
    high: float


class ClassArea(Result):
    """Area of a class in a split."""

    name: str
    pixels: int
    share: float | None
    """0..1 of all mask pixels, ignored ones included; None without masks."""
    m2: float | None
    """Square metres; None if the ground sampling distance is unknown."""
    ha: float | None


class SplitStatistics(Result):
    """One split (and domain)."""

    split: str
    domain: str | None
    images: int
    pixels: int
    """Image pixels with data."""
    bands: tuple[BandStatistics, ...]
    classes: tuple[ClassArea, ...]
    ignored: ClassArea


class DatasetStatistics(Result):
    """Result of `statistics`."""

    path: Path
    gsd_m: float | None
    splits: tuple[SplitStatistics, ...]


class _Checked(NamedTuple):
    counts: NDArray[np.int64] | None
    survey: Survey | None
    problems: tuple[Problem, ...]


def verify(path: Path, *, pixels: bool = True, jobs: int = 1, progress: Progress | None = None) -> VerifyReport:
    """Read every mask and every image once, and find images and scenes that are in several splits.

    Args:
        path: prepared folder.
        pixels: decode every image, which finds truncated files; False only opens them.
        jobs: threads.
        progress: called with the stage, and the numbers of finished and of all files.

    Raises:
        DataError: no index. Defects of files are listed in the report instead.
    """
    index = SegmentationIndex.load(path)
    labels = LabelTable(index.label_map, index.task.num_classes)
    check = partial(_check, index, labels, pixels=pixels)
    checked = list(in_order(check, index.items, jobs, progress and partial(progress, "verify")))
    groups = _groups(index)
    classes = _places(index, checked)
    return VerifyReport(
        path=path,
        images=len(index.items),
        masks=sum(item.mask is not None for item in index.items),
        splits=tuple(_split_count(index, key, [checked[i].counts for i in where]) for key, where in groups.items()),
        classes=classes,
        problems=tuple(problem for one in checked for problem in one.problems) + find_leaks(index),
        warnings=tuple(
            f"the class {one.name} is labeled in {one.places} place(s): fewer than {_LEAST_PLACES} cannot be in train, "
            "val and test."
            for one in classes
            if one.places < _LEAST_PLACES and any(item.mask for item in index.items)
        ),
    )


def statistics(path: Path, *, jobs: int = 1, progress: Progress | None = None) -> DatasetStatistics:
    """Read every image and mask once: band statistics and class areas per split and domain.

    Raises:
        DataError: no index, or a defect; `verify` lists all defects.
    """
    index = SegmentationIndex.load(path)
    labels = LabelTable(index.label_map, index.task.num_classes)

    def measure(item: IndexItem) -> tuple[Moments, NDArray[np.int64]]:
        with _open(index, item) as raster:
            moments, counts = measure_item(raster, index.mask_file(item), labels, index.task.num_classes)
        return moments, np.zeros(index.task.num_classes + 1, np.int64) if counts is None else counts

    measured = list(in_order(measure, index.items, jobs, progress and partial(progress, "measure")))
    splits = []
    for (split, domain), where in _groups(index).items():
        moments = reduce(Moments.joined, [measured[i][0] for i in where])
        *areas, ignored = _areas(index, np.sum([measured[i][1] for i in where], axis=0))
        splits.append(
            SplitStatistics(
                split=split, domain=domain, images=len(where), pixels=moments.pixels, bands=_bands(index, moments),
                classes=tuple(areas), ignored=ignored,
            )
        )  # fmt: skip
    return DatasetStatistics(path=path, gsd_m=index.task.gsd_m, splits=tuple(splits))


def find_leaks(index: SegmentationIndex) -> tuple[Problem, ...]:
    """Images, copies of images and scenes that are in more than one split; one problem each.

    Scenes are not compared if the split rule intentionally distributes their tiles, as some published rules do.
    """
    return (*_images(index), *_copies(index), *(() if index.mixes_scenes else _scenes(index)))


def _check(index: SegmentationIndex, labels: LabelTable, item: IndexItem, *, pixels: bool) -> _Checked:
    """All problems of one item; a damaged image does not hide those of its mask."""
    problems, classes, mask = [], index.task.num_classes, index.mask_file(item)
    grid, counts, survey = None, None, None
    try:
        with _open(index, item) as raster:
            info = grid = raster.info
            if info.dtype != index.task.dtype:
                raise DataError(f"{raster.name}: the pixels are {info.dtype}, those of the dataset {index.task.dtype}.")
            if pixels and mask is not None:
                survey = Survey(grid, classes, index.task.gsd_m)
                _, counts = measure_item(raster, mask, labels, classes, seen=survey.add)
            elif pixels:
                measure_item(raster, mask, labels, classes)
    except DataError as error:
        file = item.image if item.mask is None or not isinstance(error, MaskError) else item.mask
        problems.append(Problem(file=file, split=item.split, reason=str(error)))
        mask = None if file == item.mask else mask
    if mask is not None and counts is None:
        survey = Survey(grid, classes, index.task.gsd_m)
        try:
            counts = count_classes(mask, labels, classes, grid, seen=survey.add)
        except DataError as error:
            problems.append(Problem(file=item.mask or "", split=item.split, reason=str(error)))
    return _Checked(counts, None if counts is None else survey, tuple(problems))


def _open(index: SegmentationIndex, item: IndexItem) -> Raster:
    collar = index.ignore_zero_collar
    return open_image(index.image_files(item), index.task.bands, nodata=index.nodata, zero_collar=collar)


def _groups(index: SegmentationIndex) -> dict[tuple[str, str | None], list[int]]:
    """Positions of the items of each split and domain."""
    groups: dict[tuple[str, str | None], list[int]] = {}
    for position, item in enumerate(index.items):
        groups.setdefault((item.split, item.domain), []).append(position)
    return groups


def _split_count(
    index: SegmentationIndex, key: tuple[str, str | None], counts: Sequence[NDArray[np.int64] | None]
) -> SplitCount:
    known = [count for count in counts if count is not None]
    total = np.sum(known, axis=0) if known else np.zeros(index.task.num_classes + 1, np.int64)
    return SplitCount(
        split=key[0],
        domain=key[1],
        images=len(counts),
        masks=len(known),
        pixels={name: int(count) for name, count in zip(index.task.class_names, total[:-1], strict=True)},
        ignored=int(total[-1]),
    )


def _places(index: SegmentationIndex, checked: Sequence[_Checked]) -> tuple[ClassPlaces, ...]:
    found = [(item, one) for item, one in zip(index.items, checked, strict=True) if one.survey is not None]
    areas = [one.survey.hectares for _, one in found if one.survey is not None]
    places = []
    for number, name in enumerate(index.task.class_names):
        here = [item for item, one in found if one.counts is not None and one.counts[number]]
        known = [float(area[number]) for area in areas if area is not None]
        places.append(
            ClassPlaces(
                name=name,
                pixels=sum(int(one.counts[number]) for _, one in found if one.counts is not None),
                ha=sum(known) if len(known) == len(areas) and areas else None,
                polygons=sum(int(one.survey.polygons[number]) for _, one in found if one.survey is not None),
                features=index.source_features.get(name, 0) if index.source_features else None,
                scenes=len({(item.domain, scene_of(item)) for item in here}),
                splits=tuple(dict.fromkeys(item.split for item in here)),
            )
        )
    return tuple(places)


def _bands(index: SegmentationIndex, moments: Moments) -> tuple[BandStatistics, ...]:
    columns = zip(index.task.bands, moments.mean(), moments.std(), moments.low, moments.high, strict=True)
    return tuple(
        BandStatistics(name=name, mean=float(mean), std=float(std), low=float(low), high=float(high))
        for name, mean, std, low, high in columns
    )


def _areas(index: SegmentationIndex, counts: NDArray[np.int64]) -> list[ClassArea]:
    """Areas of all classes, then of ignored pixels."""
    total, gsd = int(counts.sum()), index.task.gsd_m
    areas = []
    for name, count in zip((*index.task.class_names, "ignored"), counts, strict=True):
        m2 = None if gsd is None else float(count) * gsd**2
        share = float(count / total) if total else None
        areas.append(
            ClassArea(name=name, pixels=int(count), share=share, m2=m2, ha=None if m2 is None else m2 / 10_000)
        )
    return areas


def _images(index: SegmentationIndex) -> Iterator[Problem]:
    seen: dict[str, str] = {}
    for item in index.items:
        other = seen.setdefault(item.image, item.split)
        if other != item.split:
            yield _problem(item, f"the image is in {other} and in {item.split}; splits must not share images.")


def _copies(index: SegmentationIndex) -> Iterator[Problem]:
    """Files with the same content under other names; only files of equal size are read."""
    by_size: dict[int, list[tuple[IndexItem, Path]]] = defaultdict(list)
    for item in index.items:
        first = index.image_files(item)[0]
        if first.is_file():
            by_size[first.stat().st_size].append((item, first))
    for alike in by_size.values():
        if len({item.split for item, _ in alike}) < 2:
            continue
        seen: dict[bytes, IndexItem] = {}
        for item, file in alike:
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").digest()
            other = seen.setdefault(digest, item)
            if other.split != item.split and other.image != item.image:
                yield _problem(item, f"the image is the same as {other.image} in {other.split}; leave one of them out.")


def _scenes(index: SegmentationIndex) -> Iterator[Problem]:
    seen: dict[tuple[str | None, str], IndexItem] = {}
    reported = set()
    for item in index.items:
        if item.scene is None or item.split == UNUSED:
            continue
        key = item.domain, item.scene
        other = seen.setdefault(key, item)
        if "train" in (other.split, item.split) and None in (other.mask, item.mask):
            continue  # labeled and unlabeled tiles of a training scene
        if other.split != item.split and other.image != item.image and (*key, item.split) not in reported:
            reported.add((*key, item.split))
            yield _problem(
                item,
                f"the scene {item.scene} is in {other.split} ({other.image}) and in {item.split}; neighbouring tiles "
                "inflate the scores. Split by scene: `rsseg dataset split`.",
            )


def _problem(item: IndexItem, reason: str) -> Problem:
    return Problem(file=item.image, split=item.split, reason=reason)
