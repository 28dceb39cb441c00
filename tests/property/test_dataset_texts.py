"""Class files, split lists and patterns of any content end in a result or in an error of rsseg."""

import string
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rsseg.datasets.class_file import load_classes
from rsseg.datasets.layouts import Layout
from rsseg.datasets.prepare.options import FolderOptions, PrepareOptions, parse_ignored, parse_pairs, parse_scale
from rsseg.datasets.prepare.plan import make_plan
from rsseg.errors import RssegError

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**40), 10**40), st.floats(), st.text(max_size=20), st.dates(),
    st.sampled_from(["values", "colors", "#010203", "#zzzzzz", [1, 2, 3], [256, -1, 0], [1, 2]]),
)  # fmt: skip
KEYS = st.sampled_from(
    ["name", "classes", "labels", "ignore", "ignore_colors", "bands", "gsd_m", "nodata", "ignore_zero_collar", "value",
     "color", "also", "also_colors", "nmae"]
)  # fmt: skip
ENTRY = st.dictionaries(KEYS, st.one_of(SCALARS, st.lists(SCALARS, max_size=3)), max_size=5)
TABLES = st.dictionaries(KEYS, st.one_of(SCALARS, st.lists(st.one_of(SCALARS, ENTRY), max_size=4), ENTRY), max_size=8)
GOOD = {"name": "x", "classes": [{"name": "a", "value": 1, "color": "#000000"}]}


def refusal(call: Callable[[], object]) -> str:
    """The error of a call, or nothing; anything but an error of rsseg fails the test."""
    try:
        call()
    except RssegError as error:
        return str(error)
    return ""


def parsed(content: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "classes.yaml"
        path.write_bytes(content)
        reason = refusal(lambda: (load_classes(path).class_infos(), load_classes(path).label_map()))
        assert not reason or str(path) in reason or "class file" in reason


@settings(max_examples=200, deadline=None)
@given(TABLES, st.booleans())
def test_class_files_of_any_structure(table: dict[str, Any], good: bool) -> None:
    parsed(yaml.safe_dump((GOOD | table) if good else table, allow_unicode=True).encode())


SYMBOLS = st.text(alphabet="[]{}&*!:-?,|>'\"#% \n\tab01.~<", max_size=80)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=200), SYMBOLS.map(str.encode)))
def test_class_files_of_any_bytes(content: bytes) -> None:
    parsed(content)


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=100), st.text(max_size=60).map(str.encode)))
def test_split_lists_of_any_bytes(content: bytes) -> None:
    with TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "classes.yaml").write_text(yaml.safe_dump(GOOD))
        (root / "list.txt").write_bytes(content)
        own = FolderOptions(classes=root / "classes.yaml", images="*.tif", split_lists={"train": root / "list.txt"})
        options = PrepareOptions(src=root, folder=own)
        reason = refusal(lambda: make_plan("folder", options).variants[0].layout.items_of({"a.tif": root / "a.tif"}))
        assert any(part in reason for part in ("list.txt", "split list", "no mask"))


PATTERNS = st.text(alphabet="{}*?|/.[]()\\\\+^$ab" + string.digits, max_size=25)


@settings(max_examples=200, deadline=None)
@given(st.one_of(PATTERNS, st.sampled_from(["{split}/*.tif", "{group}_{text}.tif", "**/*", "{any}{id}.tif"])), PATTERNS)
def test_patterns_of_any_text(images: str, masks: str) -> None:
    files = {name: Path(name) for name in ("train/a.tif", "train/a_mask.tif", "val/b.tif", "c")}
    refusal(lambda: Layout(images, masks, one_split="train", subset=True).items_of(files))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_options_of_any_text(text: str) -> None:
    for parse in (parse_scale, lambda value: parse_pairs("--split-as", [value]), lambda value: parse_ignored([value])):
        assert refusal(partial(parse, text))[:2] in ("", "--")
