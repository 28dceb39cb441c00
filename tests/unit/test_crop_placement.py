"""Crops cut from the scaled whole image, and padding before mirroring and turning."""

import numpy as np
import PIL.Image
import pytest

from rsseg.config import AugmentConfig
from rsseg.data.augmentation import Cut, Geometry, draw_cut, pad_origin, transform_image, transform_mask
from rsseg.raster import Window

CROP = 9


@pytest.mark.parametrize(("hflip", "vflip", "turns"), [(h, v, t) for h in (0, 1) for v in (0, 1) for t in range(4)])
def test_padding_first_equals_transforming_the_padded_square(hflip: bool, vflip: bool, turns: int) -> None:
    pixels = np.random.default_rng(0).integers(1, 255, (5, 7, 2)).astype(np.uint8)
    geometry = Geometry(Window(0, 0, 5, 7), (5, 7), bool(hflip), bool(vflip), turns)
    square = np.zeros((CROP, CROP, 2), np.uint8)
    square[:5, :7] = pixels
    whole = transform_image(square, Geometry(Window(0, 0, CROP, CROP), (CROP, CROP), bool(hflip), bool(vflip), turns))
    crop = transform_image(pixels, geometry)
    placed = np.zeros_like(square)
    top, left = pad_origin(geometry, CROP)
    placed[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
    np.testing.assert_array_equal(placed, whole)


def test_cut_is_pillows_whole_image_in_every_pixel_type() -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (12, 10, 5)).astype(np.uint8)
    cut = Cut((7, 6), (2, 1))
    geometry = Geometry(Window(0, 0, 12, 10), (4, 5), hflip=False, vflip=False, turns=0, cut=cut)
    band = np.asarray(PIL.Image.fromarray(pixels[..., 4]).resize((6, 7), PIL.Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(transform_image(pixels, geometry)[..., 4], band[2:6, 1:6])
    wide = transform_image(pixels.astype(np.uint16) * 200, geometry)
    assert wide.dtype == np.uint16
    np.testing.assert_allclose(wide[..., 4] / 200, band[2:6, 1:6], atol=1)
    assert transform_image(pixels.astype(np.float32), geometry).dtype == np.float32
    valid = transform_mask(np.ones((12, 10), np.bool_), geometry)
    assert valid.shape == (4, 5)
    assert valid.all()


def test_drawn_cuts_lie_in_the_scaled_image() -> None:
    rng = np.random.default_rng(2)
    config = AugmentConfig(crop_size=CROP)
    places = {draw_cut(rng, (20, 5), config.crop_size) for _ in range(200)}
    assert {out for _, out in places} == {(9, 5)}
    assert {cut.origin[0] for cut, _ in places} == set(range(12))
    assert {cut.origin[1] for cut, _ in places} == {0}
