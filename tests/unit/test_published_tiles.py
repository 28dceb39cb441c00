"""Grids, names and colours of published tilings."""

import numpy as np

from rsseg.data.prepare.colors import GID, ISPRS, values_of_colors
from rsseg.data.prepare.tiles import potsdam_scene, tile_name, vaihingen_scene, whole_tile_origins


def test_only_whole_tiles_are_cut_and_the_rest_is_dropped() -> None:
    assert whole_tile_origins(6000, 512, 512) == [512 * i for i in range(11)]
    assert whole_tile_origins(1919, 512, 256)[-1] + 512 == 1792
    assert whole_tile_origins(511, 512, 256) == []


def test_larger_steps_are_moved_into_the_scene_once() -> None:
    assert whole_tile_origins(1000, 512, 256, step=512) == [0, 488]


def test_tiles_are_named_after_scene_and_box() -> None:
    assert tile_name(potsdam_scene("top_potsdam_2_10_RGBIR.tif"), (0, 512, 512, 1024)) == "2_10_0_512_512_1024.png"
    assert vaihingen_scene("top_mosaic_09cm_area38.tif") == "area38"


def test_unknown_colours_get_the_value_of_borders() -> None:
    image = np.array([[[255, 0], [12, 255]], [[255, 255], [34, 0]], [[255, 255], [56, 0]]], np.uint8)
    assert values_of_colors(image, ISPRS).tolist() == [[1, 3], [0, 6]]
    assert values_of_colors(image, GID, unknown=9).tolist() == [[9, 3], [9, 1]]
