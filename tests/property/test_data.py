"""Laws of sampling, selection, crop geometry and label maps."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rsseg.config import AugmentConfig, SelectConfig
from rsseg.data.assembly import Order, permutation, positions
from rsseg.data.augmentation import draw_geometry, draw_scaled_size, draw_window, transform_mask
from rsseg.data.index import IndexItem, LabelMap, SegmentationIndex
from rsseg.data.labels import LabelTable
from rsseg.data.sources import select_items
from tests.conftest import rgb_task

seeds = st.integers(0, 2**31 - 1)


@given(seed=seeds, count=st.integers(1, 40), start=st.integers(0, 200))
def test_order_is_the_permutation_of_its_epoch_from_any_start(seed: int, count: int, start: int) -> None:
    order = Order(seed, "labeled", count)
    for k in range(start, start + 2 * count):
        assert order.draw(k)[0] == permutation(seed, "labeled", k // count, count)[k % count]
    epoch = -(-start // count)
    assert sorted(order.draw(k)[0] for k in range(epoch * count, (epoch + 1) * count)) == list(range(count))


@given(micro=st.integers(0, 9), batch=st.integers(1, 6), world=st.integers(1, 4))
def test_ranks_cover_each_position_once(micro: int, batch: int, world: int) -> None:
    shares = [positions(micro, batch_size=batch, rank=rank, world_size=world) for rank in range(world)]
    assert all(len(share) == batch for share in shares)
    start = micro * batch * world
    assert sorted(p for share in shares for p in share) == list(range(start, start + batch * world))


@given(
    seed=seeds,
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    crop=st.integers(1, 128),
    low=st.floats(0.1, 2),
    span=st.floats(0, 2),
    style=st.sampled_from(["uniform", "long_side"]),
    fit=st.sampled_from(["crop", "squeeze"]),
)
def test_crops_lie_inside_the_image_and_fit_the_frame(
    seed: int, size: tuple[int, int], crop: int, low: float, span: float, style: str, fit: str
) -> None:
    config = AugmentConfig.model_validate(
        {"crop_size": crop, "scale_range": (low, low + span), "scale_style": style, "fit": fit, "rot90": 0.5}
    )
    rng = np.random.default_rng(seed)
    scaled = draw_scaled_size(rng, size, config)
    window, out = draw_window(rng, size, scaled, crop)
    assert window.row >= 0 <= window.col
    assert window.row + window.height <= size[0]
    assert window.col + window.width <= size[1]
    assert min(window.height, window.width) >= 1
    assert min(out) >= 1
    assert max(out) <= crop
    assert all(side in (crop, whole) for side, whole in zip(out, scaled, strict=True))
    geometry = draw_geometry(rng, window, out, config)
    moved = transform_mask(np.ones((window.height, window.width), np.bool_), geometry)
    assert sorted(moved.shape) == sorted(out)
    assert moved.all()


@given(
    seed=seeds,
    present=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=4, max_size=12),
    extra=st.integers(0, 8),
)
def test_share_shows_every_class_when_it_has_as_many_images_as_classes(
    seed: int, present: list[list[bool]], extra: int
) -> None:
    items = tuple(
        IndexItem(image=f"{i}.png", split="train", classes=tuple(int(p) for p in row)) for i, row in enumerate(present)
    )
    index = SegmentationIndex(task=rgb_task(), label_map=LabelMap(values={0: 0}), items=items)
    count = min(4 + extra, len(items))
    chosen = select_items(index, SelectConfig(count=count), split="train", seed=seed)
    assert len(chosen) == count
    shown = [any(item.classes[k] for item in chosen if item.classes) for k in range(4)]
    assert shown == [any(row[k] for row in present) for k in range(4)]


@given(
    table=st.dictionaries(st.integers(-300, 60000), st.sampled_from([0, 1, 2, 255]), min_size=1, max_size=12),
    data=st.data(),
)
def test_label_map_is_applied_pixel_by_pixel(table: dict[int, int], data: st.DataObject) -> None:
    values = data.draw(st.lists(st.sampled_from(sorted(table)), min_size=1, max_size=30))
    stored = np.array(values, np.int32)[None, None]
    indices = LabelTable(LabelMap(values=table), 3).indices(stored, None, name="m")
    assert indices.tolist() == [[table[v] for v in values]]
