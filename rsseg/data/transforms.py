"""Geometry of the weak augmentation: draw the source window of a crop first, then read and scale only that.

Drawing and applying are separate functions, so that drawn values can also be passed in.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import PIL.Image
from numpy.typing import NDArray

from rsseg.config import AugmentConfig
from rsseg.raster import Window
from rsseg.task import IGNORE_INDEX

Size = tuple[int, int]
"""Rows, columns."""
_CV_BANDS = 4
"""Maximum number of bands per resize call of OpenCV."""


class Cut(NamedTuple):
    """Size of the whole scaled image, and first row and column of the crop in it."""

    scaled: Size
    origin: Size


@dataclass(frozen=True)
class Geometry:
    """Steps from an image to a crop, in this order.

    window  source pixels to read
    size    rows and columns after scaling; at most the crop size
    hflip   mirrored left to right
    vflip   mirrored top to bottom
    turns   counter-clockwise rotations by 90 degrees
    cut     Pillow scales the window as a whole, and a crop of `size` is cut out. None: OpenCV scales the window to the
            crop
    """

    window: Window
    size: Size
    hflip: bool
    vflip: bool
    turns: int
    cut: Cut | None = None


def zoomed(size: Size, factor: float) -> Size:
    """A size times a factor; at least one pixel per side."""
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def draw_scaled_size(rng: np.random.Generator, size: Size, config: AugmentConfig) -> Size:
    """Size of the whole image after the random scaling; at least one pixel per side."""
    if config.fit == "squeeze":
        return config.crop_size, config.crop_size
    if config.scale_range is None:
        return size
    low, high = config.scale_range
    longest = max(size)
    if config.scale_style == "uniform":
        factor, unit = rng.uniform(low, high), 1
    else:
        factor, unit = int(rng.integers(int(low * longest), int(high * longest) + 1)), longest
    return max(1, int(size[0] * factor / unit + 0.5)), max(1, int(size[1] * factor / unit + 0.5))


def draw_window(rng: np.random.Generator, size: Size, scaled: Size, crop: int) -> tuple[Window, Size]:
    """Source window of a random crop of the scaled image, and the crop's size.

    The window is aligned to source pixels: a scaled crop can be off by half a source pixel, an unscaled one is exact.
    """
    out = min(scaled[0], crop), min(scaled[1], crop)
    rows, cols = (
        min(full, max(1, round(part * full / whole))) for full, part, whole in zip(size, out, scaled, strict=True)
    )
    row, col = (int(rng.integers(0, full - part + 1)) for full, part in zip(size, (rows, cols), strict=True))
    return Window(row, col, rows, cols), out


def draw_cut(rng: np.random.Generator, scaled: Size, crop: int) -> tuple[Cut, Size]:
    """A random crop, aligned to the pixels of the scaled image, and the crop's size."""
    out = min(scaled[0], crop), min(scaled[1], crop)
    top, left = (int(rng.integers(0, whole - part + 1)) for whole, part in zip(scaled, out, strict=True))
    return Cut(scaled, (top, left)), out


def draw_geometry(
    rng: np.random.Generator, window: Window, size: Size, config: AugmentConfig, cut: Cut | None = None
) -> Geometry:
    """Draw mirroring and rotation for a window."""
    hflip, vflip, turn = (bool(rng.random() < p) for p in (config.hflip, config.vflip, config.rot90))
    return Geometry(window, size, hflip, vflip, int(rng.integers(1, 4)) if turn else 0, cut)


def pad_origin(geometry: Geometry, crop: int) -> Size:
    """Row and column of a transformed crop in its square if it was padded at right and bottom before mirroring."""
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
    """Window `(h, w, bands)` -> scaled (bilinear), mirrored, rotated `(h', w', bands)`, contiguous, same type."""
    if geometry.cut is not None:
        resized = _pillow_cut(pixels, geometry.size, geometry.cut, PIL.Image.Resampling.BILINEAR)
    else:
        resized = _resize(pixels, geometry.size, cv2.INTER_LINEAR)
    return _orient(resized, geometry)


def transform_mask(mask: NDArray[Any], geometry: Geometry) -> NDArray[Any]:
    """Window `(h, w)` uint8 or bool -> scaled (nearest), mirrored, rotated `(h', w')`, contiguous, same type."""
    values = mask.view(np.uint8)[..., None]
    if geometry.cut is not None:
        resized = _pillow_cut(values, geometry.size, geometry.cut, PIL.Image.Resampling.NEAREST)
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


def _pillow_cut(pixels: NDArray[Any], size: Size, cut: Cut, filter_: PIL.Image.Resampling) -> NDArray[Any]:
    """Scale the whole window, then cut: the float32 corners of Pillow's `box` would change some pixels by one level.

    8-bit bands are scaled directly, others as float32 and rounded to their type.
    """
    if pixels.shape[:2] != cut.scaled:
        native = pixels.dtype == np.uint8
        bands = np.moveaxis(pixels if native else pixels.astype(np.float32), 2, 0)
        images = [PIL.Image.fromarray(np.ascontiguousarray(band)).resize(cut.scaled[::-1], filter_) for band in bands]
        scaled = np.stack([np.asarray(image) for image in images], axis=2)
        pixels = np.rint(scaled).astype(pixels.dtype) if np.issubdtype(pixels.dtype, np.integer) else scaled
    top, left = cut.origin
    return pixels[top : top + size[0], left : left + size[1]]


def _orient(pixels: NDArray[Any], geometry: Geometry) -> NDArray[Any]:
    if geometry.hflip or geometry.vflip:
        code = -1 if geometry.hflip and geometry.vflip else int(geometry.hflip)
        pixels = cv2.flip(np.ascontiguousarray(pixels), code).reshape(pixels.shape)
    return np.ascontiguousarray(np.rot90(pixels, geometry.turns))
