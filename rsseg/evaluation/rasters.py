"""Score a folder of class rasters against a folder of true ones."""

import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rsseg.errors import DataError
from rsseg.evaluation.model import Advance, Evaluation
from rsseg.metrics import ConfusionMatrix
from rsseg.raster import Raster, Window
from rsseg.task import IGNORE_INDEX, Task

ROWS = 1024
"""Rows of a raster that are compared at a time."""


def evaluate_rasters(
    predictions: Path,
    truths: Path,
    *,
    task: Task | None = None,
    ignore: tuple[str, ...] = (),
    progress: Advance | None = None,
) -> Evaluation:
    """Score class rasters, paired by file name without extension.

    Args:
        predictions: folder of single-band 8-bit rasters; 255 and declared nodata are no prediction.
        truths: folder of rasters of the same sizes, with the same values; 255 and declared nodata have no label. Every
            one must have a prediction.
        task: gives names to the values; None names each value that occurs by its number.
        ignore: names of classes left out of the score.
        progress: told after every pair.

    Raises:
        DataError: nothing to compare, a missing prediction, sizes that differ, a value that is not declared.
    """
    started = time.monotonic()
    pairs = _pairs(predictions, truths)
    # Every 8-bit value is a class of its own at first; 255 stays free for "no label".
    confusion, unpredicted = ConfusionMatrix(IGNORE_INDEX), 0
    for done, (predicted, true) in enumerate(pairs, start=1):
        unpredicted += _compare(predicted, true, confusion)
        if progress is not None:
            progress(done, len(pairs))
    counts = confusion.counts.numpy()
    seen = [int(v) for v in np.flatnonzero(counts[:-1].sum(1) + counts[:-1].sum(0))]
    values = seen if task is None else [c.value for c in task.classes]
    names = tuple(str(v) for v in seen) if task is None else task.class_names
    if unknown := [v for v in seen if v not in values]:
        raise DataError(f"{truths}, {predictions}: value {unknown[0]} is no class of {names}. Declare it, or use 255.")
    return Evaluation.of(
        counts[[*values, IGNORE_INDEX]][:, values],
        names,
        ignore,
        images=len(pairs),
        seconds=time.monotonic() - started,
        unpredicted=unpredicted,
    )


def _pairs(predictions: Path, truths: Path) -> list[tuple[Path, Path]]:
    for folder in (predictions, truths):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder. Give folders of class rasters.")
    found = {file.stem: file for file in predictions.iterdir() if _is_raster(file)}
    wanted = sorted(file for file in truths.iterdir() if _is_raster(file))
    if not wanted:
        raise DataError(f"{truths}: no raster here. Give a folder of class rasters.")
    missing = [file for file in wanted if file.stem not in found]
    if missing:
        raise DataError(
            f"{predictions}: {len(missing)} of {len(wanted)} rasters of {truths} have no prediction, the first is "
            f"{missing[0].name}. Names must agree up to the extension."
        )
    return [(found[file.stem], file) for file in wanted]


def _is_raster(file: Path) -> bool:
    return file.suffix.lower() in {".tif", ".tiff", ".png", ".vrt", ".jp2", ".img"}


def _compare(predicted: Path, true: Path, confusion: ConfusionMatrix) -> int:
    """Add a pair of rasters; returns how many labeled pixels have no prediction."""
    unpredicted = 0
    with Raster(predicted) as ours, Raster(true) as theirs:
        height, width = ours.info.height, ours.info.width
        if (height, width) != (theirs.info.height, theirs.info.width):
            raise DataError(
                f"{predicted} has {height} x {width} pixels, {true} {theirs.info.height} x {theirs.info.width}. "
                "Give rasters on the same grid."
            )
        for top in range(0, height, ROWS):
            window = Window(top, 0, min(ROWS, height - top), width)
            prediction, known = _classes(ours, window, predicted)
            target, labeled = _classes(theirs, window, true)
            unpredicted += int((labeled & ~known).sum())
            confusion.update(
                torch.from_numpy(np.where(known, prediction, 0)),
                torch.from_numpy(target),
                valid=torch.from_numpy(labeled & known),
            )
    return unpredicted


def _classes(raster: Raster, window: Window, file: Path) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    pixels, valid = raster.read(window)
    if len(pixels) != 1 or pixels.dtype != np.uint8:
        raise DataError(f"{file}: {len(pixels)} bands of {pixels.dtype}. A class raster has one band of uint8.")
    return pixels[0], valid & (pixels[0] != IGNORE_INDEX)
