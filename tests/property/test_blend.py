from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsseg.inference.blend import (
    CLASSES_ONLY,
    ArrayLogits,
    Blend,
    LogitTile,
    Strip,
    Tile,
    blend_classes,
    blend_logits,
    crop_classes,
    decide_kept,
)
from rsseg.inference.tiling import TilePlan, plan_tiles
from rsseg.inference.torch_network import TensorLogits

BLENDS: tuple[Blend, ...] = ("crop", "hann", "mean")
plans = st.builds(
    lambda height, width, tile, share: plan_tiles(height, width, tile=tile, overlap=int(tile * share)),
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 40),
    st.floats(0, 0.99),
)


def tiles_of(scores: torch.Tensor, plan: TilePlan, valid: np.ndarray | None = None) -> Iterator[LogitTile]:
    """What a network that returns its input would give."""
    for row, top in enumerate(plan.rows.origins):
        for col, left in enumerate(plan.cols.origins):
            area = slice(top, top + plan.rows.tile), slice(left, left + plan.cols.tile)
            part = scores[:, area[0], area[1]]
            yield Tile(row, col, no_image, None if valid is None else valid[area]), part.numpy()


def no_image() -> np.ndarray:
    raise AssertionError("the merge looks at scores only")


def in_array(scores: np.ndarray) -> ArrayLogits:
    return ArrayLogits(scores, scores.shape[1:], scores.shape[1:])


def in_tensor(scores: np.ndarray) -> TensorLogits:
    return TensorLogits.of(torch.from_numpy(scores))


def classes_of(
    tiles: Iterable[LogitTile], plan: TilePlan, blend: Blend, num_classes: int, kept_as: Any = in_array
) -> list[Strip]:
    if blend != "crop":
        return list(blend_classes(tiles, plan, blend, num_classes))
    decide = decide_kept([plan])
    decided = ((tile, None if scores is None else decide(tile, kept_as(scores))) for tile, scores in tiles)
    return list(crop_classes(decided, plan, num_classes, CLASSES_ONLY))


@given(plan=plans, blend=st.sampled_from(BLENDS))
@settings(deadline=None)
def test_identity_network_reproduces_the_image(plan: TilePlan, blend: Blend) -> None:
    image = torch.rand(2, plan.rows.length, plan.cols.length, generator=torch.Generator().manual_seed(0))
    strips = list(blend_logits(tiles_of(image, plan), plan, blend, 2))
    np.testing.assert_allclose(np.concatenate([s.logits for s in strips], axis=1), image.numpy(), atol=1e-5, rtol=1e-5)
    tops = np.cumsum([0, *(s.logits.shape[1] for s in strips)])
    assert [s.top for s in strips] == list(tops[:-1])
    assert tops[-1] == plan.rows.length


@given(plan=plans, blend=st.sampled_from(BLENDS), kept_as=st.sampled_from((in_array, in_tensor)))
@settings(deadline=None)
def test_classes_and_valid_area_come_out_where_they_were(plan: TilePlan, blend: Blend, kept_as: Any) -> None:
    draw = np.random.default_rng(0)
    classes = draw.integers(0, 3, (plan.rows.length, plan.cols.length))
    valid = draw.random(classes.shape) < 0.7
    scores = torch.nn.functional.one_hot(torch.from_numpy(classes), 3).permute(2, 0, 1).float()
    strips = classes_of(tiles_of(scores, plan, valid), plan, blend, 3, kept_as)
    np.testing.assert_array_equal(np.concatenate([s.classes for s in strips]), classes)
    np.testing.assert_array_equal(np.concatenate([s.valid for s in strips]), valid)
    assert [s.top for s in strips] == [0, *np.cumsum([len(s.classes) for s in strips])[:-1]]


def test_mean_averages_overlapping_tiles_plainly() -> None:
    plan = plan_tiles(1, 3, tile=2, overlap=1)
    tiles = [(Tile(0, i, no_image), np.full((1, 1, 2), float(i), np.float32)) for i in range(2)]
    (strip,) = blend_logits(tiles, plan, "mean", 1)
    assert strip.logits.flatten().tolist() == [0, 0.5, 1]


@pytest.mark.parametrize("blend", BLENDS)
def test_empty_tiles_leave_the_others_as_they_are(blend: Blend) -> None:
    plan = plan_tiles(8, 16, tile=8, overlap=0)
    tiles: list[LogitTile] = [
        (Tile(0, 0, no_image, np.zeros((8, 8), np.bool_)), None),
        (Tile(0, 1, no_image), np.stack([np.zeros((8, 8), np.float32), np.ones((8, 8), np.float32)])),
    ]
    (strip,) = classes_of(tiles, plan, blend, 2)
    assert (strip.classes[:, 8:] == 1).all()
    assert not strip.valid[:, :8].any()
    assert strip.valid[:, 8:].all()
