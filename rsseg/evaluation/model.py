"""Scoring: a network over a split, or class rasters against true ones; one confusion matrix either way."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from rsseg.checkpoint import read_header
from rsseg.config import BaseRecipe, SelectConfig
from rsseg.data.index import digest_of
from rsseg.data.sources import open_source
from rsseg.distributed import current_ranks, sum_over_ranks
from rsseg.errors import DataError
from rsseg.evaluation.samples import evaluation_samples
from rsseg.inference.device import resolve_device
from rsseg.inference.image import predict_image, predict_probabilities
from rsseg.inference.network import load_segmenter
from rsseg.methods.base import Segmenter
from rsseg.metrics import ConfusionMatrix, Scores, scores
from rsseg.raster import Raster, Window
from rsseg.recipe import recipe_from_dict
from rsseg.task import IGNORE_INDEX, Task

Advance = Callable[[int, int], None]
"""Called with how many images of how many are done."""

ROWS = 1024
"""Rows of a raster that are compared at a time."""


class Evaluation(BaseModel):
    """A confusion matrix and what follows from it."""

    model_config = ConfigDict(frozen=True)

    counts: tuple[tuple[int, ...], ...]
    """(K + 1) rows of K: [target, prediction]; the last row counts the predictions on unlabeled pixels."""
    scores: Scores
    images: int
    seconds: float
    seen: str | None = None
    """`training` or `selection` if these very images served it when the model was made: the scores are no test."""
    entropy: float | None = None
    """Mean normalized entropy of the probabilities, 0..1, if that was asked for; then no label was read, and `counts`
    and `scores` are empty."""
    unpredicted: int = 0
    """Labeled pixels where a class raster has no data; they do not count."""

    @property
    def matrix(self) -> NDArray[np.int64]:
        """int64 (K, K) of labeled pixels, [target, prediction]."""
        return np.array(self.counts[:-1], np.int64)


def evaluate(
    segmenter: Segmenter,
    recipe: BaseRecipe,
    select: SelectConfig,
    *,
    split: str,
    device: torch.device | str,
    progress: Advance | None = None,
    labels: bool = True,
) -> Evaluation:
    """Score a network on a split; the ranks of a process group share the images, and all get the result.

    Images of another ground sampling distance are scaled for the network if the recipe says so.

    Args:
        segmenter: on `device`, in eval mode.
        recipe: data path, `eval` settings and seed.
        select: which images.
        split: taken where `select` names none.
        device: where the network runs.
        progress: told after every image of this process.
        labels: False opens no mask and measures the entropy instead.

    Raises:
        DataError: nothing selected, a missing mask, unreadable files, an ignored class that does not exist.
    """
    started = time.monotonic()
    ranks, task = current_ranks(), segmenter.task
    samples = evaluation_samples(
        recipe, select, split, task, rank=ranks.rank, world_size=ranks.world_size, masks=labels
    )
    config = recipe.eval.model_copy(update={"scales": tuple(scale * samples.zoom for scale in recipe.eval.scales)})
    confusion, entropy = ConfusionMatrix(task.num_classes), torch.zeros(2, dtype=torch.float64)
    for done, sample in enumerate(samples, start=1):
        if sample.mask is None:
            probabilities = predict_probabilities(segmenter, sample.image, sample.valid, config, device=device)
            entropy += _entropy(probabilities[torch.from_numpy(sample.valid)])
        else:
            prediction = predict_image(segmenter, sample.image, sample.valid, config, device=device)
            confusion.update(torch.from_numpy(prediction), torch.tensor(sample.mask))
        if progress is not None:
            progress(done, len(samples))
    total_entropy, pixels = sum_over_ranks(entropy.to(device)).tolist()
    totals = torch.cat([confusion.counts.flatten(), torch.tensor([len(samples)])]).to(device)
    *counts, images = sum_over_ranks(totals).tolist()
    matrix = np.array(counts, np.int64).reshape(task.num_classes + 1, task.num_classes)
    return Evaluation(
        counts=tuple(tuple(row) for row in matrix.tolist()),
        scores=scores(matrix, task.class_names, ignore=recipe.eval.ignore_classes),
        images=images,
        seconds=time.monotonic() - started,
        entropy=None if labels else total_entropy / max(pixels, 1),
    )


def _entropy(probabilities: Tensor) -> Tensor:
    """Sum of the normalized entropies of (n, K) probabilities, and n; float64 (2,)."""
    scale = max(math.log(probabilities.shape[-1]), 1e-12)
    total = torch.special.entr(probabilities).sum(dtype=torch.float64) / scale
    return torch.stack([total, torch.tensor(len(probabilities), dtype=torch.float64)])


def evaluate_model(
    model: Path,
    *,
    data: Path | None = None,
    split: str = "test",
    device: str = "auto",
    progress: Advance | None = None,
) -> Evaluation:
    """Score a model file on a split of its recipe's dataset, or of another one with the same classes.

    Args:
        model: model file.
        data: prepared dataset; None takes the recipe's.
        split: `val` and `test` mean the recipe's selections of these names, anything else a split of the dataset.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        progress: told after every image.

    Raises:
        WeightsError: the model cannot be loaded.
        DataError: see `evaluate`.
    """
    target = resolve_device(device)
    segmenter = load_segmenter(model, device=device)
    header = read_header(model)
    recipe = recipe_from_dict(header.recipe, str(model))
    select = {"val": recipe.data.val, "test": recipe.data.test}.get(split, SelectConfig(split=split))
    if data is not None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": data})})
        select = SelectConfig(split=split)
    result = evaluate(segmenter, recipe, select, split=split, device=target, progress=progress)
    source = open_source(recipe, select, split, segmenter.task, masks=True)
    return result.model_copy(update={"seen": header.training.get("used", {}).get(digest_of(source.items))})


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
    chosen = counts[[*values, IGNORE_INDEX]][:, values]
    return Evaluation(
        counts=tuple(tuple(row) for row in chosen.tolist()),
        scores=scores(chosen, names, ignore=ignore),
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
