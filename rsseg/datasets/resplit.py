"""Divides a prepared dataset anew, by scene or by block of ground."""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

from rsseg.data.index import IndexItem, SegmentationIndex
from rsseg.datasets.opening import open_image
from rsseg.datasets.splits import draw, scene_of
from rsseg.errors import DataError, UsageError

UNUSED = "unused"
"""Split of tiles that reach into a block of another split."""

Block = tuple[str, int, int]
"""Scene or coordinate system, and row and column of the block."""


class _Place(NamedTuple):
    area: str
    row: int
    col: int
    height: int
    width: int


def resplit(
    index: SegmentationIndex,
    shares: Mapping[str, float],
    *,
    by: Literal["scene", "block"] = "scene",
    block: int | None = None,
    seed: int = 0,
) -> SegmentationIndex:
    """The dataset with its labeled images divided in another way; images without masks keep their split.

    Args:
        index: prepared dataset.
        shares: split -> share; they add up to 1. Each domain is divided alike.
        by: `scene` keeps images of a scene together. `block` keeps tiles of a square of `block` pixels together, and
            leaves out tiles that reach into a square of another split.
        block: side in pixels; at least the tiles'.
        seed: decides the order.

    Raises:
        UsageError: shares or block that make no sense.
        DataError: too few scenes or blocks, or tiles of which nobody knows where they lie.
    """
    if any(share <= 0 for share in shares.values()) or not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
        raise UsageError(f"the shares must be positive and add up to 1, these add up to {sum(shares.values()):g}.")
    if (by == "block") != (block is not None):
        raise UsageError("--block goes with --by block, and gives the side of the blocks in pixels.")
    labeled = [item for item in index.items if item.mask is not None]
    split_of: dict[str, str] = {}
    for domain in sorted({item.domain or "" for item in labeled}):
        group = [item for item in labeled if (item.domain or "") == domain]
        if block is None:
            drawn = draw(sorted({scene_of(item) for item in group}), shares, seed)
            split_of |= {item.image: drawn[scene_of(item)] for item in group}
        else:
            split_of |= _by_block(index, group, shares, block, seed)
    items = tuple(item.model_copy(update={"split": split_of.get(item.image, item.split)}) for item in index.items)
    rule = f"{by}, seed {seed}" if block is None else f"blocks of {block} pixels, seed {seed}"
    # blocks of one scene are in several splits on purpose
    return index.model_copy(update={"items": items, "split_rule": rule, "mixes_scenes": by == "block"})


def _by_block(
    index: SegmentationIndex, items: list[IndexItem], shares: Mapping[str, float], block: int, seed: int
) -> dict[str, str]:
    places = {item.image: _place(index, item) for item in items}
    blocks = {image: (place.area, place.row // block, place.col // block) for image, place in places.items()}
    for image, place in places.items():
        if max(place.height, place.width) > block:
            raise UsageError(f"--block {block}: {image} is larger, {place.height} x {place.width} pixels.")
    names = {_name(key): key for key in sorted(set(blocks.values()))}
    drawn = {names[name]: split for name, split in draw(sorted(names), shares, seed).items()}
    result = {}
    for image, place in places.items():
        reached = {
            (place.area, row // block, col // block)
            for row in (place.row, place.row + place.height - 1)
            for col in (place.col, place.col + place.width - 1)
        }
        splits = {drawn[key] for key in reached if key in drawn}
        result[image] = drawn[blocks[image]] if len(splits) == 1 else UNUSED
    return result


def _name(block: Block) -> str:
    return f"{block[0]} {block[1]} {block[2]}"


def _place(index: SegmentationIndex, item: IndexItem) -> _Place:
    """Where an image lies, in pixels of its scene or of its coordinate system; raises `DataError` if unknown."""
    with open_image(index.image_files(item), index.task.bands) as raster:
        info = raster.info
    if item.origin is not None:
        return _Place(scene_of(item), *item.origin, info.height, info.width)
    if info.crs is None:
        raise DataError(
            f"{item.image}: neither cut from a scene nor with coordinates, so its neighbours are not known. "
            "Divide with --by scene, or cut the scenes with `rsseg dataset prepare --tile`."
        )
    transform = info.transform
    row, col = round(transform.f / transform.e), round(transform.c / transform.a)
    return _Place(str(info.crs), row, col, info.height, info.width)
