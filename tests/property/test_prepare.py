"""Laws of cutting, measuring and drawing splits."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rsseg.datasets.measure import Moments, _moments
from rsseg.datasets.prepare.tiles import Grid


@given(height=st.integers(1, 90), width=st.integers(1, 90), tile=st.integers(1, 40), data=st.data())
@settings(max_examples=60, deadline=None)
def test_tiles_cover_every_pixel_and_stay_inside(height: int, width: int, tile: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, tile))
    seen = np.zeros((height, width), np.int64)
    for window in Grid(tile, stride).windows(height, width):
        part = seen[window.row : window.row + window.height, window.col : window.col + window.width]
        assert part.shape == (min(tile, height), min(tile, width))
        part += 1
    assert seen.min() >= 1


@given(
    values=st.lists(st.integers(0, 65535), min_size=1, max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_moments_of_parts_join_to_the_moments_of_the_whole(values: list[int], cuts: list[int]) -> None:
    array = np.array([values, values[::-1]], np.uint16)
    parts = [_moments(part, 0) for part in np.split(array, sorted(min(c, len(values)) for c in cuts), axis=1)]
    total = parts[0]
    for part in parts[1:]:
        total = Moments.joined(total, part)
    assert total.pixels == len(values)
    np.testing.assert_allclose(total.mean(), array.mean(1))
    np.testing.assert_allclose(total.std(), array.std(1), atol=1e-6)
    np.testing.assert_array_equal(total.low, array.min(1))
    np.testing.assert_array_equal(total.high, array.max(1))
