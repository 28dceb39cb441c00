"""Loader processes: sample order, and reading, augmenting and padding of one stream's share of a batch."""

import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsseg.config import AugmentConfig, StrongConfig
from rsseg.data.augmentation import (
    ColorSpace,
    Geometry,
    box_mask,
    draw_box,
    draw_cut,
    draw_fast_distortion,
    draw_geometry,
    draw_photometric,
    draw_scaled_size,
    draw_window,
    one_class_dominates,
    pad_origin,
    photometric_distortion,
    strong_view,
    transform_image,
    transform_mask,
    zoomed,
)
from rsseg.data.dataset import SampleReader
from rsseg.data.index import IndexItem
from rsseg.errors import DataError
from rsseg.raster import Window
from rsseg.task import IGNORE_INDEX

_CROP_TRIES = 10
_RARE_SHARE = 0.01
"""Minimum share of a crop's pixels that have the class it was drawn for."""

CropKey = tuple[str, int, bool, int]
"""Stream, image, mirroring and turns of a crop that shows the whole image without other changes."""


class SampleKeys(NamedTuple):
    """Names of the samples of a batch, equal for samples with equal images.

    keys: one per sample
    possible: number of different keys that the stream may have
    """

    keys: tuple[Hashable, ...]
    possible: int


class Crop(NamedTuple):
    """One sample, at most as large as the crop size. Arrays: image and each strong view `(h, w, bands)`, valid bool
    and mask uint8 `(h, w)`, mix bool `(views, crop, crop)`. origin: row and column in the padded square. key: equal for
    crops with equal images, None where images do not repeat.
    """

    image: NDArray[Any]
    valid: NDArray[np.bool_]
    mask: NDArray[np.uint8] | None
    strong: tuple[NDArray[Any], ...] = ()
    mix: NDArray[np.bool_] | None = None
    origin: tuple[int, int] = (0, 0)
    key: CropKey | None = None


class HostSamples(NamedTuple):
    """Crops padded to squares and stacked, on the host.

    images `(B, S, S, bands)` and strong `(B, V, S, S, bands)` in the stored dtype; valid bool, masks uint8
    `(B, S, S)`; mix bool `(B, V, S, S)`; keys None if a crop of the batch has none.
    """

    images: Tensor
    valid: Tensor
    masks: Tensor | None
    strong: Tensor | None
    mix: Tensor | None
    keys: SampleKeys | None = None


@dataclass(frozen=True)
class StreamPlan:
    """Settings of one stream.

    masks         False: masks are never read
    strong_views  number of strong views
    rare_classes  temperature of rare class sampling; None draws uniformly
    zoom          factor on the image size before the augmentation
    """

    name: str
    seed: int
    items: tuple[IndexItem, ...]
    masks: bool
    strong_views: int
    batch_size: int
    augment: AugmentConfig
    strong: StrongConfig
    space: ColorSpace
    rare_classes: float | None = None
    zoom: float = 1.0


def stream_key(stream: str) -> int:
    """Seed derived from a stream's name, the same on every machine."""
    return zlib.crc32(stream.encode())


def permutation(seed: int, stream: str, epoch: int, count: int) -> NDArray[np.int64]:
    """Order of the `count` items of a stream in one epoch."""
    return np.random.default_rng([seed, stream_key(stream), epoch, 0]).permutation(count)


def sample_generator(seed: int, stream: str, position: int) -> np.random.Generator:
    """Random generator of the augmentation of the sample at `position` (counted over epochs)."""
    return np.random.default_rng([seed, stream_key(stream), position, 1])


def positions(micro_step: int, *, batch_size: int, rank: int, world_size: int) -> range:
    """Positions of a rank's share of a micro-step: every `world_size`-th of the global batch, starting at its rank."""
    start = micro_step * batch_size * world_size
    return range(start + rank, start + batch_size * world_size, world_size)


class RareClassOrder:
    """Rare class sampling: position -> item number. Draws a class, then an image that contains it.

    Class k has the probability softmax((1 - share of k) / temperature). Source: Hoyer et al. 2022 (arXiv 2111.14887).
    """

    def __init__(self, seed: int, stream: str, pixels: Sequence[Sequence[int]], *, temperature: float) -> None:
        """`pixels` (items, classes): pixel counts, at least one of them not 0."""
        self._seed, self._key = seed, stream_key(stream)
        counts = np.asarray(pixels, np.float64)
        totals = counts.sum(0)
        self._present = present = np.flatnonzero(totals)
        logits = (1.0 - totals[present] / totals.sum()) / temperature
        weights = np.exp(logits - logits.max())
        self._probabilities = weights / weights.sum()
        self._items = [np.flatnonzero(counts[:, k]) for k in present]

    def draw(self, position: int) -> tuple[int, int]:
        """Item number, and the class that it was drawn for; a pure function of seed, stream and position."""
        rng = np.random.default_rng([self._seed, self._key, position, 2])
        drawn = rng.choice(len(self._items), p=self._probabilities)
        return int(rng.choice(self._items[drawn])), int(self._present[drawn])


class Order:
    """Uniform sampling without replacement: position -> item number. Keeps the permutation of the last epoch."""

    def __init__(self, seed: int, stream: str, count: int) -> None:
        """`count` items, at least one."""
        self._seed, self._stream, self._count = seed, stream, count
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def draw(self, position: int) -> tuple[int, None]:
        """`permutation(seed, stream, position // count)[position % count]`; no class is wanted."""
        epoch, place = divmod(position, self._count)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, permutation(self._seed, self._stream, epoch, self._count)
        return int(self._permutation[place]), None


class StreamReader:
    """Samples of a stream by position; independent of the process and of the order of the calls."""

    def __init__(self, plan: StreamPlan, reader: SampleReader) -> None:
        """Read the images of `plan` with `reader`."""
        self.plan = plan
        self._reader = reader
        self._order = _order(plan)

    def micro_batch(self, micro_step: int, *, rank: int, world_size: int) -> HostSamples:
        """The samples of one rank in a micro-step."""
        places = positions(micro_step, batch_size=self.plan.batch_size, rank=rank, world_size=world_size)
        crops = [self.crop(position) for position in places]
        host = collate(crops, self.plan.augment.crop_size)
        keys = tuple(crop.key for crop in crops if crop.key is not None)
        if len(keys) < len(crops):
            return host
        return host._replace(keys=SampleKeys(keys, len(self.plan.items) * _orientations(self.plan.augment)))

    def crop(self, position: int) -> Crop:
        """The augmented sample at a position."""
        plan = self.plan
        number, wanted = self._order.draw(position)
        item = plan.items[number]
        rng = sample_generator(plan.seed, plan.name, position)
        geometry, mask = self._geometry(rng, item, wanted)
        pixels, valid = self._reader.image(item, geometry.window)
        image = transform_image(pixels.transpose(1, 2, 0), geometry)
        valid = np.ones(image.shape[:2], np.bool_) if valid.all() else transform_mask(valid, geometry)
        image = self._distort(rng, image)
        origin = pad_origin(geometry, plan.augment.crop_size) if plan.augment.pad_first else (0, 0)
        key = self._key(number, geometry)
        crop = Crop(image, valid, None if mask is None else transform_mask(mask, geometry), origin=origin, key=key)
        if not plan.strong_views:
            return crop
        strong = tuple(strong_view(rng, image, valid, plan.space, plan.strong) for _ in range(plan.strong_views))
        size = plan.augment.crop_size
        mix = np.stack([box_mask(draw_box(rng, size, plan.strong), size) for _ in range(plan.strong_views)])
        return crop._replace(strong=strong, mix=mix)

    def _geometry(
        self, rng: np.random.Generator, item: IndexItem, wanted: int | None
    ) -> tuple[Geometry, NDArray[np.uint8] | None]:
        """Draw a crop, redrawn while one class dominates it or the wanted class is too rare in it; also return the
        labels of its window.
        """
        plan, augment = self.plan, self.plan.augment
        size = self._reader.size(item)
        scaled = draw_scaled_size(rng, zoomed(size, plan.zoom), augment)
        limit = augment.crop_max_class_ratio
        mask, cut = None, None
        for _ in range(1 + _CROP_TRIES):
            if augment.resampling == "pillow":
                window = Window(0, 0, *size)
                cut, out = draw_cut(rng, scaled, augment.crop_size)
            else:
                window, out = draw_window(rng, size, scaled, augment.crop_size)
            mask = self._reader.mask(item, window) if plan.masks else None
            if mask is None or (wanted is None and limit >= 1):
                break
            # Pillow scales the whole image: the crop is only a part of its mask.
            crop = mask if cut is None else transform_mask(mask, Geometry(window, out, False, False, 0, cut))
            if _shows(crop, wanted) and not (limit < 1 and one_class_dominates(crop, limit)):
                break
        return draw_geometry(rng, window, out, augment, cut), mask

    def _key(self, number: int, geometry: Geometry) -> CropKey | None:
        """Equal for equal crops; None where an image rarely appears twice in the same way."""
        augment, (_, _, *window) = self.plan.augment, geometry.window
        drawn = augment.photometric != "none" or (augment.fit == "crop" and augment.scale_range is not None)
        cropped = tuple(window) != self._reader.size(self.plan.items[number])
        if drawn or cropped or (geometry.cut is not None and geometry.cut.scaled != geometry.size):
            return None
        # Two mirrorings are half a turn.
        turns = (geometry.turns + 2 * geometry.vflip) % 4
        return self.plan.name, number, geometry.hflip != geometry.vflip, turns

    def _distort(self, rng: np.random.Generator, image: NDArray[Any]) -> NDArray[Any]:
        match self.plan.augment.photometric:
            case "mmseg":
                return photometric_distortion(image, draw_photometric(rng))
            case "fast":
                return self.plan.space.apply(image, draw_fast_distortion(rng, self.plan.space))
            case "none":
                return image


def _orientations(augment: AugmentConfig) -> int:
    """Number of ways in which an image may be mirrored and turned."""
    mirrorings = (1 + (augment.hflip > 0)) * (1 + (augment.vflip > 0))
    return 4 * min(mirrorings, 2) if augment.rot90 > 0 else mirrorings


def _shows(mask: NDArray[np.uint8], wanted: int | None) -> bool:
    return wanted is None or int(np.count_nonzero(mask == wanted)) >= _RARE_SHARE * mask.size


def _order(plan: StreamPlan) -> Order | RareClassOrder:
    if plan.rare_classes is None:
        return Order(plan.seed, plan.name, len(plan.items))
    counts = [item.classes for item in plan.items if item.classes is not None]
    if len(counts) < len(plan.items) or not any(map(any, counts)):
        raise DataError(
            f"stream {plan.name!r}: rare class sampling needs the class counts of the masks, which the index lacks. "
            "Prepare the dataset again."
        )
    return RareClassOrder(plan.seed, plan.name, counts, temperature=plan.rare_classes)


def collate(crops: list[Crop], size: int) -> HostSamples:
    """Pad crops to squares of `size` pixels (image 0, valid False, mask 255) and stack them."""
    first = crops[0]
    bands, dtype, views = first.image.shape[2], first.image.dtype, len(first.strong)
    images = np.zeros((len(crops), size, size, bands), dtype)
    valid = np.zeros((len(crops), size, size), np.bool_)
    masks = None if first.mask is None else np.full(valid.shape, IGNORE_INDEX, np.uint8)
    strong = np.zeros((len(crops), views, size, size, bands), dtype) if views else None
    mix = np.stack([crop.mix for crop in crops if crop.mix is not None]) if views else None
    for i, crop in enumerate(crops):
        (top, left), (height, width) = crop.origin, crop.valid.shape
        inside = slice(top, top + height), slice(left, left + width)
        images[i][inside] = crop.image
        valid[i][inside] = crop.valid
        if masks is not None and crop.mask is not None:
            np.copyto(masks[i][inside], crop.mask, where=crop.valid)
        for view, pixels in enumerate(crop.strong):
            strong[i, view][inside] = pixels  # type: ignore[index]  # views > 0, so the array exists
    return HostSamples(torch.from_numpy(images), torch.from_numpy(valid), _tensor(masks), _tensor(strong), _tensor(mix))


def _tensor(array: NDArray[Any] | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array)
