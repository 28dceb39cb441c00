import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsseg.errors import UsageError
from rsseg.inference.tiling import plan_tiles, tile_origins


@given(length=st.integers(1, 600), tile=st.integers(1, 128), data=st.data())
def test_tiles_cover_the_axis_and_stay_inside(length: int, tile: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, tile))
    origins = tile_origins(length, tile, stride)
    covered = set().union(*(range(o, o + tile) for o in origins))
    assert set(range(length)) <= covered
    assert length <= tile or origins[-1] + tile == length
    assert origins == sorted(set(origins))


@given(length=st.integers(1, 600), tile=st.integers(1, 128), data=st.data())
def test_kept_spans_partition_the_axis_and_are_farthest_from_a_border(
    length: int, tile: int, data: st.DataObject
) -> None:
    axis = plan_tiles(length, 1, tile=tile, overlap=data.draw(st.integers(0, tile - 1))).rows
    assert [p for span in axis.kept for p in range(span.start, span.stop)] == list(range(length))
    pixels = np.arange(length)
    depths = []
    for origin in axis.origins:
        first, last = pixels - origin, origin + axis.tile - 1 - pixels
        inside = (first >= 0) & (last >= 0)
        # The image's own border is no border of a tile.
        first = first + length if origin == 0 else first
        last = last + length if origin + axis.tile == length else last
        depths.append(np.where(inside, np.minimum(first, last), -1))
    best = np.max(depths, axis=0)
    for depth, span in zip(depths, axis.kept, strict=True):
        assert (depth[span.area] >= np.minimum(best[span.area] - 1, length)).all()
        assert (depth[span.area] >= 0).all()


@given(length=st.integers(1, 600), tile=st.integers(1, 128), data=st.data())
def test_final_spans_partition_the_axis(length: int, tile: int, data: st.DataObject) -> None:
    axis = plan_tiles(1, length, tile=tile, overlap=data.draw(st.integers(0, tile - 1))).cols
    spans = [axis.final(i) for i in range(len(axis.origins))]
    assert [p for span in spans for p in range(span.start, span.stop)] == list(range(length))


@pytest.mark.parametrize(
    ("length", "origins"), [(1, [0]), (31, [0]), (32, [0]), (33, [0, 1]), (56, [0, 24]), (57, [0, 24, 25])]
)
def test_last_tile_is_moved_in(length: int, origins: list[int]) -> None:
    assert tile_origins(length, 32, 24) == origins


def test_tile_plan_counts_what_is_computed() -> None:
    plan = plan_tiles(56, 32, tile=32, overlap=8)
    assert (plan.count, plan.redundancy) == (2, 64 / 56)


@pytest.mark.parametrize("overlap", [-1, 32])
def test_overlap_that_does_not_fit_the_tile_is_refused(overlap: int) -> None:
    with pytest.raises(UsageError, match="choose 0 to 31"):
        plan_tiles(64, 64, tile=32, overlap=overlap)


FITTED = {"tile": 1280, "overlap": 128, "multiple": 32, "fitted": True}


@given(length=st.integers(512, 40000))
def test_fitted_tiles_compute_few_pixels_on_the_grid_of_the_network(length: int) -> None:
    axis = plan_tiles(length, 512, **FITTED).rows
    computed = len(axis.origins) * -(-axis.tile // 32) * 32
    assert (computed / length) ** 2 <= 1.35
    assert axis.tile <= 1280
    assert axis.origins[-1] + axis.tile >= length
    if len(axis.origins) > 1:
        strides = set(np.diff(axis.origins))
        assert len(strides) == 1
        assert axis.tile % 32 == strides.copy().pop() % 32 == 0
        assert axis.tile - strides.pop() >= 128
    assert [p for span in axis.kept for p in (span.start, span.stop)][1:-1:2] == [s.stop for s in axis.kept[:-1]]
    assert all(span.length > 0 for span in axis.kept)


def test_fitted_tiles_of_a_square_of_2048() -> None:
    plan = plan_tiles(2048, 2048, **FITTED)
    assert (plan.count, plan.rows.tile, round(plan.redundancy, 2)) == (4, 1088, 1.13)
