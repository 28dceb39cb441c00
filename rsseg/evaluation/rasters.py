"""Score a folder of class rasters against a folder of reference rasters."""

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rsseg.errors import DataError
from rsseg.evaluation.details import Scorer, details_of
from rsseg.evaluation.model import Advance
from rsseg.evaluation.result import Evaluation
from rsseg.metrics import ConfusionMatrix
from rsseg.raster import Raster, Window
from rsseg.task import IGNORE_INDEX, Task

ROWS = 1024
"""Rows of a raster compared at a time."""
PREDICTED_SUFFIX = "_rsseg"
"""Suffix of the stems of `rsseg predict`'s class rasters."""
_NONE = 256
"""Marks pixels without label or prediction, besides the values 0..255."""


def evaluate_rasters(
    predictions: Path,
    truths: Path,
    *,
    task: Task | None = None,
    ignore: tuple[str, ...] = (),
    background: tuple[str, ...] | None = None,
    progress: Advance | None = None,
) -> Evaluation:
    """Score class rasters, paired by file name without extension; `STEM_rsseg` is a prediction of `STEM`.

    Pixels without data (nodata, alpha, mask band) have no label or no prediction. The same holds for the value 255,
    unless `task` is None and both folders hold only 0 and 255: these are binary masks, in which 255 is a class.

    Args:
        predictions: folder of rasters with one band of whole numbers 0..255.
        truths: folder of rasters on the same grids, with the same values. Each must have a prediction.
        task: names of the values; None takes the names that the rasters carry, or the number of a value without one.
        ignore: names of classes excluded from the scores.
        background: classes that some means leave out; None: those called background or clutter.
        progress: called before every pair.

    Raises:
        DataError: nothing to compare, a missing prediction, different grids, an undeclared value, truths with a single
            class besides undeclared 255, or a class name that stands for different values in two rasters.
    """
    started = time.monotonic()
    pairs = _pairs(predictions, truths)
    confusion, known = ConfusionMatrix(_NONE + 1), _Names()
    tables: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []  # places and counts that are not 0, per pair
    for done, (predicted, true) in enumerate(pairs):
        if progress is not None:
            progress(done, len(pairs))
        one = ConfusionMatrix(_NONE + 1)
        _compare(predicted, true, one, known)
        confusion.counts += one.counts
        flat = one.counts[: _NONE + 1].flatten().numpy()
        tables.append((np.flatnonzero(flat), flat[flat > 0]))
    table = confusion.counts.numpy()[: _NONE + 1]
    drops = task is not None or not _is_binary(table)
    if drops:
        _check_labeled(table, truths)
        _drop_ignored(table)
    seen = [int(v) for v in np.flatnonzero(table[:_NONE, :_NONE].sum(1) + table[:_NONE, :_NONE].sum(0))]
    values = seen if task is None else [c.value for c in task.classes]
    names = known.of(seen) if task is None else task.class_names
    if unknown := [v for v in seen if v not in values]:
        raise DataError(
            f"{truths}, {predictions}: value {unknown[0]} is not a class of {names}. Declare it, or use 255."
        )
    result = Evaluation.of(
        table[[*values, _NONE]][:, values],
        names,
        ignore,
        images=len(pairs),
        seconds=time.monotonic() - started,
        unpredicted=int(table[:_NONE, _NONE].sum()),
    )
    counts = np.zeros((len(pairs), len(values) + 1, len(values)), np.int64)
    for number, (places, found) in enumerate(tables):
        one_table = np.zeros_like(table)
        one_table.flat[places] = found
        if drops:
            _drop_ignored(one_table)
        counts[number] = one_table[[*values, _NONE]][:, values]
    items = [(true.name, None, None) for _, true in pairs]
    details = details_of(items, counts, None, Scorer(names, ignore, background), width=0, seed=0)
    return result.model_copy(update={"details": details})


def _is_binary(table: NDArray[np.int64]) -> bool:
    """Whether the rasters hold only 0 and 255."""
    others = np.delete(np.arange(_NONE), [0, IGNORE_INDEX])
    return bool(table[IGNORE_INDEX].any() and not table[others].any() and not table[:, others].any())


def _check_labeled(table: NDArray[np.int64], truths: Path) -> None:
    """Raise if 255 may be a class."""
    labeled = np.flatnonzero(np.delete(table, [IGNORE_INDEX, _NONE], axis=0).sum(1))
    if table[IGNORE_INDEX].any() and len(labeled) < 2:
        only = f"only {labeled[0]}" if len(labeled) else "nothing"
        raise DataError(
            f"{truths}: besides 255, which means no label, the rasters hold {only}. If 255 is a class, store it as "
            "another value there and in the predictions; if not, declare it as nodata in the files."
        )


def _drop_ignored(table: NDArray[np.int64]) -> None:
    """Count 255 as no label and no prediction."""
    table[_NONE] += table[IGNORE_INDEX]
    table[:, _NONE] += table[:, IGNORE_INDEX]
    table[IGNORE_INDEX] = table[:, IGNORE_INDEX] = 0


def _pairs(predictions: Path, truths: Path) -> list[tuple[Path, Path]]:
    for folder in (predictions, truths):
        if not folder.is_dir():
            raise DataError(f"{folder}: there is no such folder. Give folders of class rasters.")
    found: defaultdict[str, list[Path]] = defaultdict(list)
    for file in sorted(file for file in predictions.iterdir() if _is_raster(file)):
        found[file.stem].append(file)
    wanted = sorted(file for file in truths.iterdir() if _is_raster(file))
    if not wanted:
        raise DataError(f"{truths}: no raster in this folder. Give a folder of class rasters.")
    matches = {file: found[file.stem] or found[file.stem + PREDICTED_SUFFIX] for file in wanted}
    missing = [file for file, predicted in matches.items() if not predicted]
    if missing:
        raise DataError(
            f"{predictions}: {len(missing)} of {len(wanted)} rasters of {truths} have no prediction, the first is "
            f"{missing[0].name}. Names must agree up to the extension and {PREDICTED_SUFFIX}."
        )
    if several := [files for files in matches.values() if len(files) > 1]:
        raise DataError(
            f"{predictions}: {several[0][0].name} and {several[0][1].name} have the same stem. Keep one of them."
        )
    return [(predicted[0], file) for file, predicted in matches.items()]


def _is_raster(file: Path) -> bool:
    return file.suffix.lower() in {".tif", ".tiff", ".png", ".vrt", ".jp2", ".img"}


class _Names:
    """The class names that rasters carry, which must not contradict each other."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._values: dict[str, tuple[int, str]] = {}

    def add(self, raster: Raster) -> None:
        """Add the names of a raster; names of earlier rasters are kept."""
        for value, name in raster.value_names.items():
            other, file = self._values.setdefault(name.casefold(), (value, raster.name))
            if other != value and file != raster.name:
                raise DataError(
                    f"{raster.name}: the class {name!r} has the value {value}, but {other} in {file}. Renumber the "
                    "classes of one of them, or correct the names in its metadata."
                )
            self._names.setdefault(value, name)

    def of(self, values: list[int]) -> tuple[str, ...]:
        """Name of each value, or its number."""
        return tuple(self._names.get(value, str(value)) for value in values)


def _compare(predicted: Path, true: Path, confusion: ConfusionMatrix, names: _Names) -> None:
    """Count a pair of rasters in the confusion matrix."""
    with Raster(predicted) as ours, Raster(true) as theirs:
        names.add(theirs)
        names.add(ours)
        theirs.align_to(ours.info, what=str(true), of=str(predicted))
        height, width = ours.info.height, ours.info.width
        for top in range(0, height, ROWS):
            window = Window(top, 0, min(ROWS, height - top), width)
            prediction, target = _values(ours, window), _values(theirs, window)
            confusion.update(torch.from_numpy(prediction), torch.from_numpy(target))


def _values(raster: Raster, window: Window) -> NDArray[np.int16]:
    """0..255, or `_NONE` where there is no data."""
    pixels, valid = raster.read(window)
    if len(pixels) != 1:
        raise DataError(f"{raster.name}: {len(pixels)} bands. A class raster has one band.")
    found: NDArray[Any] = pixels[0][valid]
    wrong = (found < 0) | (found > IGNORE_INDEX)
    if found.dtype.kind == "f":
        wrong |= found != np.rint(found)
    if wrong.any():
        raise DataError(
            f"{raster.name}: the value {found[wrong][0]:g} is not a class. Class rasters hold whole numbers, 0 to 255; "
            "declare values without a class as nodata in the file."
        )
    values: NDArray[np.int16] = pixels[0].astype(np.int16)
    values[~valid] = _NONE
    return values
