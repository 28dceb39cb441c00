"""Split rules of published datasets, and new splits of a prepared one by scene or by spatial block."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from rsseg.data.index import IndexItem, SegmentationIndex
from rsseg.datasets.measure import open_image
from rsseg.datasets.prepare.tiles import Grid
from rsseg.errors import DataError, UsageError

Assign = Callable[[Sequence[IndexItem], int], Sequence[IndexItem]]
"""(items, seed) -> the items that belong to a split, with their split set, in the same order."""
RATIO = {"train": 0.6, "val": 0.2, "test": 0.2}
"""Default shares of the splits."""
SHARES = (0.01, 0.05, 0.1)
"""Label fractions of the published semi-supervised experiments."""
TRAIN = "train"
UNUSED = "unused"
"""Split of tiles that overlap blocks of two splits."""


@dataclass(frozen=True)
class SplitRule:
    """One way to split a dataset."""

    name: str
    title: str
    assign: Assign
    splits: tuple[str, ...] = ("train", "val", "test")
    """Splits that must not be empty."""
    tiles: bool = False
    """Assigns single tiles, after cutting; otherwise whole images, so that all tiles of an image share its split."""
    grid: Grid | None = None
    """Published tile grid."""
    pad_label: int = 255
    """Class index of padding."""
    ignore_unknown: bool = False
    """Map undeclared mask colours to `unknown_label`, as the published scripts do; otherwise they are an error."""
    unknown_label: int = 255
    """Class index of undeclared colours."""
    label_shares: tuple[float, ...] = ()
    """Write nested lists of labeled training images for these shares."""


def as_found(items: Sequence[IndexItem], seed: int) -> Sequence[IndexItem]:  # noqa: ARG001 - an `Assign`
    """The splits that the folders name."""
    return items


def by_scene(scenes: Mapping[str, Sequence[str]]) -> Assign:
    """Split -> its scenes; images of other scenes are left out."""
    split_of = {scene: split for split, names in scenes.items() for scene in names}

    def assign(items: Sequence[IndexItem], seed: int) -> Sequence[IndexItem]:  # noqa: ARG001 - an `Assign`
        return [_in_split(item, split_of[scene_of(item)]) for item in items if scene_of(item) in split_of]

    return assign


def drawn_by_scene(shares: Mapping[str, float]) -> Assign:
    """Random shares of the scenes of each domain; only images of the split `train` are redistributed."""

    def assign(items: Sequence[IndexItem], seed: int) -> Sequence[IndexItem]:
        split_of = _per_domain([item for item in items if item.split == "train"], shares, seed)
        return [_in_split(item, split_of[item.image]) if item.split == "train" else item for item in items]

    return assign


def drawn_tiles(shares: Mapping[str, float], *, per_domain: bool = False) -> Assign:
    """Random shares of all tiles, regardless of their scene; each share but the last is rounded down.

    The published lists were shuffled without a known seed: their counts are reproduced, not their members.
    """

    def assign(items: Sequence[IndexItem], seed: int) -> Sequence[IndexItem]:
        split_of: dict[str, str] = {}
        for group in _domains(items) if per_domain else [items]:
            split_of |= draw([item.image for item in group], shares, seed, whole=math.floor)
        return [_in_split(item, split_of[item.image]) for item in items]

    return assign


def halved_val(items: Sequence[IndexItem], seed: int) -> Sequence[IndexItem]:
    """The official validation part shuffled and halved into val and test; the official test part has no masks."""
    names = [item.image for item in items if item.split == "val"]
    split_of = draw(names, {"val": 0.5, "test": 0.5}, seed, whole=math.floor)
    return [
        _in_split(item, split_of[item.image]) if item.split == "val" else item for item in items if item.split != "test"
    ]


def draw(
    names: Sequence[str], shares: Mapping[str, float], seed: int, *, whole: Callable[[float], int] = round
) -> dict[str, str]:
    """Split of each name, in a random order that depends on names and seed alone; none is empty if there are enough.

    Args:
        names: images, tiles or scenes.
        shares: split -> share; they add up to 1, and the last split takes the remainder.
        seed: seed of the order.
        whole: rounds `share * len(names)`.

    Raises:
        DataError: fewer names than splits.
    """
    if len(names) < len(shares):
        raise DataError(
            f"{len(names)} images (or scenes) cannot fill the {len(shares)} splits {', '.join(shares)}. "
            "Give more images, or fewer splits."
        )
    order = sorted(names)
    random.Random(seed).shuffle(order)
    # the small term guards against 0.7 * 22500 = 15749.999999999998
    counts = [whole(share * len(order) + 1e-6) for share in shares.values()]
    counts[-1] = len(order) - sum(counts[:-1])
    while min(counts) < 1:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(min(counts))] += 1
    splits = [split for split, count in zip(shares, counts, strict=True) for _ in range(count)]
    return dict(zip(order, splits, strict=True))


def ratio_rule(shares: Mapping[str, float]) -> SplitRule:
    """Rule that splits the labeled images of any dataset by scene; images without masks keep their split."""
    check_shares("--split-ratio", shares)

    def assign(items: Sequence[IndexItem], seed: int) -> Sequence[IndexItem]:
        split_of = _per_domain([item for item in items if item.mask is not None], shares, seed)
        return [_in_split(item, split_of.get(item.image, item.split)) for item in items]

    title = ", ".join(f"{split} {share:g}" for split, share in shares.items())
    return SplitRule("ratio", title, assign, tuple(shares))


def check_shares(option: str, shares: Mapping[str, float]) -> None:
    """Raise `UsageError` unless the shares are positive and add up to 1."""
    total = sum(shares.values())
    if any(share <= 0 for share in shares.values()) or not math.isclose(total, 1, abs_tol=1e-6):
        raise UsageError(f"{option}: the shares must be positive and add up to 1, these add up to {total:g}.")


def labeled_lists(items: Sequence[IndexItem], shares: Sequence[float], seed: int) -> dict[float, list[str]]:
    """Share -> training images that keep their labels: the first int(share x n) of each domain in random order.

    The lists of smaller shares are contained in those of larger ones.
    """
    lists: dict[float, list[str]] = {share: [] for share in shares}
    train = [item for item in items if item.split == "train" and item.mask is not None]
    for group in _domains(train):
        order = sorted(item.image for item in group)
        random.Random(f"{seed} {group[0].domain or ''}").shuffle(order)
        for share in shares:
            lists[share] += order[: int(share * len(order) + 1e-6)]
    return lists


def scene_of(item: IndexItem) -> str:
    """Name of the scene that must stay in one split; an image without a scene is its own."""
    return item.scene or item.image


def resplit(
    index: SegmentationIndex,
    shares: Mapping[str, float],
    *,
    by: Literal["scene", "block"] = "scene",
    block: int | None = None,
    seed: int = 0,
) -> SegmentationIndex:
    """Split the labeled images of a prepared dataset again; images without masks keep their split.

    Args:
        index: prepared dataset.
        shares: split -> share; they add up to 1. Each domain is split on its own if all have enough scenes.
        by: `scene` keeps the images of a scene together. `block` keeps the tiles of a square of `block` pixels
            together, and puts tiles that overlap squares of two splits into the split `unused`.
        block: side in pixels, at least that of the tiles.
        seed: of the order.

    Raises:
        UsageError: invalid shares or block.
        DataError: too few scenes or blocks, or tiles of unknown position.
    """
    check_shares("--ratio", shares)
    if (by == "block") != (block is not None):
        raise UsageError("--block is the side of the blocks in pixels, for --by block only.")
    labeled = [item for item in index.items if item.mask is not None]
    if block is None:
        split_of = _per_domain(labeled, shares, seed)
    else:
        split_of = {}
        for group in _domains(labeled):
            split_of |= by_block(index.root, index.task.bands, group, shares, block, seed)
    items = tuple(_in_split(item, split_of.get(item.image, item.split)) for item in index.items)
    rule = f"{by}, seed {seed}" if block is None else f"blocks of {block} pixels, seed {seed}"
    # blocks of one scene are in several splits intentionally
    return index.model_copy(update={"items": items, "split_rule": rule, "mixes_scenes": by == "block"})


class _Place(NamedTuple):
    area: str
    """Scene, or coordinate system."""
    row: int
    col: int
    height: int
    width: int

    def blocks(self, block: int) -> set[tuple[str, int, int]]:
        """Blocks that hold a corner; no tile is larger than a block."""
        rows, cols = (self.row, self.row + self.height - 1), (self.col, self.col + self.width - 1)
        return {(self.area, row // block, col // block) for row in rows for col in cols}


def by_block(
    folder: Path,
    bands: Sequence[str] | None,
    items: Sequence[IndexItem],
    shares: Mapping[str, float],
    block: int,
    seed: int,
) -> dict[str, str]:
    """Split of each image of a prepared folder, by squares of `block` pixels; see `resplit`."""
    places = {item.image: _place(folder, bands, item) for item in items}
    for image, place in places.items():
        if max(place.height, place.width) > block:
            raise UsageError(f"--block {block}: {image} is larger, {place.height} x {place.width} pixels.")
    home = {image: f"{p.area} {p.row // block} {p.col // block}" for image, p in places.items()}
    drawn = draw(sorted(set(home.values())), shares, seed)
    result = {}
    for image, place in places.items():
        touched = {drawn.get(f"{area} {row} {col}") for area, row, col in place.blocks(block)} - {None}
        result[image] = drawn[home[image]] if len(touched) == 1 else UNUSED
    return result


def _place(folder: Path, bands: Sequence[str] | None, item: IndexItem) -> _Place:
    """Position of an image in pixels of its scene or of its coordinate system; raises `DataError` if unknown."""
    with open_image([folder / part for part in item.image.split("|")], bands) as raster:
        info = raster.info
    if item.origin is not None:
        return _Place(scene_of(item), *item.origin, info.height, info.width)
    if info.crs is None:
        raise DataError(
            f"{item.image}: neither cut from a scene nor georeferenced, so its neighbours are unknown. "
            "Split with --by scene, or cut the scenes with `rsseg dataset prepare --tile`."
        )
    transform = info.transform
    row, col = round(transform.f / transform.e), round(transform.c / transform.a)
    return _Place(str(info.crs), row, col, info.height, info.width)


def _domains(items: Sequence[IndexItem]) -> list[list[IndexItem]]:
    names = sorted({item.domain or "" for item in items})
    return [[item for item in items if (item.domain or "") == name] for name in names]


def _per_domain(items: Sequence[IndexItem], shares: Mapping[str, float], seed: int) -> dict[str, str]:
    """Split of each image, by scene; all domains together if one has fewer scenes than there are splits."""
    split_of: dict[str, str] = {}
    groups = _domains(items)
    if any(len({scene_of(item) for item in group}) < len(shares) for group in groups):
        groups = [list(items)]
    for group in groups:
        drawn = draw(sorted({scene_of(item) for item in group}), shares, seed)
        split_of |= {item.image: drawn[scene_of(item)] for item in group}
    return split_of


def _in_split(item: IndexItem, split: str) -> IndexItem:
    return item.model_copy(update={"split": split})
