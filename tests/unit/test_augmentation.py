"""Geometry, colour and strong views of a crop."""

import cv2
import numpy as np
import pytest

from rsseg.config import AugmentConfig, StrongConfig
from rsseg.data.augmentation import (
    ColorSpace,
    Geometry,
    PhotometricDraws,
    box_mask,
    box_size,
    draw_box,
    draw_fast_distortion,
    draw_jitter,
    draw_photometric,
    draw_scaled_size,
    draw_window,
    one_class_dominates,
    photometric_distortion,
    strong_view,
    transform_image,
    transform_mask,
)
from rsseg.raster import Window

RGB = ColorSpace.of(("red", "green", "blue"), (1 / 255,) * 3, (0.0,) * 3)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_unscaled_window_is_the_crop_itself() -> None:
    window, size = draw_window(rng(), (100, 80), (100, 80), 64)
    assert (window.height, window.width) == size == (64, 64)


def test_half_scale_reads_twice_the_crop_and_small_images_are_read_whole() -> None:
    window, size = draw_window(rng(), (400, 300), (200, 150), 64)
    assert (window.height, window.width) == (128, 128)
    assert size == (64, 64)
    window, size = draw_window(rng(), (40, 300), (20, 150), 64)
    assert (window.row, window.height, size) == (0, 40, (20, 64))


def test_scale_styles() -> None:
    uniform = AugmentConfig(scale_range=(0.5, 2.0))
    long_side = AugmentConfig(scale_range=(0.5, 2.0), scale_style="long_side")
    sizes = [draw_scaled_size(rng(i), (50, 100), long_side) for i in range(300)]
    assert 50 <= min(width for _, width in sizes) < 60 < 190 < max(width for _, width in sizes) <= 200
    assert all(height == int(50 * width / 100 + 0.5) for height, width in sizes)
    assert all(25 <= draw_scaled_size(rng(i), (50, 100), uniform)[0] <= 100 for i in range(50))
    assert draw_scaled_size(rng(), (50, 100), AugmentConfig(crop_size=32, fit="squeeze")) == (32, 32)
    assert draw_scaled_size(rng(), (50, 100), AugmentConfig()) == (50, 100)


@pytest.mark.parametrize("bands", [1, 3, 8])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_image_and_mask_move_together(bands: int, dtype: str) -> None:
    mask = rng().integers(0, 3, (20, 31), dtype=np.uint8).repeat(2, 0).repeat(2, 1)
    image = (mask[..., None] * np.arange(1, bands + 1)).astype(dtype)
    geometry = Geometry(Window(0, 0, 40, 62), (20, 31), hflip=True, vflip=False, turns=1)
    moved, labels = transform_image(image, geometry), transform_mask(mask, geometry)
    assert moved.shape == (31, 20, bands)
    assert moved.dtype == image.dtype
    assert moved.flags.c_contiguous
    np.testing.assert_array_equal(moved[..., 0], labels)
    np.testing.assert_array_equal(labels, np.rot90(mask[::2, ::2][:, ::-1]))


def test_transform_keeps_bool_masks_bool() -> None:
    geometry = Geometry(Window(0, 0, 4, 4), (4, 4), hflip=False, vflip=True, turns=0)
    assert transform_mask(np.eye(4, dtype=bool), geometry).dtype == np.bool_


def test_dominating_class_counts_labeled_pixels_only() -> None:
    mask = np.full((10, 10), 255, np.uint8)
    assert one_class_dominates(mask, 0.75)
    mask[0, :4], mask[1, :4] = 0, 1
    assert not one_class_dominates(mask, 0.75)
    mask[2:] = 1
    assert one_class_dominates(mask, 0.75)


def test_published_distortion_without_draws_changes_nothing() -> None:
    image = rng().integers(0, 256, (9, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(photometric_distortion(image, PhotometricDraws()), image)


def test_published_draws_have_the_published_ranges() -> None:
    draws = [draw_photometric(rng(i)) for i in range(400)]
    hues = [d.hue for d in draws if d.hue is not None]
    assert (min(hues), max(hues)) == (-18, 17)
    assert 0.4 < np.mean([d.brightness is None for d in draws]) < 0.6
    assert all(0.5 <= d.contrast <= 1.5 for d in draws if d.contrast is not None)
    assert 0.4 < np.mean([d.contrast_first for d in draws]) < 0.6


def test_colour_maps_keep_grey_and_luma() -> None:
    gray = np.full((4, 4, 3), 100, np.uint8)
    color = rng().integers(60, 180, (4, 4, 3), dtype=np.uint8)
    for matrix in (RGB.hue(0.2), RGB.saturation(0.3)):
        np.testing.assert_array_equal(RGB.apply(gray, matrix), gray)
        luma = RGB.apply(color, matrix) @ RGB.gray_weights()
        np.testing.assert_allclose(luma, color @ RGB.gray_weights(), atol=1)
    assert np.ptp(RGB.apply(color, RGB.saturation(0)), axis=2).max() == 0


def test_colour_map_acts_on_scaled_units_whatever_the_pixel_type() -> None:
    scaled = rng().uniform(0.2, 0.6, (5, 5, 4))
    matrix = draw_fast_distortion(rng(3), ColorSpace.of(("a", "b", "c", "d"), (1.0,) * 4, (0.0,) * 4))
    expected = (np.concatenate([scaled, np.ones((5, 5, 1))], 2) @ matrix.T)[..., :4]
    space = ColorSpace.of(("a", "b", "c", "d"), (2e-5,) * 4, (-0.1,) * 4)
    pixels = ((scaled + 0.1) / 2e-5).round().astype(np.uint16)
    np.testing.assert_allclose(space.apply(pixels, matrix) * 2e-5 - 0.1, expected, atol=1e-4)


def test_hue_shift_of_half_a_turn_resembles_opencv() -> None:
    image = rng().integers(100, 150, (50, 50, 3), dtype=np.uint8)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(int) + 90) % 180
    expected = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).astype(float)
    ours = RGB.apply(image, RGB.hue(0.5)).astype(float)
    centered = [(x - x.mean(2, keepdims=True)).ravel() for x in (ours, expected)]
    assert np.corrcoef(*centered)[0, 1] > 0.9


def test_contrast_turns_about_the_mean_grey() -> None:
    config = StrongConfig(brightness=0, contrast=0.5, saturation=0, hue=0)
    mean = np.array([0.4, 0.5, 0.3])
    matrix = draw_jitter(rng(1), mean, RGB, config)
    gray = RGB.gray_weights() @ mean
    assert RGB.gray_weights() @ (matrix @ [*mean, 1])[:3] == pytest.approx(gray)
    assert not np.allclose(matrix, np.eye(4))


def test_strong_view_keeps_shape_type_and_is_off_when_told() -> None:
    image, valid = rng().integers(0, 256, (20, 24, 3), dtype=np.uint8), np.ones((20, 24), bool)
    view = strong_view(rng(2), image, valid, RGB, StrongConfig())
    assert (view.shape, view.dtype) == (image.shape, image.dtype)
    still = StrongConfig(jitter_probability=0, gray_probability=0, blur_probability=0)
    np.testing.assert_array_equal(strong_view(rng(2), image, valid, RGB, still), image)


def test_boxes_lie_inside_and_have_the_published_area() -> None:
    boxes = [draw_box(rng(i), 100, StrongConfig()) for i in range(1000)]
    present = [box for box in boxes if box is not None]
    assert 0.45 < len(present) / len(boxes) < 0.55
    assert 0.19 < np.mean([box.height * box.width / 1e4 for box in present]) < 0.22
    assert all(box.row + box.height <= 100 and box.col + box.width <= 100 for box in present)
    assert box_mask(present[0], 100).sum() == present[0].height * present[0].width
    assert not box_mask(None, 100).any()
    assert box_size(0.25, 1.0, 100) == (50, 50)
    assert draw_box(rng(), 10, StrongConfig(cutmix_probability=1, cutmix_area=(1, 1), cutmix_aspect=(2, 2))) is None


def test_preset_gives_values_and_keys_beside_it_win() -> None:
    strong = AugmentConfig.model_validate({"preset": "strong", "crop_size": 64, "vflip": 0.0})
    assert (strong.scale_range, strong.photometric, strong.rot90) == ((0.5, 2.0), "fast", 0.75)
    assert (strong.crop_size, strong.vflip) == (64, 0.0)
    assert AugmentConfig.model_validate({"preset": "light"}).photometric == "none"
    assert AugmentConfig.model_validate(strong.model_dump(mode="json")) == strong
