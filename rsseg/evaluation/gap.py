"""How far two sets of images are apart, without labels: features of a pretrained network, bands, pixel sizes."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from rsseg.backbones.backbone import Backbone, create_backbone
from rsseg.config import BackboneConfig
from rsseg.data.dataset import SampleReader
from rsseg.data.index import SegmentationIndex
from rsseg.errors import DataError, UsageError
from rsseg.fields import Result
from rsseg.raster import Raster, RasterInfo, Window
from rsseg.task import ClassInfo, Task, task_with_bands
from rsseg.vector.grid import Grid

BACKBONE = "tf_efficientnet_lite0"
_WINDOW = 256
_MOST_IMAGES = 200
_ROUNDS = 200
"""Bootstrap samples, and random halves of the first set."""
_EVERY = 97
"""One pixel of so many is used for the percentiles of scenes."""
_FAR = 0.3
"""A guess: the few pairs of domains with a measured loss of accuracy do not fix it."""

_Item = TypeVar("_Item")
_Pixels = tuple[NDArray[Any], NDArray[np.bool_]]
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
    first: Path | Sequence[str],
    second: Path | Sequence[str],
    *,
    backbone: str,
    weights: str,
    seed: int,
    progress: Progress = lambda *_: None,
) -> Gap:
    """Compare two sets of images; masks are not read.

    The normalized energy distance (Szekely and Rizzo 2013) of the features of images: the last map of the backbone,
    averaged over the middle 256 pixels of up to 200 images of a dataset, or over up to 200 such windows of scenes.

    Args:
        first, second: folder of a prepared dataset, or files of scenes. Scenes are scaled like the dataset that they
            are compared with; two sets of scenes of another type than uint8 by percentiles 2 and 98 of the first.
        backbone: its name.
        weights: `pretrained` or a file.
        seed: of the samples.
        progress: see `Progress`.

    Raises:
        UsageError: the backbone is untrained.
        DataError: sets without common bands, or with fewer than four images; a file is missing or damaged.
        WeightsError: there are no weights of the backbone.
    """
    if weights == "random":
        raise UsageError("--weights random: distances of an untrained network say nothing. Give pretrained weights.")
    sets = [_Dataset(images, seed) if isinstance(images, Path) else _Scenes(images, seed) for images in (first, second)]
    wanted = next((one.task.bands for one in sets if one.task is not None), sets[0].bands)
    bands = [band for band in wanted if all(one.has(band, wanted) for one in sets)]
    if not bands:
        names = " and ".join(", ".join(one.bands) for one in sets)
        raise DataError(f"{sets[0].name} and {sets[1].name} have no band in common: {names}.")
    known = next((one.task for one in sets if one.task is not None), None) or _scaling(sets[0], bands, wanted)
    tasks = [task_with_bands(one.task or known, bands) for one in sets]
    network = create_backbone(BackboneConfig(name=backbone, weights=weights), tasks[0]).eval()
    found, moments = [], []
    for one, task in zip(sets, tasks, strict=True):
        features, values = _features(one, task, wanted, network, progress)
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
    gsd = sets[0].gsd_m, sets[1].gsd_m
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


class _Dataset:
    """Images of a prepared dataset."""

    def __init__(self, root: Path, seed: int) -> None:
        self._index = SegmentationIndex.load(root)
        self.name, self.task, self.gsd_m = str(root), self._index.task, self._index.task.gsd_m
        self.bands = self.task.bands
        self._items = _drawn(self._index.items, seed)

    def __len__(self) -> int:
        return len(self._items)

    def has(self, band: str, _wanted: Sequence[str]) -> bool:
        return band in self.bands

    def windows(self, bands: Sequence[str], _wanted: Sequence[str]) -> Iterator[_Pixels]:
        """The middle of each image: (C, h, w), and bool (h, w) where there is data."""
        reader = SampleReader(self._index, bands, cache=False)
        for item in self._items:
            height, width = reader.size(item)
            rows, cols = min(height, _WINDOW), min(width, _WINDOW)
            yield reader.image(item, Window((height - rows) // 2, (width - cols) // 2, rows, cols))


class _Scenes:
    """Windows of rasters."""

    task = None

    def __init__(self, files: Sequence[str], seed: int) -> None:
        self.name = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
        self._infos, windows = {}, []
        for file in files:
            with Raster(file) as raster:
                info = self._infos[file] = raster.info
            side = min(_WINDOW, info.height), min(_WINDOW, info.width)
            rows, cols = range(0, info.height - side[0] + 1, side[0]), range(0, info.width - side[1] + 1, side[1])
            windows += [(file, Window(row, col, *side)) for row in rows for col in cols]
        self._windows = _drawn(windows, seed)
        first = self._infos[files[0]]
        sides = Grid(first).ground_sides()
        self.gsd_m = None if sides is None else math.sqrt(sides[0] * sides[1])
        self.bands, self.dtype = first.band_names, first.dtype

    def __len__(self) -> int:
        return len(self._windows)

    def has(self, band: str, wanted: Sequence[str]) -> bool:
        return all(band in _numbers(info, wanted) for info in self._infos.values())

    def windows(self, bands: Sequence[str], wanted: Sequence[str]) -> Iterator[_Pixels]:
        """See `_Dataset.windows`."""
        for file, own in groupby(self._windows, key=lambda pair: pair[0]):
            numbers = _numbers(self._infos[file], wanted)
            with Raster(file, bands=[numbers[band] for band in bands], columns=_WINDOW) as raster:
                for _, window in own:
                    yield raster.read(window)


def _drawn(items: Sequence[_Item], seed: int) -> list[_Item]:
    """At most `_MOST_IMAGES`, in their order."""
    if len(items) <= _MOST_IMAGES:
        return list(items)
    return [items[i] for i in sorted(np.random.default_rng(seed).permutation(len(items))[:_MOST_IMAGES].tolist())]


def _numbers(info: RasterInfo, wanted: Sequence[str]) -> dict[str, int]:
    """Numbers of the bands of a file that match by name, else by colour, else all of them by order."""
    for known in ([name.casefold() for name in info.band_names], list(info.colors)):
        places = {band: known.index(band.casefold()) for band in wanted if known.count(band.casefold()) == 1}
        if places:
            return {band: info.numbers[place] for band, place in places.items()}
    return dict(zip(wanted, info.numbers, strict=True)) if info.count == len(wanted) else {}


def _scaling(scenes: "_Dataset | _Scenes", bands: Sequence[str], wanted: Sequence[str]) -> Task:
    """A task that scales the pixels of scenes to about 0..1."""
    assert isinstance(scenes, _Scenes)  # for the type checker: a dataset has a task
    low, high = np.zeros(len(bands)), np.full(len(bands), 255.0)
    if scenes.dtype != "uint8":
        some = [pixels[:, valid][:, ::_EVERY] for pixels, valid in scenes.windows(bands, wanted)]
        low, high = np.percentile(np.concatenate([*some, np.zeros((len(bands), 1))], axis=1), (2, 98), axis=1)
    scale = 1 / np.maximum(high - low, 1e-6)
    return Task(
        name="scenes",
        classes=(ClassInfo(name="any", value=0, color=(0, 0, 0)),),
        bands=tuple(bands),
        dtype=scenes.dtype,
        scale=tuple(scale.tolist()),
        offset=tuple((-low * scale).tolist()),
    )


def _features(
    images: _Dataset | _Scenes, task: Task, wanted: Sequence[str], network: Backbone, progress: Progress
) -> tuple[NDArray[np.float64], tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """(n, C) of images, and mean and standard deviation of the bands of these windows in scaled units."""
    if len(images) < 4:
        raise DataError(f"{images.name}: {len(images)} image(s) are too few to compare. Give at least 4.")
    features, sums = [], []
    for number, (pixels, valid) in enumerate(images.windows(task.bands, wanted), start=1):
        progress(f"features of {Path(images.name).name}", number, len(images))
        if valid.mean() < 0.5:
            continue
        image = task.scaled(np.ascontiguousarray(pixels.transpose(1, 2, 0)), valid, network.info.mean)
        good = image[valid].astype(np.float64)
        sums.append((len(good), good.sum(0), np.square(good).sum(0)))
        with torch.inference_mode():
            last = network(torch.from_numpy(image).permute(2, 0, 1)[None])[-1]
        features.append(last.mean((2, 3))[0].double().numpy())
    if len(features) < 4:
        raise DataError(f"{images.name}: fewer than 4 images have data in their middle.")
    count = sum(n for n, _, _ in sums)
    mean = np.sum([s for _, s, _ in sums], axis=0) / count
    square = np.sum([q for _, _, q in sums], axis=0) / count
    return np.array(features), (mean, np.sqrt(np.maximum(square - mean**2, 0)))


def _distances(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(torch.cdist(torch.from_numpy(a), torch.from_numpy(b)).numpy())


def _energy(within: tuple[NDArray[np.float64], ...], first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """Energy distance of two samples over its largest value, 0..1.

    Unbiased: an image is not compared with itself, nor with its copies in a bootstrap sample. Otherwise few images
    would seem far apart, the fewer the farther.
    """
    both = 2 * within[2][np.ix_(first, second)].mean()
    own = _mean_of_others(within[0], first) + _mean_of_others(within[1], second)
    return float(np.clip((both - own) / max(both, 1e-12), 0, 1))


def _mean_of_others(distances: NDArray[np.float64], chosen: NDArray[np.int64]) -> float:
    """Mean distance between different images."""
    differ = chosen[:, None] != chosen
    return float(distances[np.ix_(chosen, chosen)][differ].mean()) if differ.any() else 0.0


def _half(within: NDArray[np.float64], order: NDArray[np.int64]) -> float:
    one, other = np.array_split(order, 2)
    return _energy((within, within, within), one, other)
