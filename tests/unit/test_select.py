"""Selecting images of an index."""

from pathlib import Path

import pytest

from rsseg.config import DataConfig, SelectConfig
from rsseg.data.index import IndexItem, SegmentationIndex
from rsseg.data.sources import Datasets, select_items
from rsseg.errors import DataError


def names(items: tuple[IndexItem, ...]) -> list[str]:
    return [Path(item.image).stem for item in items]


def test_conditions_add_up(rgb_dataset: Path) -> None:
    index = SegmentationIndex.load(rgb_dataset)
    assert names(select_items(index, SelectConfig(), split="train", seed=0)) == ["00", "01", "02", "03", "04"]
    assert names(select_items(index, SelectConfig(split="val"), split="train", seed=0)) == ["05", "06"]
    assert names(select_items(index, SelectConfig(domain="north"), split="train", seed=0)) == ["01", "03"]


def test_list_and_its_complement_share_the_split(rgb_dataset: Path, tmp_path: Path) -> None:
    index = SegmentationIndex.load(rgb_dataset)
    listed = tmp_path / "list.txt"
    listed.write_text("images/03.png\n\nimages/01.png\n")
    select = SelectConfig(items=listed)
    assert names(select_items(index, select, split="train", seed=0)) == ["01", "03"]
    rest = select_items(index, select.model_copy(update={"complement": True}), split="train", seed=0)
    assert names(rest) == ["00", "02", "04"]
    listed.write_text("images/99.png\n")
    with pytest.raises(DataError, match=r"images/99\.png.*such as 'images/00\.png'"):
        select_items(index, select, split="train", seed=0)
    with pytest.raises(DataError, match="there is no such file"):
        select_items(index, SelectConfig(items=tmp_path / "none.txt"), split="train", seed=0)


def test_share_is_seeded_and_has_a_complement(rgb_dataset: Path) -> None:
    index = SegmentationIndex.load(rgb_dataset)
    part = select_items(index, SelectConfig(fraction=0.4), split="train", seed=5)
    rest = select_items(index, SelectConfig(fraction=0.4, complement=True), split="train", seed=5)
    assert len(part) == 2
    assert sorted(names(part) + names(rest)) == ["00", "01", "02", "03", "04"]
    picks = {tuple(names(select_items(index, SelectConfig(count=2), split="train", seed=s))) for s in range(20)}
    assert len(picks) > 3


def test_share_shows_every_class_and_larger_shares_hold_the_smaller_ones(rgb_dataset: Path) -> None:
    one = SegmentationIndex.load(rgb_dataset)
    items = tuple(
        IndexItem(image=f"{i}.png", mask=f"m{i}.png", split="train", classes=(9, int(i % 50 == 7), int(i % 30 == 3)))
        for i in range(200)
    )
    index = one.model_copy(update={"items": items})
    for seed in range(5):
        shares = [select_items(index, SelectConfig(fraction=f), split="train", seed=seed) for f in (0.01, 0.05, 0.1)]
        assert [len(share) for share in shares] == [2, 10, 20]
        for share in shares:
            assert all(any(item.classes and item.classes[k] for item in share) for k in range(3))
        assert set(names(shares[0])) < set(names(shares[1])) < set(names(shares[2]))
        assert names(shares[1]) == names(select_items(index, SelectConfig(count=10), split="train", seed=seed))


def test_empty_selections_say_why(rgb_dataset: Path) -> None:
    index = SegmentationIndex.load(rgb_dataset)
    for select, split, message in (
        (SelectConfig(), "nope", r"split 'nope' is empty; the index has \['train', 'val', 'test'\]"),
        (SelectConfig(domain="west"), "train", r"no domain 'west'; it has \['north', 'south'\]"),
        (SelectConfig(complement=True), "train", "complement leaves no image"),
        (SelectConfig(count=9), "train", "count is 9, but there are 5"),
        (SelectConfig(count=1, fraction=0.5), "train", "both fraction and count"),
        (SelectConfig(fraction=0.05), "train", "fraction of 0.05 of 5 images selects none.*count: 1"),
    ):
        with pytest.raises(DataError, match=message):
            select_items(index, select, split=split, seed=0)


def test_task_is_restricted_to_the_recipe_bands(uint16_dataset: Path) -> None:
    assert Datasets(DataConfig(path=uint16_dataset)).task.bands == ("red", "green", "blue", "nir")
    assert Datasets(DataConfig(path=uint16_dataset, bands=("nir", "red"))).task.bands == ("nir", "red")
