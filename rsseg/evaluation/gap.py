"""How far two sets of images are apart, without labels: features of a pretrained network, bands, pixel sizes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rsseg.backbones.backbone import Backbone, create_backbone
from rsseg.config import BackboneConfig
from rsseg.data.dataset import SampleReader
from rsseg.data.index import IndexItem, SegmentationIndex
from rsseg.errors import DataError, UsageError
from rsseg.fields import Result
from rsseg.raster import Window
from rsseg.task import Task, task_with_bands

BACKBONE = "tf_efficientnet_lite0"
_WINDOW = 256
_MOST_IMAGES = 200
_ROUNDS = 200
"""Bootstrap samples, and random halves of the first set."""
_FAR = 0.3
"""A guess: not compared with losses of accuracy yet."""

Progress = Callable[[str, int, int], None]


class BandGap(Result):
    """Mean and standard deviation of a band, scaled units."""

    band: str
    mean: tuple[float, float]
    std: tuple[float, float]


class Gap(Result):
    """Distance between two sets of images."""

    measure: str
    backbone: str
    images: tuple[int, int]
    distance: float
    """Normalized energy distance of image features: 0 for equal distributions, 1 for sets far apart."""
    low: float
    high: float
    """95 % interval, bootstrap over images."""
    same: float
    """95th percentile of the distance between random halves of the first set."""
    bands: tuple[BandGap, ...]
    gsd_m: tuple[float | None, float | None]
    sentence: str


def dataset_gap(
    first: Path, second: Path, *, backbone: str, weights: str, seed: int, progress: Progress = lambda *_: None
) -> Gap:
    """Compare two prepared datasets; masks are not read.

    The normalized energy distance (Szekely and Rizzo 2013) of the features of images: the last map of the backbone,
    averaged over the middle 256 pixels of up to 200 images of each.

    Raises:
        UsageError: the backbone is untrained.
        DataError: datasets without common bands, or with fewer than four images.
        WeightsError: there are no weights of the backbone.
    """
    if weights == "random":
        raise UsageError("--weights random: distances of an untrained network say nothing. Give pretrained weights.")
    indices = [SegmentationIndex.load(path) for path in (first, second)]
    bands = [band for band in indices[0].task.bands if band in indices[1].task.bands]
    if not bands:
        names = " and ".join(", ".join(index.task.bands) for index in indices)
        raise DataError(f"{first} and {second} have no band in common: {names}.")
    tasks = [task_with_bands(index.task, bands) for index in indices]
    network = create_backbone(BackboneConfig(name=backbone, weights=weights), tasks[0]).eval()
    found, moments = [], []
    for index, task in zip(indices, tasks, strict=True):
        features, values = _features(index, task, network, seed, progress)
        found.append(features)
        moments.append(values)
    scale = np.concatenate(found).std(axis=0) + 1e-6
    a, b = (features / scale for features in found)
    rng = np.random.default_rng(seed)
    within = _distances(a, a), _distances(b, b), _distances(a, b)
    draws = np.sort([_energy(within, *(rng.integers(0, len(x), len(x)) for x in (a, b))) for _ in range(_ROUNDS)])
    halves = np.sort([_half(within[0], rng.permutation(len(a))) for _ in range(_ROUNDS)])
    distance = _energy(within, np.arange(len(a)), np.arange(len(b)))
    low, high = (float(np.quantile(draws, share)) for share in (0.025, 0.975))
    same = float(np.quantile(halves, 0.95))
    gsd = tasks[0].gsd_m, tasks[1].gsd_m
    return Gap(
        measure="normalized energy distance",
        backbone=backbone,
        images=(len(a), len(b)),
        distance=distance,
        low=low,
        high=high,
        same=same,
        bands=tuple(
            BandGap(
                band=band,
                mean=(float(moments[0][0][i]), float(moments[1][0][i])),
                std=(float(moments[0][1][i]), float(moments[1][1][i])),
            )
            for i, band in enumerate(bands)
        ),
        gsd_m=gsd,
        sentence=verdict(distance, same, gsd),
    )


def verdict(distance: float, same: float, gsd: tuple[float | None, float | None]) -> str:
    """What a distance means, given that between halves of one set and the pixel sizes in metres."""
    if distance <= same:
        text = "Same domain: the sets differ no more than random halves of the first one. Adaptation is not needed."
    elif distance < _FAR:
        text = "Moderate: the sets differ. Try the model as it is, and adaptation beside it."
    else:
        text = "Far: the sets hardly resemble each other. Expect a loss of accuracy; label some images of the second."
    if distance > same:
        text += f" The border between moderate and far, {_FAR:g}, is a guess."
    if gsd[0] is not None and gsd[1] is not None and not 0.67 < gsd[0] / gsd[1] < 1.5:
        text += f" Their pixels measure {gsd[0]:g} m and {gsd[1]:g} m: set data.match_gsd."
    return text


def _features(
    index: SegmentationIndex, task: Task, network: Backbone, seed: int, progress: Progress
) -> tuple[NDArray[np.float64], tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """(n, C) of images, and mean and standard deviation of the bands of these windows in scaled units."""
    items: Sequence[IndexItem] = index.items
    if len(items) < 4:
        raise DataError(f"{index.root}: {len(items)} image(s) are too few to compare. Give at least 4.")
    if len(items) > _MOST_IMAGES:
        order = np.random.default_rng(seed).permutation(len(items))[:_MOST_IMAGES]
        items = [items[i] for i in sorted(order.tolist())]
    reader = SampleReader(index, task.bands, cache=False)
    features, sums = [], []
    for number, item in enumerate(items, start=1):
        height, width = reader.size(item)
        rows, cols = min(height, _WINDOW), min(width, _WINDOW)
        window = Window((height - rows) // 2, (width - cols) // 2, rows, cols)
        pixels, valid = reader.image(item, window)
        progress(f"features of {index.root.name}", number, len(items))
        if valid.mean() < 0.5:
            continue
        image = task.scaled(np.ascontiguousarray(pixels.transpose(1, 2, 0)), valid, network.info.mean)
        good = image[valid].astype(np.float64)
        sums.append((len(good), good.sum(0), np.square(good).sum(0)))
        with torch.inference_mode():
            last = network(torch.from_numpy(image).permute(2, 0, 1)[None])[-1]
        features.append(last.mean((2, 3))[0].double().numpy())
    if len(features) < 4:
        raise DataError(f"{index.root}: fewer than 4 images have data in their middle.")
    count = sum(n for n, _, _ in sums)
    mean = np.sum([s for _, s, _ in sums], axis=0) / count
    square = np.sum([q for _, _, q in sums], axis=0) / count
    return np.array(features), (mean, np.sqrt(np.maximum(square - mean**2, 0)))


def _distances(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(torch.cdist(torch.from_numpy(a), torch.from_numpy(b)).numpy())


def _energy(within: tuple[NDArray[np.float64], ...], first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """Energy distance of two samples over its largest value, 0..1."""
    both = 2 * within[2][np.ix_(first, second)].mean()
    own = within[0][np.ix_(first, first)].mean() + within[1][np.ix_(second, second)].mean()
    return float(np.clip((both - own) / max(both, 1e-12), 0, 1))


def _half(within: NDArray[np.float64], order: NDArray[np.int64]) -> float:
    one, other = np.array_split(order, 2)
    return _energy((within, within, within), one, other)
