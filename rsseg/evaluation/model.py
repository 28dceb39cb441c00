"""Score a network on the images of a split: one confusion matrix over all of them, and details per image."""

import difflib
import io
import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rsseg.config import BaseRecipe, EvalConfig
from rsseg.data.picture import reduced_size, small_picture
from rsseg.data.sources import Source
from rsseg.distributed import Ranks, current_ranks, max_over_ranks, sum_over_ranks
from rsseg.errors import Interrupted, MachineError, RecipeError
from rsseg.evaluation.calibration import (
    PixelSample,
    fit_temperatures,
    most_per_image,
    sample_positions,
    score_calibration,
)
from rsseg.evaluation.details import BOUNDARY_WIDTH, Details, Example, Scorer, count_boundaries, details_of
from rsseg.evaluation.result import Evaluation
from rsseg.inference.engines import EngineNetwork
from rsseg.inference.image import Predictor, predict_and_sample, predict_image, predict_probabilities
from rsseg.inference.predict import choose_tiling
from rsseg.methods.base import Segmenter
from rsseg.metrics import ConfusionMatrix
from rsseg.task import Task

EXAMPLES = 3
"""Pictures of each kind."""
_WRONG, _RIGHT, _UNLABELED = (213, 0, 50), (222, 222, 222), (128, 128, 128)

Advance = Callable[[int, int], None]
"""Called with the number of images done and their total."""


@dataclass(frozen=True)
class DetailOptions:
    """What to measure besides the confusion matrix.

    boundary_width: in pixels; 0: no boundary IoU
    background: classes to leave out of some means; None: those called background or clutter
    fit: fit temperatures to these images, or score the network's own (`none`)
    fitted_on: the images of the fit, in words
    examples: folder for pictures of the best, median and worst images; None: no pictures
    """

    boundary_width: int = BOUNDARY_WIDTH
    background: tuple[str, ...] | None = None
    fit: Literal["none", "temperature", "per_class"] = "none"
    fitted_on: str = ""
    examples: Path | None = None


class Collector:
    """Collects the images of one process and derives the details of all processes together."""

    def __init__(
        self, options: DetailOptions, source: Source, task: Task, ignore: Sequence[str], ranks: Ranks, seed: int
    ) -> None:
        self._options, self._source, self._task, self._ranks, self._seed = options, source, task, ranks, seed
        self._scorer = Scorer(task.class_names, ignore, options.background)
        number, k = len(source.items), task.num_classes
        self._counts = np.zeros((number, k + 1, k), np.int64)
        self._boundary = np.zeros((number, k + 2, k + 1), np.int64) if options.boundary_width else None
        most = most_per_image(number)
        self._probabilities = np.zeros((number, most, k), np.float32)
        self._truth = np.zeros((number, most), np.int64)  # class index + 1; 0: no pixel
        self._pictures: dict[int, tuple[bytes, bytes]] = {}

    def predict(
        self,
        number: int,
        network: Predictor,
        image: Tensor,
        mask: NDArray[np.uint8],
        config: EvalConfig,
        device: torch.device | str,
    ) -> Tensor:
        """Predict the image of this number, keep what is needed, and return its int64 (K + 1, K) counts."""
        k, width = self._task.num_classes, self._options.boundary_width
        at = sample_positions(mask, k, len(self._counts), (self._seed, number))
        prediction, sampled = predict_and_sample(network, image, at, config, device=device)
        confusion = ConfusionMatrix(k)
        confusion.update(torch.from_numpy(prediction), torch.tensor(mask))
        self._counts[number] = confusion.counts.numpy()
        self._probabilities[number, : len(at)] = sampled
        self._truth[number, : len(at)] = mask.reshape(-1)[at].astype(np.int64) + 1
        if self._boundary is not None:
            self._boundary[number] = count_boundaries(prediction, mask, width, k)
        if self._options.examples is not None:
            self._pictures[number] = (_packed(mask), _packed(prediction))
        return confusion.counts

    def finish(self, temperatures: tuple[float, ...] | None, fitted_on: str, device: torch.device | str) -> Details:
        """Details of all images; all processes must call it.

        Args:
            temperatures: the network's own, replaced by those of a fit.
            fitted_on: their images, in words.
            device: for the exchange between processes.
        """
        options = self._options
        for array in (self._counts, self._boundary, self._probabilities, self._truth):
            if array is not None and self._ranks.world_size > 1:
                array[...] = sum_over_ranks(torch.from_numpy(array).to(device)).cpu().numpy()
        details = details_of(
            [(item.image, item.scene, item.domain) for item in self._source.items],
            self._counts,
            self._boundary,
            self._scorer,
            width=options.boundary_width,
            seed=self._seed,
        )
        drawn = self._truth > 0
        sample = PixelSample(self._probabilities[drawn], self._truth[drawn] - 1)
        calibration = None
        if len(sample.truth):
            if options.fit != "none":
                temperatures = fit_temperatures(sample, per_class=options.fit == "per_class")
                fitted_on = options.fitted_on
            fitted = options.fit != "none"
            calibration = score_calibration(sample, temperatures, fitted_here=fitted, fitted_on=fitted_on)
        examples = () if options.examples is None else self._write_examples(details, options.examples, device)
        return details.model_copy(update={"calibration": calibration, "examples": examples})

    def _write_examples(self, details: Details, folder: Path, device: torch.device | str) -> tuple[Example, ...]:
        """Pictures of the best, median and worst images; a process draws its own images."""
        examples = choose_examples([image.miou for image in details.images])
        try:
            if self._ranks.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                for old in folder.glob("*-[0-9]-*.*"):
                    old.unlink()
            sum_over_ranks(torch.zeros(1, device=device))  # the folder is ready
            for name, number in examples:
                if number in self._pictures:
                    self._draw(folder, name, number)
        except OSError as error:
            raise MachineError(f"{folder}: cannot be written: {error}. Free some space.") from None
        return tuple(Example(name=name, image=details.images[number].image) for name, number in examples)

    def _draw(self, folder: Path, name: str, number: int) -> None:
        truth, prediction = (_unpacked(packed) for packed in self._pictures[number])
        pixels, valid = self._source.reader.image(self._source.items[number])
        palette = np.full((256, 3), _UNLABELED, np.uint8)
        palette[: self._task.num_classes] = [info.color for info in self._task.classes]
        labeled = truth < self._task.num_classes
        error = np.where((truth == prediction)[..., None], np.array(_RIGHT, np.uint8), np.array(_WRONG, np.uint8))
        error[~labeled] = _UNLABELED
        shown = small_picture(pixels, valid, self._task.bands)
        shown.save(folder / f"{name}-input.jpg", quality=85)
        for part, colors in (("truth", palette[truth]), ("prediction", palette[prediction]), ("error", error)):
            reduced = Image.fromarray(colors).quantize(256, dither=Image.Dither.NONE)
            reduced.save(folder / f"{name}-{part}.png", optimize=True)


def choose_examples(scores: Sequence[float | None]) -> list[tuple[str, int]]:
    """Names such as `worst-1` and positions of up to three best, median and worst images; no image twice."""
    known = [(score, number) for number, score in enumerate(scores) if score is not None]
    order = [number for _, number in sorted(known)]
    each = min(EXAMPLES, max(1, len(order) // 3)) if order else 0
    middle = max(each, (len(order) - each) // 2)
    groups = (
        ("best", order[::-1][:each]),
        ("median", order[middle : min(middle + each, len(order) - each)]),
        ("worst", order[:each]),
    )
    found: list[tuple[str, int]] = []
    for kind, numbers in groups:
        found += [
            (f"{kind}-{place}", number)
            for place, number in enumerate(numbers, start=1)
            if number not in {taken for _, taken in found}
        ]
    return found


def _packed(classes: NDArray[np.uint8]) -> bytes:
    """The class map at reduced size, compressed."""
    size = reduced_size(classes.shape[1], classes.shape[0])
    small = np.asarray(Image.fromarray(classes).resize(size, Image.Resampling.NEAREST))
    buffer = io.BytesIO()
    np.save(buffer, small)
    return zlib.compress(buffer.getvalue(), 1)


def _unpacked(packed: bytes) -> NDArray[np.uint8]:
    loaded: NDArray[np.uint8] = np.load(io.BytesIO(zlib.decompress(packed)))
    return loaded


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
    network: Segmenter | EngineNetwork,
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
        network: a segmenter on `device`, in eval mode; or an exported graph.
        recipe: `eval` settings.
        source: images, opened for the network's task; scaled by `source.zoom` for the network.
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
    ranks, task = current_ranks(), network.task
    config = recipe.eval.model_copy(update={"scales": tuple(scale * source.zoom for scale in recipe.eval.scales)})
    confusion, entropy = ConfusionMatrix(task.num_classes), torch.zeros(2, dtype=torch.float64)
    share = len(source.items[ranks.rank :: ranks.world_size])
    collector = None
    if details is not None and labels:
        collector = Collector(details, source, task, recipe.eval.ignore_classes, ranks, recipe.seed)
    samples = read_samples(source, network.fill, masks=labels, rank=ranks.rank, world_size=ranks.world_size)
    if progress is not None:
        progress(0, share)
    for done, sample in enumerate(samples, start=1):
        if sample.mask is None:
            probabilities = predict_probabilities(network, sample.image, None, config, device=device)
            entropy += _entropy(probabilities[torch.tensor(sample.valid)])
        elif collector is not None:
            number = ranks.rank + (done - 1) * ranks.world_size
            confusion.counts += collector.predict(number, network, sample.image, sample.mask, config, device)
        else:
            prediction = predict_image(network, sample.image, None, config, device=device)
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
    own = network.calibration
    found = collector.finish(None if own is None else own.temperatures, own.fitted_on if own else "", device)
    return result.model_copy(update={"details": found})


def _entropy(probabilities: Tensor) -> Tensor:
    """Sum of the normalized entropies of (n, K) probabilities, and n; float64 (2,)."""
    scale = max(math.log(probabilities.shape[-1]), 1e-12)
    total = torch.special.entr(probabilities).sum(dtype=torch.float64) / scale
    return torch.stack([total, torch.tensor(len(probabilities), dtype=torch.float64)])
