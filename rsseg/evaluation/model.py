"""Score a network on the images of a split, with one confusion matrix over all of them."""

import difflib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsseg.checkpoint import read_header
from rsseg.config import BaseRecipe, EvalConfig, SelectConfig
from rsseg.data.index import digest_of
from rsseg.data.sources import Datasets, Source
from rsseg.distributed import current_ranks, max_over_ranks, sum_over_ranks
from rsseg.errors import Interrupted, RecipeError
from rsseg.evaluation.collector import Collector, DetailOptions
from rsseg.evaluation.result import Evaluation
from rsseg.inference.device import resolve_device
from rsseg.inference.image import predict_image, predict_probabilities
from rsseg.inference.network import load_segmenter
from rsseg.inference.predict import choose_tiling
from rsseg.methods.base import Segmenter
from rsseg.metrics import ConfusionMatrix
from rsseg.recipe import recipe_from_dict

Advance = Callable[[int, int], None]
"""Called with the number of images done and their total."""


@dataclass(frozen=True)
class EvalSample:
    """A whole image.

    name   as in the index
    image  float32 (C, H, W), scaled units, `fill` where not valid
    valid  bool (H, W), False without data
    mask   uint8 (H, W), class index or 255 (also without data); None if masks are not read
    """

    name: str
    image: Tensor
    valid: NDArray[np.bool_]
    mask: NDArray[np.uint8] | None


def read_samples(
    source: Source, fill: Sequence[float], *, masks: bool = True, rank: int = 0, world_size: int = 1
) -> Iterator[EvalSample]:
    """Every `world_size`-th image of a source, one at a time; raises `DataError` for unreadable files.

    Args:
        source: selected images.
        fill: per band, scaled units: value of pixels without data.
        masks: read masks.
        rank: first image.
        world_size: number of processes.
    """
    for item in source.items[rank::world_size]:
        if masks:
            pixels, valid, mask = source.reader.sample(item)
        else:
            (pixels, valid), mask = source.reader.image(item), None
        image = source.task.scaled(pixels.transpose(1, 2, 0), valid, fill)
        yield EvalSample(item.image, torch.from_numpy(image).permute(2, 0, 1), valid, mask)


def check_settings(config: EvalConfig, segmenter: Segmenter) -> None:
    """Raise `RecipeError` for `eval` settings that do not fit the network or its task."""
    names = segmenter.task.class_names
    if unknown := [name for name in config.ignore_classes if name not in names]:
        near = difflib.get_close_matches(unknown[0], names, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"The classes are {', '.join(names)}."
        raise RecipeError(f"eval.ignore_classes: {unknown[0]!r} is no class of this dataset. {hint}")
    if set(config.ignore_classes) >= set(names):
        raise RecipeError("eval.ignore_classes: every class is ignored. Keep at least one.")
    tiling = choose_tiling(segmenter, config.tile, config.overlap, config.blend)
    if config.mode == "tiled" and tiling.overlap >= tiling.tile:
        raise RecipeError(
            f"eval.overlap: {tiling.overlap} pixels do not fit tiles of {tiling.tile}. Choose 0 to {tiling.tile - 1}."
        )


def evaluate(
    segmenter: Segmenter,
    recipe: BaseRecipe,
    source: Source,
    *,
    device: torch.device | str,
    progress: Advance | None = None,
    labels: bool = True,
    stop: Callable[[], bool] = lambda: False,
    details: DetailOptions | None = None,
) -> Evaluation:
    """Score a network on selected images; the ranks of a process group share the images, and all get the result.

    Args:
        segmenter: on `device`, in eval mode.
        recipe: `eval` settings.
        source: images, opened for the segmenter's task; scaled by `source.zoom` for the network.
        device: where the network runs.
        progress: called after every image of this process.
        labels: False reads no mask and measures the entropy instead.
        stop: asked after every image; ends the evaluation on all ranks once it returns True on any.
        details: what else to measure, with labels only; None: nothing.

    Raises:
        DataError: unreadable files, an ignored class that does not exist.
        Interrupted: `stop` returned True.
    """
    started = time.monotonic()
    ranks, task = current_ranks(), segmenter.task
    config = recipe.eval.model_copy(update={"scales": tuple(scale * source.zoom for scale in recipe.eval.scales)})
    confusion, entropy = ConfusionMatrix(task.num_classes), torch.zeros(2, dtype=torch.float64)
    share = len(source.items[ranks.rank :: ranks.world_size])
    collector = None
    if details is not None and labels:
        collector = Collector(details, source, task, recipe.eval.ignore_classes, ranks, recipe.seed)
    samples = read_samples(source, segmenter.fill, masks=labels, rank=ranks.rank, world_size=ranks.world_size)
    if progress is not None:
        progress(0, share)
    for done, sample in enumerate(samples, start=1):
        if sample.mask is None:
            probabilities = predict_probabilities(segmenter, sample.image, None, config, device=device)
            entropy += _entropy(probabilities[torch.tensor(sample.valid)])
        elif collector is not None:
            number = ranks.rank + (done - 1) * ranks.world_size
            confusion.counts += collector.predict(number, segmenter, sample.image, sample.mask, config, device)
        else:
            prediction = predict_image(segmenter, sample.image, None, config, device=device)
            confusion.update(torch.from_numpy(prediction), torch.tensor(sample.mask))
        if progress is not None:
            progress(done, share)
        if stop():
            break
    if max_over_ranks(int(stop())):
        raise Interrupted("The evaluation was stopped.")
    total_entropy, pixels = sum_over_ranks(entropy.to(device)).tolist()
    totals = torch.cat([confusion.counts.flatten(), torch.tensor([share])]).to(device)
    *counts, images = sum_over_ranks(totals).tolist()
    result = Evaluation.of(
        np.array(counts, np.int64).reshape(task.num_classes + 1, task.num_classes),
        task.class_names,
        recipe.eval.ignore_classes,
        images=images,
        seconds=time.monotonic() - started,
        entropy=None if labels else total_entropy / max(pixels, 1),
    )
    if collector is None:
        return result
    own = segmenter.calibration
    found = collector.finish(None if own is None else own.temperatures, own.fitted_on if own else "", device)
    return result.model_copy(update={"details": found})


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
    details: DetailOptions | None = None,
) -> Evaluation:
    """Score a model file on a split of its recipe's dataset, or of another one with the same classes.

    Args:
        model: model file.
        data: prepared dataset; None takes the recipe's.
        split: `val` and `test` are the recipe's selections of these names, anything else is a split of the dataset.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        progress: called after every image.
        details: see `evaluate`.

    Raises:
        WeightsError: the model cannot be loaded.
        DataError: see `Datasets.open` and `evaluate`.
    """
    target = resolve_device(device)
    segmenter = load_segmenter(model, device=device)
    header = read_header(model)
    recipe = recipe_from_dict(header.recipe, str(model))
    select = {"val": recipe.data.val, "test": recipe.data.test}.get(split, SelectConfig(split=split))
    if data is not None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": data})})
        select = SelectConfig(split=split)
    source = Datasets(recipe.data, recipe.seed).open(select, split, segmenter.task, masks=True)
    result = evaluate(segmenter, recipe, source, device=target, progress=progress, details=details)
    return result.model_copy(update={"seen": header.training.get("used", {}).get(digest_of(source.items))})
