"""Grids of published tilings."""

from rsseg.datasets.prepare.tiles import whole_tile_origins


def test_only_whole_tiles_are_cut_and_the_rest_is_dropped() -> None:
    assert whole_tile_origins(6000, 512, 512) == [512 * i for i in range(11)]
    assert whole_tile_origins(1919, 512, 256)[-1] + 512 == 1792
    assert whole_tile_origins(511, 512, 256) == []


def test_larger_steps_are_moved_into_the_scene_once() -> None:
    assert whole_tile_origins(1000, 512, 256, step=512) == [0, 488]
