"""Splits and label lists that were published with a rule or a count."""

from collections import Counter

import pytest

from rsseg.data.index import IndexItem
from rsseg.datasets.cards import CARDS
from rsseg.datasets.known.aerial import POTSDAM_TEST, POTSDAM_TRAIN, VAIHINGEN_TEST, VAIHINGEN_TRAIN
from rsseg.datasets.splits import labeled_lists


def tiles_of(
    card: str, rule: str, scenes: dict[str, tuple[int, int]], split: str = "train", domain: str | None = None
) -> list[IndexItem]:
    """Tiles as a rule's grid cuts scenes of the published size."""
    grid = CARDS[card].choose_rule(rule).grid
    assert grid is not None
    return [
        IndexItem(image=f"{name}_{w.row}_{w.col}.tif", mask="m", split=split, scene=name, domain=domain)
        for name, size in scenes.items()
        for w in grid.windows(*size)
    ]


def counts(card: str, rule: str, items: list[IndexItem]) -> Counter[str]:
    return Counter(item.split for item in CARDS[card].choose_rule(rule).assign(items, 0))


def label_counts(card: str, rule: str, items: list[IndexItem]) -> list[int]:
    chosen = CARDS[card].choose_rule(rule)
    lists = labeled_lists(chosen.assign(items, 0), chosen.label_shares, 0)
    smaller, larger = list(lists.values())[:-1], list(lists.values())[1:]
    assert all(set(a) < set(b) for a, b in zip(smaller, larger, strict=True))
    return [len(names) for names in lists.values()]


def test_potsdam_has_the_lists_of_st_dasegnet() -> None:
    assert (len(POTSDAM_TRAIN), len(POTSDAM_TEST), len({*POTSDAM_TRAIN, *POTSDAM_TEST})) == (24, 14, 38)
    items = tiles_of("potsdam", "st-dasegnet", dict.fromkeys((*POTSDAM_TRAIN, *POTSDAM_TEST), (6000, 6000)))
    assert counts("potsdam", "st-dasegnet", items) == {"train": 2904, "val": 1694}


def test_potsdam_has_the_counts_of_rs_dwl() -> None:
    items = tiles_of("potsdam", "rs-dwl", dict.fromkeys((*POTSDAM_TRAIN, *POTSDAM_TEST), (6000, 6000)))
    assert counts("potsdam", "rs-dwl", items) == {"train": 3283, "val": 1094, "test": 1095}
    assert label_counts("potsdam", "rs-dwl", items) == [32, 164, 328]


def test_deepglobe_has_the_counts_of_rs_dwl() -> None:
    items = tiles_of("deepglobe", "rs-dwl", {str(i): (2448, 2448) for i in range(803)})
    assert counts("deepglobe", "rs-dwl", items) == {"train": 12045, "val": 4015, "test": 4015}
    assert label_counts("deepglobe", "rs-dwl", items) == [120, 602, 1204]


def test_loveda_has_the_counts_of_rs_dwl() -> None:
    official = {"train": {"rural": 1366, "urban": 1156}, "val": {"rural": 992, "urban": 677}}
    items = [
        item
        for split, domains in official.items()
        for domain, count in domains.items()
        for item in tiles_of(
            "loveda", "rs-dwl", {f"{split}{domain}{i}": (1024, 1024) for i in range(count)}, split, domain
        )
    ]
    assert counts("loveda", "rs-dwl", items) == {"train": 10088, "val": 3338, "test": 3338}
    assert label_counts("loveda", "rs-dwl", items) == [100, 504, 1008]
    chosen = CARDS["loveda"].choose_rule("rs-dwl")
    smallest = labeled_lists(chosen.assign(items, 0), chosen.label_shares, 0)[0.01]
    assert Counter("rural" in name for name in smallest) == {True: 54, False: 46}


def test_gid_has_the_counts_of_st_dasegnet() -> None:
    items = tiles_of("gid5", "st-dasegnet", {str(i): (6800, 7200) for i in range(150)})
    assert counts("gid5", "st-dasegnet", items) == {"train": 4410, "val": 1890}


@pytest.mark.parametrize(
    ("city", "images", "tiles", "expected"), [("paris", 625, 36, (15750, 6750)), ("chicago", 457, 30, (9597, 4113))]
)
def test_city_osm_has_the_counts_of_st_dasegnet(city: str, images: int, tiles: int, expected: tuple[int, int]) -> None:
    # the numbers of tiles are published, the sizes of the images are not: any with so many tiles
    size = (3072, 3072) if tiles == 36 else (2560, 3072)
    items = tiles_of("city-osm", "st-dasegnet", {f"{city}{i}": size for i in range(images)}, domain=city)
    assert counts("city-osm", "st-dasegnet", items) == {"train": expected[0], "val": expected[1]}


def test_vaihingen_is_divided_by_area_as_published() -> None:
    areas = (*VAIHINGEN_TRAIN, *VAIHINGEN_TEST)
    assert (len(VAIHINGEN_TRAIN), len(VAIHINGEN_TEST), len(set(areas))) == (16, 17, 33)
    items = [IndexItem(image=f"{n}.tif", mask="m", split="train", scene=f"area{n}") for n in areas]
    found = CARDS["vaihingen"].choose_rule("st-dasegnet").assign(items, 0)
    assert Counter(item.split for item in found) == {"train": 25, "val": 8}
    assert {item.scene for item in found if item.split == "val"} == {f"area{n}" for n in (2, 5, 7, 8, 13, 20, 22, 24)}
    tiles = tiles_of("vaihingen", "st-dasegnet", {"area1": (2569, 1919), "area38": (3816, 2550)})
    assert Counter(item.scene for item in tiles) == {"area1": 54, "area38": 104}


def test_vaihingen_has_the_counts_of_st_dasegnet() -> None:
    # height and width of the areas that ISPRS ships
    sizes = dict.fromkeys((4, 5, 6, 7, 8, 10), (2557, 1887)) | dict.fromkeys((21, 22, 23, 24), (2546, 1903))
    sizes |= {1: (2569, 1919), 2: (2767, 2428), 3: (3007, 2006), 11: (2566, 1893), 12: (2575, 1922), 13: (2558, 2818)}
    sizes |= dict.fromkeys((14, 15, 16), (2565, 1919)) | {17: (1281, 2336), 20: (2315, 1866), 26: (1783, 2995)}
    sizes |= {
        27: (3313, 1917),
        28: (2567, 1917),
        29: (2563, 1917),
        30: (2563, 1934),
        31: (2555, 1980),
        32: (2555, 1980),
    }
    sizes |= {33: (2555, 1581), 34: (2555, 1388), 35: (1884, 2805), 37: (1995, 1996), 38: (2550, 3816)}
    items = tiles_of("vaihingen", "st-dasegnet", {f"area{number}": size for number, size in sizes.items()})
    assert counts("vaihingen", "st-dasegnet", items) == {"train": 1296, "val": 440}


@pytest.mark.parametrize("card", ["deepglobe", "gid5", "city-osm", "l8biome"])
def test_default_rules_keep_scenes_whole_and_depend_on_the_seed_alone(card: str) -> None:
    rule = CARDS[card].rules[0]
    items = [
        IndexItem(image=f"{scene}_{tile}", mask="m", split="train", scene=str(scene))
        for scene in range(20)
        for tile in range(3)
    ]
    assigned = {item.image: item.split for item in rule.assign(items, 1)}
    assert assigned == {item.image: item.split for item in rule.assign(items[::-1], 1)}
    assert assigned != {item.image: item.split for item in rule.assign(items, 2)}
    assert Counter(assigned.values()) == {"train": 36, "val": 12, "test": 12}
    assert len({(image.split("_")[0], split) for image, split in assigned.items()}) == 20
