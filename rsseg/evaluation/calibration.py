"""Calibration of probabilities: temperatures, expected calibration error, reliability bins.

Source: Guo et al. 2017 (arXiv 1706.04599). With one temperature per class, the logits of a pixel are divided by that of
the class with the largest logit, so that classes never change.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsseg.fields import Result

BINS = 15
"""Bins of equal width over the confidence, 0..1."""
SAMPLE = 300_000
"""Pixels drawn from all images of a split together."""
MOST_PER_IMAGE = 20_000
LEAST_OF_CLASS = 1000
"""Classes predicted on fewer pixels take the temperature of all classes."""
COLDEST, HOTTEST = 0.05, 20.0
"""Limits of a temperature."""


class ReliabilityBin(Result):
    """Pixels whose confidence lies in one bin."""

    pixels: int
    confidence: float | None
    """Mean; None without pixels."""
    accuracy: float | None
    """Share of the pixels whose class is right."""


class CalibrationError(Result):
    """How far confidences are from accuracies."""

    ece: float | None
    """Expected calibration error: mean over the bins of |accuracy - confidence|, weighted by their pixels."""
    classes: tuple[float | None, ...]
    """The same over the pixels predicted as each class; None if there are none."""
    bins: tuple[ReliabilityBin, ...]


class CalibrationScores(Result):
    """Calibration of a model on a split, on a seeded random sample of its labeled pixels."""

    pixels: int
    temperatures: tuple[float, ...] | None
    """Per class; None if the model has none."""
    fitted_here: bool
    """The temperatures were fitted on these pixels, so that `after` is no independent result."""
    fitted_on: str
    """Images of the fit, in words; empty without temperatures."""
    before: CalibrationError
    """At temperature 1."""
    after: CalibrationError | None


@dataclass(frozen=True)
class PixelSample:
    """Labeled pixels.

    probabilities  float (n, K), at temperature 1
    truth          int (n,), class indices
    """

    probabilities: NDArray[np.float32]
    truth: NDArray[np.int64]

    @property
    def predicted(self) -> NDArray[np.int64]:
        """Int (n,), class indices."""
        found: NDArray[np.int64] = self.probabilities.argmax(1)
        return found

    def logits(self) -> NDArray[np.float64]:
        """Float (n, K): logarithms of probabilities, which are logits up to a constant per pixel; largest 0."""
        logits = np.log(np.maximum(self.probabilities, 1e-30).astype(np.float64))
        largest: NDArray[np.float64] = logits.max(1, keepdims=True)
        return logits - largest


def sample_positions(mask: NDArray[np.uint8], num_classes: int, images: int, seed: Sequence[int]) -> NDArray[np.int64]:
    """Flat positions of randomly drawn labeled pixels of one image, ascending.

    Args:
        mask: (H, W) class indices; larger values have no label.
        num_classes: K.
        images: number of images that share the sample.
        seed: of this image.
    """
    labeled = np.flatnonzero(mask < num_classes)
    count = min(most_per_image(images), len(labeled))
    picked = np.random.default_rng(seed).choice(len(labeled), count, replace=False, shuffle=False)
    return np.sort(labeled[picked])


def most_per_image(images: int) -> int:
    """Pixels to draw from each image at most."""
    return max(1, min(MOST_PER_IMAGE, SAMPLE // max(images, 1)))


def fit_temperatures(sample: PixelSample, *, per_class: bool = False) -> tuple[float, ...]:
    """Temperatures with the least negative log-likelihood, one per class; all equal unless `per_class`."""
    logits, predicted, number = sample.logits(), sample.predicted, sample.probabilities.shape[1]
    temperatures = [_fit(logits, sample.truth)] * number
    for k in range(number) if per_class else ():
        chosen = predicted == k
        if chosen.sum() >= LEAST_OF_CLASS:
            temperatures[k] = _fit(logits[chosen], sample.truth[chosen])
    return tuple(temperatures)


def _fit(logits: NDArray[np.float64], truth: NDArray[np.int64]) -> float:
    """Newton's method on 1 / T, in which the negative log-likelihood is convex; T stays within [0.05, 20]."""
    inverse, low, high = 1.0, 1 / HOTTEST, 1 / COLDEST
    target = logits[np.arange(len(truth)), truth]
    for _ in range(60):
        weights = np.exp(inverse * logits)
        weights /= weights.sum(1, keepdims=True)
        mean = (weights * logits).sum(1)
        slope = float((mean - target).sum())
        curvature = float(((weights * logits**2).sum(1) - mean**2).sum())
        # The root is bracketed: a Newton step that leaves the bracket is replaced by its middle.
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        step = inverse - slope / curvature if curvature > 0 else np.inf
        new = step if low < step < high else (low * high) ** 0.5
        if abs(new - inverse) < 1e-6 * inverse:
            break
        inverse = new
    return float(min(max(1 / inverse, COLDEST), HOTTEST))


def score_calibration(
    sample: PixelSample, temperatures: tuple[float, ...] | None, *, fitted_here: bool = False, fitted_on: str = ""
) -> CalibrationScores:
    """Calibration errors before and after scaling by the temperatures."""
    after = None
    if temperatures is not None:
        scaled = sample.logits() / np.array(temperatures)[sample.predicted][:, None]
        after = _error(sample, 1 / np.exp(scaled).sum(1))
    return CalibrationScores(
        pixels=len(sample.truth),
        temperatures=temperatures,
        fitted_here=fitted_here,
        fitted_on=fitted_on,
        before=_error(sample, sample.probabilities.max(1).astype(np.float64)),
        after=after,
    )


def _error(sample: PixelSample, confidence: NDArray[np.float64]) -> CalibrationError:
    predicted, right = sample.predicted, sample.predicted == sample.truth
    number = sample.probabilities.shape[1]
    place = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    # (classes, bins): pixels, sum of their confidences, number that are right
    cell = predicted * BINS + place
    pixels, sure, hits = (
        np.bincount(cell, weights=values, minlength=number * BINS).reshape(number, BINS).astype(np.float64)
        for values in (np.ones(len(cell)), confidence, right.astype(np.float64))
    )
    bins = [
        ReliabilityBin(pixels=int(n), confidence=c / n if n else None, accuracy=h / n if n else None)
        for n, c, h in zip(pixels.sum(0), sure.sum(0), hits.sum(0), strict=True)
    ]
    return CalibrationError(
        ece=_weighted(pixels.sum(0), sure.sum(0), hits.sum(0)),
        classes=tuple(_weighted(pixels[k], sure[k], hits[k]) for k in range(number)),
        bins=tuple(bins),
    )


def _weighted(pixels: NDArray[np.float64], sure: NDArray[np.float64], hits: NDArray[np.float64]) -> float | None:
    return float(np.abs(hits - sure).sum() / pixels.sum()) if pixels.sum() else None
