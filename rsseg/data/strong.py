"""Strong views of a weak crop, and CutMix boxes."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from rsseg.config import StrongConfig
from rsseg.data.photometric import ColorSpace, Matrix
from rsseg.raster import Window

_BOX_TRIES = 1000
_MEAN_STRIDE = 4
"""Every fourth row and column give the mean brightness of a crop well enough."""


def strong_view(
    rng: np.random.Generator, image: NDArray[Any], valid: NDArray[np.bool_], space: ColorSpace, config: StrongConfig
) -> NDArray[Any]:
    """Colour jitter, grey and blur of a crop `(h, w, bands)`; same geometry and type.

    All colour steps are joined to one affine map, so values are clipped once, at the end, and hue is a rotation at
    constant luma instead of a shift in HSV.
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
        mean: per band, mean of the crop in scaled units; contrast keeps its grey value.
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
    """CutMix box inside a square crop: area drawn once, shape and place until it fits; None for no box."""
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
        mask[box.row : box.row + box.height, box.col : box.col + box.width] = True
    return mask
