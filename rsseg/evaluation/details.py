"""Scores per image, domain and scene, boundary IoU, and bootstrap intervals, from one matrix per image."""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from rsseg.errors import UsageError
from rsseg.evaluation.calibration import CalibrationScores
from rsseg.fields import Result
from rsseg.metrics import ConfusionMatrix, Scores, scores
from rsseg.task import IGNORE_INDEX

BOUNDARY_WIDTH = 2
"""Default width of boundaries in pixels."""
BACKGROUND_NAMES = ("background", "clutter")
RESAMPLES = 1000
INTERIOR = "(interior)"
"""Name of the additional class of pixels off the boundaries."""

Counts = tuple[tuple[int, ...], ...]


class ImageScores(Result):
    """One image. Means are None where no class is present."""

    image: str
    scene: str
    """The scene that it was cut from, or itself."""
    domain: str | None
    counts: Counts
    """(K + 1) rows of K, as in `Evaluation`."""
    boundary_counts: Counts | None
    """(K + 2) rows of K + 1 of the boundary labels, the class K being the interior; None if not requested."""
    pixels: int
    miou: float | None
    mf1: float | None
    oa: float | None
    boundary_miou: float | None
    classes: tuple[float | None, ...]
    """IoU of each class that is not ignored."""


class GroupScores(Result):
    """The images of a domain or scene together."""

    name: str
    images: int
    scores: Scores
    boundary_miou: float | None


class Interval(Result):
    """95 % interval."""

    low: float
    high: float


class Example(Result):
    """Pictures `NAME-input.jpg`, `NAME-truth.png`, `NAME-prediction.png` and `NAME-error.png` of an image."""

    name: str
    """`best-1`, `median-2`, `worst-3`: by mIoU of the image."""
    image: str


class Details(Result):
    """Everything about an evaluation beyond the sum of its matrices."""

    images: tuple[ImageScores, ...]
    domains: tuple[GroupScores, ...]
    """Empty if the images name no domain."""
    scenes: tuple[GroupScores, ...]
    """Empty if every image is a scene of its own."""
    intervals: dict[str, Interval]
    """`miou`, `mf1`, `oa`, `boundary_miou`, `miou_without_background`, `iou_<class>`; empty if there is only one
    scene."""
    bootstrap: str
    """The procedure in words."""
    boundary_width: int
    """Pixels; 0: not measured."""
    boundary: str
    """The measure in words."""
    boundary_miou: float | None
    boundary_classes: dict[str, float | None]
    background: tuple[str, ...]
    """Classes that `miou_without_background` leaves out of the mean."""
    miou_without_background: float | None
    """None if there is no background class."""
    calibration: CalibrationScores | None = None
    """None for class rasters."""
    examples: tuple[Example, ...] = ()


def boundary_labels(classes: NDArray[np.uint8], labeled: NDArray[np.bool_], width: int, interior: int) -> Any:
    """Replace pixels off the boundaries by `interior`.

    A pixel lies on the boundary of its class if a labeled pixel of another class is at most `width` pixels away
    (chessboard distance). The border of the image and of unlabeled areas is no boundary.

    Args:
        classes: (H, W) class indices.
        labeled: (H, W); other pixels are ignored, and stay what they are.
        width: > 0.
        interior: class index.

    Returns:
        uint8 (H, W).

    Source: Cheng et al. 2021, Boundary IoU (arXiv 2103.16562), for all classes in one pass.
    """
    window = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    largest = cv2.dilate(np.where(labeled, classes, 0).astype(np.uint8), window)
    smallest = cv2.erode(np.where(labeled, classes, 255).astype(np.uint8), window)
    inside = (largest == classes) & (smallest == classes)
    return np.where(inside & labeled, np.uint8(interior), classes)


def count_boundaries(
    prediction: NDArray[np.uint8], mask: NDArray[np.uint8], width: int, num_classes: int
) -> NDArray[np.int64]:
    """Int64 (K + 2, K + 1) counts of boundary labels; see `boundary_labels`."""
    labeled = mask < num_classes
    confusion = ConfusionMatrix(num_classes + 1)
    confusion.update(
        torch.from_numpy(boundary_labels(prediction, labeled, width, num_classes)),
        torch.from_numpy(np.where(labeled, boundary_labels(mask, labeled, width, num_classes), IGNORE_INDEX)),
    )
    return confusion.counts.numpy()


class Scorer:
    """The scores of matrices of the same classes."""

    def __init__(self, names: Sequence[str], ignore: Sequence[str], background: Sequence[str] | None) -> None:
        """Store the names.

        Args:
            names: in index order.
            ignore: classes excluded from the scores.
            background: classes that some means leave out; None: those called background or clutter.

        Raises:
            UsageError: a background class does not exist, or nothing else is left.
        """
        self.names, self.ignore = tuple(names), tuple(ignore)
        listed = [name for name in names if name not in ignore]
        if unknown := [name for name in background or () if name not in names]:
            raise UsageError(f"--background {unknown[0]}: no such class. The classes are {', '.join(names)}.")
        found = [name for name in listed if name.casefold() in BACKGROUND_NAMES] if background is None else background
        self.background = tuple(name for name in found if name in listed)
        if self.background and len(self.background) == len(listed):
            raise UsageError(f"--background {self.background[0]}: no other class is left. Name fewer.")

    def scores(self, counts: NDArray[np.int64]) -> Scores:
        """Of (K + 1, K) counts."""
        return scores(counts, self.names, ignore=self.ignore)

    def boundary(self, counts: NDArray[np.int64]) -> Scores:
        """Of (K + 2, K + 1) counts; the last class is the interior."""
        return scores(counts, (*self.names, INTERIOR), ignore=self.ignore)

    def boundary_miou(self, counts: NDArray[np.int64] | None) -> float | None:
        """Mean boundary IoU of (K + 2, K + 1) counts; None if they were not requested."""
        return None if counts is None else self.boundary(counts).miou_without((INTERIOR,))

    def means(self, counts: NDArray[np.int64], boundary: NDArray[np.int64] | None) -> dict[str, float | None]:
        """The scores that have intervals."""
        found = self.scores(counts)
        values = {"miou": found.miou, "mf1": found.mf1, "oa": found.oa}
        if self.background:
            values["miou_without_background"] = found.miou_without(self.background)
        if boundary is not None:
            values["boundary_miou"] = self.boundary_miou(boundary)
        return values | {f"iou_{c.name}": c.iou for c in found.classes}


def details_of(
    items: Sequence[tuple[str, str | None, str | None]],
    counts: NDArray[np.int64],
    boundary: NDArray[np.int64] | None,
    scorer: Scorer,
    *,
    width: int,
    seed: int,
) -> Details:
    """Derive all scores from the matrices of the images.

    Args:
        items: name, scene and domain of each image.
        counts: int64 (N, K + 1, K).
        boundary: int64 (N, K + 2, K + 1), or None.
        scorer: names of the classes.
        width: of boundaries, in pixels.
        seed: of the bootstrap.
    """
    scenes = [scene or name for name, scene, _ in items]
    domains = [domain for _, _, domain in items]
    number, draws = len(set(scenes)), _draws(scenes, seed)
    edges = None if boundary is None else scorer.boundary(boundary.sum(0))
    total = scorer.scores(counts.sum(0))
    return Details(
        images=tuple(
            _image(*item, counts[i], None if boundary is None else boundary[i], scorer) for i, item in enumerate(items)
        ),
        domains=_groups(domains, counts, boundary, scorer) if any(domains) else (),
        scenes=_groups(scenes, counts, boundary, scorer) if number < len(items) else (),
        intervals={} if draws is None else _intervals(_resampled(draws, counts, boundary, scorer)),
        bootstrap=f"95 % percentile bootstrap over {number} scenes, {RESAMPLES} resamples, seed {seed}"
        if number > 1
        else "no interval: one scene only",
        boundary_width=width if boundary is not None else 0,
        boundary=f"pixels at most {width} px from another class, on whole images; image borders are no boundary"
        if boundary is not None
        else "not measured",
        boundary_miou=None if boundary is None else scorer.boundary_miou(boundary.sum(0)),
        boundary_classes={} if edges is None else {c.name: c.iou for c in edges.classes if c.name != INTERIOR},
        background=scorer.background,
        miou_without_background=total.miou_without(scorer.background) if scorer.background else None,
    )


def _image(
    name: str,
    scene: str | None,
    domain: str | None,
    counts: NDArray[np.int64],
    boundary: NDArray[np.int64] | None,
    scorer: Scorer,
) -> ImageScores:
    found = scorer.scores(counts)
    return ImageScores(
        image=name,
        scene=scene or name,
        domain=domain,
        counts=tuple(map(tuple, counts.tolist())),
        boundary_counts=None if boundary is None else tuple(map(tuple, boundary.tolist())),
        pixels=found.pixels,
        miou=found.miou,
        mf1=found.mf1,
        oa=found.oa,
        boundary_miou=scorer.boundary_miou(boundary),
        classes=tuple(c.iou for c in found.classes),
    )


def _groups(
    keys: Sequence[str | None], counts: NDArray[np.int64], boundary: NDArray[np.int64] | None, scorer: Scorer
) -> tuple[GroupScores, ...]:
    groups = []
    for key in sorted(set(keys), key=str):
        chosen = np.array([other == key for other in keys])
        groups.append(
            GroupScores(
                name=str(key),
                images=int(chosen.sum()),
                scores=scorer.scores(counts[chosen].sum(0)),
                boundary_miou=None if boundary is None else scorer.boundary_miou(boundary[chosen].sum(0)),
            )
        )
    return tuple(groups)


def _draws(scenes: Sequence[str], seed: int) -> NDArray[np.int64] | None:
    """(R, N) how often each resample of the scenes contains an image; None if there is only one scene."""
    names, place = np.unique(scenes, return_inverse=True)
    if (number := len(names)) < 2:
        return None
    return np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), RESAMPLES)[:, place]


def _resampled(
    weights: NDArray[np.int64], counts: NDArray[np.int64], boundary: NDArray[np.int64] | None, scorer: Scorer
) -> list[dict[str, float | None]]:
    """Scores of R weighted sums of the images' matrices; weights (R, N)."""
    sums = _weighted_sums(weights, counts)
    edges = [None] * len(sums) if boundary is None else _weighted_sums(weights, boundary)
    return [scorer.means(*pair) for pair in zip(sums, edges, strict=True)]


def _intervals(rows: Sequence[dict[str, float | None]]) -> dict[str, Interval]:
    """The 95 % percentile interval of each value; resamples without a value are left out."""
    found = {}
    for name in rows[0]:
        known = [value for row in rows if (value := row[name]) is not None]
        if known:
            low, high = np.percentile(known, (2.5, 97.5))
            found[name] = Interval(low=float(low), high=float(high))
    return found


def _weighted_sums(weights: NDArray[np.int64], matrices: NDArray[np.int64]) -> NDArray[np.int64]:
    """(R, N) x (N, h, w) -> (R, h, w); exact, since float64 holds integers up to 2^53."""
    flat = matrices.reshape(len(matrices), -1).astype(np.float64)
    product = weights.astype(np.float64) @ flat
    return product.astype(np.int64).reshape(-1, *matrices.shape[1:])


class Difference(Result):
    """Score of a second evaluation minus that of a first one on the same images."""

    first: float | None
    second: float | None
    difference: float | None
    interval: Interval | None
    """95 % bootstrap interval of the difference over scenes; None with one scene."""


def paired_differences(
    first: Sequence[ImageScores], second: Sequence[ImageScores], scorer: Scorer, *, seed: int = 0
) -> dict[str, Difference]:
    """Differences of all scores with intervals.

    Both evaluations have the same scenes in each resample, so that easy and hard scenes cancel.

    Args:
        first, second: the same images, in any order; at least one.
        scorer: names of the classes.
        seed: of the bootstrap.
    """
    others = {image.image: image for image in second}
    pairs = [(image, others[image.image]) for image in first]
    both = [np.array([pair[i].counts for pair in pairs], np.int64) for i in (0, 1)]
    edges: list[NDArray[np.int64]] = []
    if all(image.boundary_counts is not None for pair in pairs for image in pair):
        edges = [np.array([pair[i].boundary_counts for pair in pairs], np.int64) for i in (0, 1)]

    def values(weights: NDArray[np.int64], i: int) -> list[dict[str, float | None]]:
        return _resampled(weights, both[i], edges[i] if edges else None, scorer)

    def minus(a: dict[str, float | None], b: dict[str, float | None]) -> dict[str, float | None]:
        return {k: None if (x := a[k]) is None or (y := b[k]) is None else y - x for k in a}

    whole = np.ones((1, len(pairs)), np.int64)
    (before,), (after,) = values(whole, 0), values(whole, 1)
    intervals: dict[str, Interval] = {}
    if (draws := _draws([image.scene for image in first], seed)) is not None:
        intervals = _intervals([minus(a, b) for a, b in zip(values(draws, 0), values(draws, 1), strict=True)])
    change = minus(before, after)
    return {
        name: Difference(first=before[name], second=after[name], difference=change[name], interval=intervals.get(name))
        for name in before
    }


def image_rows(details: Details, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """One row per image for a CSV file, in the order of the index."""
    return [
        image.model_dump(include={"image", "scene", "domain", "pixels", "miou", "mf1", "oa", "boundary_miou"})
        | {f"iou_{name}": value for name, value in zip(class_names, image.classes, strict=True)}
        for image in details.images
    ]
