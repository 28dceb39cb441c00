"""Rules that divide the images of a dataset among splits."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rsseg.data.index import IndexItem
from rsseg.datasets.prepare.tiles import Grid
from rsseg.errors import DataError

Assign = Callable[[Sequence[IndexItem], int], Sequence[IndexItem]]
"""(items, seed) -> the items that have a split, with it, in the same order."""
SHARES = (0.01, 0.05, 0.1)
"""Label fractions of the published semi-supervised experiments."""


@dataclass(frozen=True)
class SplitRule:
    """One way to divide a dataset."""

    name: str
    title: str
    assign: Assign
    splits: tuple[str, ...] = ("train", "val", "test")
    """Each of them must get images."""
    tiles: bool = False
    """Divides the tiles, after they were cut; otherwise the images, so that all tiles of an image stay together."""
    grid: Grid | None = None
    """How the published tiles were cut."""
    pad_label: int = 255
    """Class index of padding."""
    ignore_unknown: bool = False
    """Mask colours that are not declared are ignored, as in the published scripts; otherwise they are an error."""
    unknown_label: int = 255
    """Class index of such colours."""
    label_shares: tuple[float, ...] = ()
    """Nested lists of labeled training images are written for these shares."""


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
    """Shares of the scenes of each domain, in seeded order; images that have another split than `train` keep it."""

    def assign(items: Sequence[IndexItem], seed: int) -> Sequence[IndexItem]:
        split_of: dict[str, str] = {}
        for domain in sorted({item.domain or "" for item in items}):
            scenes = sorted(
                {scene_of(item) for item in items if (item.domain or "") == domain and item.split == "train"}
            )
            split_of |= draw(scenes, shares, seed)
        return [_in_split(item, split_of[scene_of(item)]) if item.split == "train" else item for item in items]

    return assign


def drawn_tiles(shares: Mapping[str, float], *, per_domain: bool = False) -> Assign:
    """Shares of all tiles in seeded order, whatever scene they are of; each but the last is rounded down.

    The published lists were shuffled without a known seed: their counts are reproduced, not their members.
    """

    def assign(items: Sequence[IndexItem], seed: int) -> Sequence[IndexItem]:
        split_of: dict[str, str] = {}
        for domain in sorted({(item.domain or "") if per_domain else "" for item in items}):
            names = [item.image for item in items if not per_domain or (item.domain or "") == domain]
            split_of |= draw(names, shares, seed, whole=math.floor)
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
    """Split of each name: shares that add up to 1, in an order that depends on names and seed alone.

    Raises `DataError` if a split would get none.
    """
    order = sorted(names)
    random.Random(seed).shuffle(order)
    result: dict[str, str] = {}
    start = 0
    for number, (split, share) in enumerate(shares.items(), start=1):
        # a millionth against 0.7 * 22500 = 15749.999999999998
        end = len(order) if number == len(shares) else start + whole(share * len(order) + 1e-6)
        if end <= start:
            raise DataError(
                f"split {split!r} would get none of {len(order)} scenes. Give more images, or choose another --split."
            )
        result |= dict.fromkeys(order[start:end], split)
        start = end
    return result


def labeled_lists(items: Sequence[IndexItem], shares: Sequence[float], seed: int) -> dict[float, list[str]]:
    """Share -> training images that keep their labels: the first int(share x n) of each domain in a seeded order.

    The lists of smaller shares are contained in those of larger ones.
    """
    lists: dict[float, list[str]] = {share: [] for share in shares}
    train = [item for item in items if item.split == "train" and item.mask is not None]
    for domain in sorted({item.domain or "" for item in train}):
        order = sorted(item.image for item in train if (item.domain or "") == domain)
        random.Random(f"{seed} {domain}").shuffle(order)
        for share in shares:
            lists[share] += order[: int(share * len(order) + 1e-6)]
    return lists


def scene_of(item: IndexItem) -> str:
    """What must not be divided: the scene, or the image itself."""
    return item.scene or item.image


def _in_split(item: IndexItem, split: str) -> IndexItem:
    return item.model_copy(update={"split": split})
