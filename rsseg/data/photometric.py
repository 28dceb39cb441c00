"""Colour changes: the published 8-bit distortion, and affine colour maps of any bands in one pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
"""(bands + 1, bands + 1), acts on (band values in scaled units, 1)."""

_LUMA = (0.299, 0.587, 0.114)
_YIQ = np.array([_LUMA, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)])


@dataclass(frozen=True)
class PhotometricDraws:
    """Random choices of the published distortion; None leaves a step out.

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
    """Published ranges, each step with probability one half."""
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
    """What colour changes need to know about the bands.

    scale, offset  per band: scaled units = pixel * scale + offset
    rgb            positions of red, green and blue; None if there are none, then hue does not change
    """

    scale: tuple[float, ...]
    offset: tuple[float, ...]
    rgb: tuple[int, int, int] | None

    @classmethod
    def of(cls, bands: Sequence[str], scale: Sequence[float], offset: Sequence[float]) -> "ColorSpace":
        """Red, green and blue are found by name; any three bands are shown as such and count as them."""
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
        """0 is grey, 1 changes nothing."""
        matrix = self.affine(factor, 0)
        matrix[:-1, :-1] += (1 - factor) * self.gray_weights()
        return matrix

    def hue(self, turn: float) -> Matrix:
        """Turn about the grey axis at constant luma; `turn` 1 is the full circle."""
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
    """Strengths of the published distortion as one affine map: brightness, contrast, saturation, hue."""
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
