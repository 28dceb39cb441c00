"""Geometry of the weak augmentation: decide first which source pixels a crop needs, then read and scale only those.

Drawing and applying are apart, so that draws can be given by hand.
"""

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import PIL.Image
from numpy.typing import NDArray

from rsseg.config import AugmentConfig
from rsseg.raster import Window
from rsseg.task import IGNORE_INDEX

Size = tuple[int, int]
"""Rows, columns."""
Box = tuple[float, float, float, float]
_CV_BANDS = 4
"""OpenCV scales at most four bands at once."""


@dataclass(frozen=True)
class Geometry:
    """What happens to an image on its way to a crop, in this order.

    window  source pixels that are read
    size    rows and columns they are scaled to; at most the crop size
    hflip   mirrored left to right
    vflip   mirrored top to bottom
    turns   times it is turned by 90 degrees, counter-clockwise
    box     left, top, right, bottom of the crop in the window, source pixels; resampled by Pillow. None: all of the
            window, by OpenCV
    """

    window: Window
    size: Size
    hflip: bool
    vflip: bool
    turns: int
    box: Box | None = None


def draw_scaled_size(rng: np.random.Generator, size: Size, config: AugmentConfig) -> Size:
    """Size of the whole image after the random scaling; at least one pixel each way."""
    if config.fit == "squeeze":
        return config.crop_size, config.crop_size
    if config.scale_range is None:
        return size
    low, high = config.scale_range
    longest = max(size)
    if config.scale_style == "uniform":
        factor = rng.uniform(low, high)
    else:
        factor = rng.integers(int(low * longest), int(high * longest) + 1) / longest
    return max(1, int(size[0] * factor + 0.5)), max(1, int(size[1] * factor + 0.5))


def draw_window(rng: np.random.Generator, size: Size, scaled: Size, crop: int) -> tuple[Window, Size]:
    """Source window of a random crop of the scaled image, and the crop's size.

    The window lies on whole source pixels, so a scaled crop can be off by half a source pixel; unscaled ones are exact.
    """
    out = min(scaled[0], crop), min(scaled[1], crop)
    rows, cols = (
        min(full, max(1, round(part * full / whole))) for full, part, whole in zip(size, out, scaled, strict=True)
    )
    row, col = (int(rng.integers(0, full - part + 1)) for full, part in zip(size, (rows, cols), strict=True))
    return Window(row, col, rows, cols), out


def draw_pillow_window(rng: np.random.Generator, size: Size, scaled: Size, crop: int) -> tuple[Window, Size, Box]:
    """Like `draw_window`, with the crop placed on pixels of the scaled image; also the box that it covers."""
    out = min(scaled[0], crop), min(scaled[1], crop)
    top, left = (int(rng.integers(0, whole - part + 1)) for whole, part in zip(scaled, out, strict=True))
    window, box = pillow_window(size, scaled, (top, left), out)
    return window, out, box


def pillow_window(size: Size, scaled: Size, origin: Size, out: Size) -> tuple[Window, Box]:
    """Source pixels that a crop of the scaled image depends on, and the box in them that it covers.

    Args:
        size: of the image.
        scaled: its size after scaling.
        origin: first row and column of the crop in the scaled image.
        out: rows and columns of the crop.
    """
    starts, counts, low, high = [], [], [], []
    for full, whole, first, part in zip(size, scaled, origin, out, strict=True):
        step = full / whole
        reach = max(step, 1.0) + 1  # of the filter, one pixel to spare
        start = max(0, math.floor(first * step - reach))
        starts.append(start)
        counts.append(min(full, math.ceil((first + part) * step + reach)) - start)
        low.append(first * step - start)
        high.append(min((first + part) * step - start, counts[-1]))
    return Window(*starts, *counts), (low[1], low[0], high[1], high[0])


def draw_geometry(
    rng: np.random.Generator, window: Window, size: Size, config: AugmentConfig, box: Box | None = None
) -> Geometry:
    """Complete a window with mirroring and turning."""
    hflip, vflip, turn = (bool(rng.random() < p) for p in (config.hflip, config.vflip, config.rot90))
    return Geometry(window, size, hflip, vflip, int(rng.integers(1, 4)) if turn else 0, box)


def pad_origin(geometry: Geometry, crop: int) -> Size:
    """Row and column of a transformed crop in its square if right and bottom were padded before it was mirrored."""
    (height, width), top, left = geometry.size, 0, 0
    if geometry.vflip:
        top = crop - height
    if geometry.hflip:
        left = crop - width
    for _ in range(geometry.turns):
        top, left, height, width = crop - left - width, top, width, height
    return top, left


def one_class_dominates(mask: NDArray[np.uint8], limit: float) -> bool:
    """Whether one class covers more than `limit` of the labeled pixels of `(h, w)`, or none is labeled."""
    counts = np.bincount(mask.ravel(), minlength=256)[:IGNORE_INDEX]
    return bool(counts.max() > limit * counts.sum()) or not counts.any()


def transform_image(pixels: NDArray[Any], geometry: Geometry) -> NDArray[Any]:
    """Window `(h, w, bands)` -> scaled (bilinear), mirrored, turned `(h', w', bands)`, contiguous, same type."""
    if geometry.box is not None:
        resized = _pillow(pixels, geometry.size, geometry.box, PIL.Image.Resampling.BILINEAR)
    else:
        resized = _resize(pixels, geometry.size, cv2.INTER_LINEAR)
    return _orient(resized, geometry)


def transform_mask(mask: NDArray[Any], geometry: Geometry) -> NDArray[Any]:
    """Window `(h, w)` uint8 or bool -> scaled (nearest), mirrored, turned `(h', w')`, contiguous, same type."""
    values = mask.view(np.uint8)[..., None]
    if geometry.box is not None:
        resized = _pillow(values, geometry.size, geometry.box, PIL.Image.Resampling.NEAREST)
    else:
        resized = _resize(values, geometry.size, cv2.INTER_NEAREST)
    return _orient(resized, geometry)[..., 0].view(mask.dtype)


def _resize(pixels: NDArray[Any], size: Size, interpolation: int) -> NDArray[Any]:
    if pixels.shape[:2] == size:
        return pixels
    groups = [
        cv2.resize(np.ascontiguousarray(pixels[..., i : i + _CV_BANDS]), size[::-1], interpolation=interpolation)
        for i in range(0, pixels.shape[2], _CV_BANDS)
    ]
    return np.concatenate([group.reshape(*size, -1) for group in groups], axis=2)


def _pillow(pixels: NDArray[Any], size: Size, box: Box, filter_: PIL.Image.Resampling) -> NDArray[Any]:
    """8-bit bands as they are, others as 32-bit floating point, rounded back to their type."""
    if pixels.shape[:2] == size and box == (0, 0, size[1], size[0]):
        return pixels
    native = pixels.dtype == np.uint8
    bands = np.moveaxis(pixels if native else pixels.astype(np.float32), 2, 0)
    planes = [PIL.Image.fromarray(np.ascontiguousarray(band)).resize(size[::-1], filter_, box) for band in bands]
    scaled = np.stack([np.asarray(plane) for plane in planes], axis=2)
    if native or not np.issubdtype(pixels.dtype, np.integer):
        return scaled
    return np.rint(scaled).astype(pixels.dtype)


def _orient(pixels: NDArray[Any], geometry: Geometry) -> NDArray[Any]:
    if geometry.hflip or geometry.vflip:
        code = -1 if geometry.hflip and geometry.vflip else int(geometry.hflip)
        pixels = cv2.flip(np.ascontiguousarray(pixels), code).reshape(pixels.shape)
    return np.ascontiguousarray(np.rot90(pixels, geometry.turns))
