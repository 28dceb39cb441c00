"""Patterns, pairing and splits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rsseg.datasets.layouts import Layout, PathPattern, find_prefix, list_files
from rsseg.errors import DataError, UsageError


def tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def named(root: Path) -> dict[str, Path]:
    return {name: root / name for name in list_files(root)}


def rows(layout: Layout, root: Path) -> list[tuple[str, str | None, str, str | None]]:
    return [(item.image, item.mask, item.split, item.domain) for item in layout.items(root)]


def test_wildcards_stay_within_a_name_and_double_stars_cross_folders() -> None:
    assert PathPattern("*/a.tif").match("x/y/a.tif") is None
    assert PathPattern("**/a_?.tif").match("x/y/a_1.tif") == {"stem": "x/y/*1"}


def test_extension_matches_in_upper_and_lower_case(tmp_path: Path) -> None:
    root = tree(tmp_path, "train/images/A.TIF", "train/masks/A.Png", "val/images/b.tif", "val/masks/b.PNG")
    layout = Layout("{split}/images/*.tif", "{split}/masks/*.png")
    found = [("train/images/A.TIF", "train/masks/A.Png"), ("val/images/b.tif", "val/masks/b.PNG")]
    assert [(image, mask) for image, mask, *_ in rows(layout, root)] == found
    assert PathPattern("images/*.tif").match("Images/a.tif") is None


@pytest.mark.parametrize(
    ("option", "changes"), [("--split-as", {"split_as": {"trian": "train"}}), ("--unlabeled", {"unlabeled": ("tset",)})]
)
def test_misspelt_split_is_named(tmp_path: Path, option: str, changes: dict[str, Any]) -> None:
    root = tree(tmp_path, "train/a.tif", "train/a.png", "test/b.tif", "test/b.png")
    layout = Layout("{split}/*.tif", "{split}/*.png", check_names=True)
    assert len(rows(layout, root)) == 2
    with pytest.raises(UsageError, match=rf"{option} (trian|tset): there is no such split; found are test, train\."):
        rows(replace(layout, **changes), root)


def test_brackets_dots_and_blanks_in_names_are_plain_characters(tmp_path: Path) -> None:
    tree(tmp_path, "train/my [old] images/1.5 m (é).jpg", "train/labels/1.5 m (é).png", "train/labels/1x5 m.txt")
    layout = Layout("{split}/my [old] images/*.jpg", "{split}/labels/*.png")
    assert rows(layout, tmp_path) == [
        ("train/my [old] images/1.5 m (é).jpg", "train/labels/1.5 m (é).png", "train", None)
    ]


def test_prefixes_and_suffixes_of_file_names_pair_by_what_the_star_matches(tmp_path: Path) -> None:
    tree(tmp_path, "train/7_sat.jpg", "train/7_mask.png", "train/8_sat.jpg", "train/8_mask.png")
    found = rows(Layout("{split}/{stem}_sat.jpg", "{split}/{stem}_mask.png"), tmp_path)
    assert [row[1] for row in found] == ["train/7_mask.png", "train/8_mask.png"]


def test_masks_may_lie_in_a_folder_without_splits(tmp_path: Path) -> None:
    tree(tmp_path, "train/a.tif", "val/b.tif", "labels/a.png", "labels/b.png")
    found = rows(Layout("{split}/*.tif", "labels/*.png"), tmp_path)
    assert [(row[1], row[2]) for row in found] == [("labels/a.png", "train"), ("labels/b.png", "val")]


def test_one_band_per_file_is_joined_in_the_order_of_the_patterns(tmp_path: Path) -> None:
    tree(tmp_path, "train/a_B4.tif", "train/a_B3.tif", "train/a_mask.png")
    layout = Layout("{split}/*_B4.tif|{split}/*_B3.tif", "{split}/*_mask.png")
    assert rows(layout, tmp_path)[0][0] == "train/a_B4.tif|train/a_B3.tif"
    (tmp_path / "train/a_B3.tif").unlink()
    with pytest.raises(DataError, match=r"a_B4\.tif.*'\{split\}/\*_B3\.tif'"):
        layout.items(tmp_path)


def test_domains_come_from_folders_or_from_renamed_splits(tmp_path: Path) -> None:
    tree(tmp_path, "rural/train/a.tif", "urban/train/a.tif")
    layout = Layout("{domain}/{split}/*.tif", unlabeled=("train",))
    assert [row[3] for row in rows(layout, tmp_path)] == ["rural", "urban"]
    renamed = Layout("{split}/train/*.tif", unlabeled=("u",), split_as={"rural": "u:country", "urban": "u:town"})
    assert [row[2:] for row in rows(renamed, tmp_path)] == [("u", "country"), ("u", "town")]


def test_an_image_without_mask_is_an_error_unless_its_split_needs_none(tmp_path: Path) -> None:
    tree(tmp_path, "train/a.tif", "train/a.png", "train/b.tif")
    with pytest.raises(DataError, match=r"1 of 2 images have no mask.*train/b\.tif"):
        Layout("{split}/*.tif", "{split}/*.png").items(tmp_path)
    hidden = rows(Layout("{split}/*.tif", "{split}/*.png", unlabeled=("train",)), tmp_path)
    assert [row[1] for row in hidden] == [None, None]


def test_a_mask_without_image_is_an_error(tmp_path: Path) -> None:
    tree(tmp_path, "train/a.tif", "train/a.png", "train/b.png")
    with pytest.raises(DataError, match=r"1 mask\(s\) have no image.*train/b\.png"):
        Layout("{split}/*.tif", "{split}/*.png").items(tmp_path)


def test_split_lists_choose_images_by_path_name_or_stem(tmp_path: Path) -> None:
    tree(tmp_path, "x/a.tif", "x/b.tif", "x/c.tif", "y/a.png", "y/b.png", "y/c.png")
    lists = {"train:s": ["x/a.tif"], "val": ["b"]}
    found = rows(Layout("x/*.tif", "y/*.png", split_lists=lists), tmp_path)
    assert [(row[0], row[2], row[3]) for row in found] == [("x/a.tif", "train", "s"), ("x/b.tif", "val", None)]


def test_accents_of_different_systems_are_the_same(tmp_path: Path) -> None:
    tree(tmp_path, "x/Zu\u0308rich.tif", "y/Z\u00fcrich.png")
    found = rows(Layout("x/*.tif", "y/*.png", split_lists={"train": ["Z\u00fcrich"]}), tmp_path)
    assert found == [("x/Zu\u0308rich.tif", "y/Z\u00fcrich.png", "train", None)]


@pytest.mark.parametrize(
    ("lists", "message"),
    [({"train": ["z"]}, "'z' is not the name of an image"), ({"train": ["a"], "val": ["x/a.tif"]}, "must not share")],
)
def test_a_wrong_split_list_is_an_error(tmp_path: Path, lists: dict[str, list[str]], message: str) -> None:
    tree(tmp_path, "x/a.tif")
    with pytest.raises(DataError, match=message):
        Layout("x/*.tif", split_lists=lists, unlabeled=("train", "val")).items(tmp_path)


def test_drawn_splits_depend_on_the_seed_only_and_keep_groups_together(tmp_path: Path) -> None:
    tree(tmp_path, *(f"tile{t}_part{p}.tif" for t in range(10) for p in range(3)))
    ratio = {"train": 0.6, "val": 0.2, "test": 0.2}

    def drawn(seed: int) -> dict[str, str]:
        layout = Layout("tile{group}_part*.tif", unlabeled=tuple(ratio), split_ratio=ratio, seed=seed)
        return {item.image: item.split for item in layout.items(tmp_path)}

    first = drawn(1)
    assert first == drawn(1) != drawn(2)
    groups = {(name.split("_")[0], split) for name, split in first.items()}
    assert sorted(split for _, split in groups) == ["test"] * 2 + ["train"] * 6 + ["val"] * 2


def test_only_labeled_images_are_drawn_where_those_without_masks_have_a_split(tmp_path: Path) -> None:
    tree(tmp_path, *(f"images/{n}.tif" for n in range(8)), *(f"masks/{n}.png" for n in range(4)))
    layout = Layout(
        "images/*.tif", "masks/*.png", unlabeled=("unlabeled",), split_ratio={"train": 0.5, "val": 0.5}, seed=1
    )
    split = {Path(item.image).stem: (item.split, item.mask is not None) for item in layout.items(tmp_path)}
    assert {split[n] for n in "4567"} == {("unlabeled", False)}
    assert sorted(split[n] for n in "0123") == [("train", True)] * 2 + [("val", True)] * 2


def test_every_split_gets_an_image_where_there_are_enough(tmp_path: Path) -> None:
    tree(tmp_path, "a.tif", "b.tif", "c.tif")
    ratio = {"train": 0.9, "val": 0.05, "test": 0.05}
    found = rows(Layout("*.tif", unlabeled=tuple(ratio), split_ratio=ratio), tmp_path)
    assert sorted(row[2] for row in found) == ["test", "train", "val"]
    (tmp_path / "c.tif").unlink()
    with pytest.raises(DataError, match=r"2 images .* cannot fill the 3 splits train, val, test"):
        Layout("*.tif", unlabeled=tuple(ratio), split_ratio=ratio).items(tmp_path)


def test_patterns_that_say_nothing_about_splits_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\{split\}.*--split-list.*--split-ratio"):
        Layout("*.tif").items(tree(tmp_path, "a.tif"))


def test_an_unknown_placeholder_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"\{splt\}.*\{split\}"):
        PathPattern("{splt}/*.tif")


def test_the_root_is_found_below_the_folders_that_archives_add(tmp_path: Path) -> None:
    layout = Layout("img_dir/{split}/*.tif", "ann_dir/{split}/*.png")
    tree(tmp_path, "data/grass/img_dir/train/a.tif", "data/grass/ann_dir/train/a.png")
    assert find_prefix(named(tmp_path), [layout], "here") == (layout, "data/grass/")
    with pytest.raises(DataError, match=r"no file matches 'img_dir.*such as a/b\.txt"):
        find_prefix(named(tree(tmp_path / "other", "a/b.txt")), [layout], "here")
