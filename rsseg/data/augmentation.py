"""Augmentation: geometry of the weak views, colours and CutMix boxes of the strong ones.

Drawing and applying are separate functions, so that drawn values can also be passed in. The source window of a crop is
drawn first; only that is read and scaled."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import PIL.Image
from numpy.typing import NDArray

from rsseg.config import AugmentConfig, StrongConfig
from rsseg.raster import Window
from rsseg.task import IGNORE_INDEX

Size = tuple[int, int]
"""Rows, columns."""
_CV_BANDS = 4
"""Maximum number of bands per resize call of OpenCV."""
Matrix = NDArray[np.float64]
"""(bands + 1, bands + 1), acts on (band values in scaled units, 1)."""
_BOX_TRIES = 1000
_MEAN_STRIDE = 4
"""Row and column stride of the pixels that estimate the mean brightness of a crop."""
_LUMA = (0.299, 0.587, 0.114)
_YIQ = np.array([_LUMA, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)])


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


@dataclass(frozen=True)
class PhotometricDraws:
    """Random parameters of the published distortion; None skips a step.

    brightness      added, grey levels
    contrast        factor
    contrast_first  contrast before saturation and hue instead of after
    saturation      factor
    hue             added to OpenCV's 8-bit hue (0..179)
    """

    brightness: float | None = None
    contrast: float | None = None
    contrast_first: bool = False
    saturation: float | None = None
    hue: int | None = None


def draw_photometric(rng: np.random.Generator) -> PhotometricDraws:
    """Draw from the published ranges, each step with probability 0.5."""
    brightness, contrast, saturation, hue = (bool(coin) for coin in rng.integers(0, 2, 4))
    return PhotometricDraws(
        brightness=rng.uniform(-32, 32) if brightness else None,
        contrast=rng.uniform(0.5, 1.5) if contrast else None,
        contrast_first=bool(rng.integers(0, 2)),
        saturation=rng.uniform(0.5, 1.5) if saturation else None,
        hue=int(rng.integers(-18, 18)) if hue else None,
    )


def photometric_distortion(image: NDArray[np.uint8], draws: PhotometricDraws) -> NDArray[np.uint8]:
    """The distortion of SSD as the KTDA training uses it, exact to the grey level.

    Args:
        image: `(h, w, 3)` red, green, blue.
        draws: random choices.

    Returns:
        `(h, w, 3)` uint8. Each step truncates to 8 bits, and saturation and hue each go through 8-bit HSV and back.
    """
    contrast = None if draws.contrast is None else _affine_table(draws.contrast, 0)
    if draws.brightness is not None:
        image = cv2.LUT(image, _affine_table(1, draws.brightness))
    if contrast is not None and draws.contrast_first:
        image = cv2.LUT(image, contrast)
    if draws.saturation is not None:
        image = _in_hsv(image, 1, _affine_table(draws.saturation, 0))
    if draws.hue is not None:
        image = _in_hsv(image, 0, ((np.arange(256) + draws.hue) % 180).astype(np.uint8))
    if contrast is not None and not draws.contrast_first:
        image = cv2.LUT(image, contrast)
    return image


def _affine_table(factor: float, shift: float) -> NDArray[np.uint8]:
    """Value -> value * factor + shift in float32, clipped, truncated."""
    table: NDArray[np.uint8] = np.clip(np.arange(256, dtype=np.float32) * factor + shift, 0, 255).astype(np.uint8)
    return table


def _in_hsv(image: NDArray[np.uint8], channel: int, table: NDArray[np.uint8]) -> NDArray[np.uint8]:
    tables = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    tables[0, :, channel] = table
    hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), tables)
    converted: NDArray[np.uint8] = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return converted


@dataclass(frozen=True)
class ColorSpace:
    """Scaling of the bands and positions of red, green and blue.

    scale, offset  per band: scaled units = pixel * scale + offset
    rgb            positions of red, green and blue; None: hue does not change
    """

    scale: tuple[float, ...]
    offset: tuple[float, ...]
    rgb: tuple[int, int, int] | None

    @classmethod
    def of(cls, bands: Sequence[str], scale: Sequence[float], offset: Sequence[float]) -> "ColorSpace":
        """Find red, green and blue by name; any other three bands are treated as red, green, blue in this order."""
        named = all(name in bands for name in ("red", "green", "blue"))
        rgb = (bands.index("red"), bands.index("green"), bands.index("blue")) if named else (0, 1, 2)
        return cls(tuple(scale), tuple(offset), rgb if named or len(bands) == 3 else None)

    def gray_weights(self) -> NDArray[np.float64]:
        """Per band: the luma of red, green and blue, or the mean of all."""
        count = len(self.scale)
        if self.rgb is None:
            return np.full(count, 1 / count)
        weights = np.zeros(count)
        weights[list(self.rgb)] = _LUMA
        return weights

    def affine(self, factor: float, shift: float) -> Matrix:
        """Every band times `factor` plus `shift`."""
        matrix = np.eye(len(self.scale) + 1) * factor
        matrix[:-1, -1], matrix[-1, -1] = shift, 1
        return matrix

    def saturation(self, factor: float) -> Matrix:
        """Saturation: 0 gives grey, 1 is the identity."""
        matrix = self.affine(factor, 0)
        matrix[:-1, :-1] += (1 - factor) * self.gray_weights()
        return matrix

    def hue(self, turn: float) -> Matrix:
        """Hue rotation about the grey axis at constant luma; `turn` 1 is a full circle."""
        matrix = self.affine(1, 0)
        if self.rgb is not None:
            cos, sin = np.cos(2 * np.pi * turn), np.sin(2 * np.pi * turn)
            rotation = np.array([(1, 0, 0), (0, cos, -sin), (0, sin, cos)])
            matrix[np.ix_(self.rgb, self.rgb)] = np.linalg.inv(_YIQ) @ rotation @ _YIQ
        return matrix

    def apply(self, image: NDArray[Any], matrix: Matrix) -> NDArray[Any]:
        """Map `(h, w, bands)`; integer types are rounded and saturated."""
        scale, offset = np.array(self.scale), np.array(self.offset)
        in_pixels = np.empty((len(scale), len(scale) + 1))
        in_pixels[:, :-1] = matrix[:-1, :-1] * scale / scale[:, None]
        in_pixels[:, -1] = (matrix[:-1, :-1] @ offset + matrix[:-1, -1] - offset) / scale
        mapped: NDArray[Any] = cv2.transform(image, in_pixels.astype(np.float32))
        return mapped.reshape(image.shape)


def draw_fast_distortion(rng: np.random.Generator, space: ColorSpace) -> Matrix:
    """Draw the published distortion as one affine map: brightness, contrast, saturation, hue."""
    coins = rng.integers(0, 2, 4)
    brightness, hue = rng.uniform(-32 / 255, 32 / 255), rng.uniform(-0.1, 0.1)
    contrast, saturation = rng.uniform(0.5, 1.5, 2)
    steps = (
        space.affine(1, brightness),
        space.affine(contrast, 0),
        space.saturation(saturation),
        space.hue(hue),
    )
    matrix = space.affine(1, 0)
    for coin, step in zip(coins, steps, strict=True):
        matrix = step @ matrix if coin else matrix
    return matrix


def strong_view(
    rng: np.random.Generator, image: NDArray[Any], valid: NDArray[np.bool_], space: ColorSpace, config: StrongConfig
) -> NDArray[Any]:
    """Colour jitter, grey and blur of a crop `(h, w, bands)`; same geometry and type.

    The colour steps form one affine map: values are clipped once, at the end, and hue is a rotation at constant luma
    instead of a shift in HSV.
    """
    matrix = space.affine(1, 0)
    if rng.random() < config.jitter_probability:
        thin = slice(None, None, _MEAN_STRIDE)
        pixels = image[thin, thin][valid[thin, thin]]
        mean = pixels.mean(axis=0) if len(pixels) else np.zeros(image.shape[2])
        matrix = draw_jitter(rng, mean * space.scale + space.offset, space, config)
    if rng.random() < config.gray_probability:
        matrix = space.saturation(0) @ matrix
    view = space.apply(image, matrix)
    if rng.random() < config.blur_probability:
        sigma = rng.uniform(*config.blur_sigma)
        view = cv2.GaussianBlur(view, (0, 0), sigma).reshape(image.shape)
    return view


def draw_jitter(rng: np.random.Generator, mean: NDArray[np.float64], space: ColorSpace, config: StrongConfig) -> Matrix:
    """Brightness, contrast, saturation and hue in random order.

    Args:
        rng: randomness.
        mean: per band, mean of the crop in scaled units; contrast preserves its grey value.
        space: the bands.
        config: strengths; factors are drawn from `1 - strength` (at least 0) to `1 + strength`.
    """
    strengths = np.array([config.brightness, config.contrast, config.saturation])
    brightness, contrast, saturation = rng.uniform(np.maximum(0, 1 - strengths), 1 + strengths)
    turn = rng.uniform(-config.hue, config.hue)
    matrix = space.affine(1, 0)
    for step in rng.permutation(4):
        if step == 0:
            matrix = space.affine(brightness, 0) @ matrix
        elif step == 1:
            gray = float(space.gray_weights() @ (matrix @ [*mean, 1])[:-1])
            matrix = space.affine(contrast, (1 - contrast) * gray) @ matrix
        elif step == 2:
            matrix = space.saturation(saturation) @ matrix
        else:
            matrix = space.hue(turn) @ matrix
    return matrix


def box_size(area: float, aspect: float, crop: int) -> tuple[int, int]:
    """Rows and columns of a box that covers `area` of a square crop and is `aspect` times as high as wide."""
    pixels = area * crop * crop
    return int(np.sqrt(pixels * aspect)), int(np.sqrt(pixels / aspect))


def draw_box(rng: np.random.Generator, crop: int, config: StrongConfig) -> Window | None:
    """Draw a CutMix box inside a square crop: the area once, shape and position until it fits. None: no box."""
    if rng.random() >= config.cutmix_probability:
        return None
    area = rng.uniform(*config.cutmix_area)
    for _ in range(_BOX_TRIES):
        height, width = box_size(area, rng.uniform(*config.cutmix_aspect), crop)
        col, row = (int(i) for i in rng.integers(0, crop, 2))
        if row + height <= crop and col + width <= crop:
            return Window(row, col, height, width)
    return None


def box_mask(box: Window | None, crop: int) -> NDArray[np.bool_]:
    """bool `(crop, crop)`, True inside the box."""
    mask = np.zeros((crop, crop), np.bool_)
    if box is not None:
        mask[box.within()] = True
    return mask
