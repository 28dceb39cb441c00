"""Outputs, names and options of `prepare` that are refused, and text files of other systems."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from rsseg.data.index import SegmentationIndex
from rsseg.datasets.prepare.options import parse_options
from rsseg.datasets.prepare.run import prepare
from rsseg.errors import DataError, MachineError, UsageError
from tests.conftest import write_png, write_tif
from tests.unit.test_prepare import CLASSES, own_options, own_source, quiet


def test_a_folder_that_is_not_ours_is_never_cleared(tmp_path: Path) -> None:
    source = own_source(tmp_path / "src")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/thesis.tex").touch()
    with pytest.raises(DataError, match=r"out\.partial: needed as the working folder"):
        prepare("folder", own_options(source, tmp_path / "out"), quiet)
    (tmp_path / "other").symlink_to(tmp_path / "out.partial")
    with pytest.raises(DataError, match="is a link"):
        prepare("folder", own_options(source, tmp_path / "other", overwrite=True), quiet)
    assert (tmp_path / "out.partial/thesis.tex").exists()


def test_a_dataset_named_partial_is_not_taken_for_unfinished_work(tmp_path: Path) -> None:
    source = own_source(tmp_path / "src")
    made = prepare("folder", own_options(source, tmp_path / "out.partial"), quiet)
    with pytest.raises(DataError, match="it exists already"):
        prepare("folder", own_options(source, tmp_path / "out"), quiet)
    assert SegmentationIndex.load(made).items


@pytest.mark.parametrize("place", ["out", "out.partial"])
def test_the_class_file_and_lists_are_not_replaced_with_the_output(tmp_path: Path, place: str) -> None:
    source = own_source(tmp_path / "src")
    out = prepare("folder", own_options(source, tmp_path / "out"), quiet)
    (tmp_path / place).mkdir(exist_ok=True)
    for name in ("classes.yaml", "train.txt"):
        (tmp_path / place / name).write_text(CLASSES if name.endswith("yaml") else "0")
    for folder in (
        {"classes": tmp_path / place / "classes.yaml"},
        {"split_lists": {"train": tmp_path / place / "train.txt"}},
    ):
        with pytest.raises(UsageError, match=r"lies in --out"):
            prepare("folder", own_options(source, out, overwrite=True, folder=folder), quiet)
    assert (tmp_path / place / "classes.yaml").is_file()


def test_names_that_are_too_long_and_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    source = own_source(tmp_path / "src")
    for out in (tmp_path / ("n" * 300), tmp_path / ("n" * 250)):
        with pytest.raises(UsageError, match="file name is too long"):
            prepare("folder", own_options(source, out), quiet)
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="file"):
        prepare("folder", own_options(source, tmp_path / "file/out"), quiet)
    long = own_options(source, tmp_path / "out").model_copy(update={"src": tmp_path / ("n" * 300)})
    with pytest.raises(DataError, match="too long"):
        prepare("folder", long, quiet)


def test_a_tile_name_that_gets_too_long_names_the_file(tmp_path: Path) -> None:
    source = own_source(tmp_path / "src")
    long = "n" * 245
    for folder, suffix in (("images", "tif"), ("masks", "png")):
        (source / f"val/{folder}/0.{suffix}").rename(source / f"val/{folder}/{long}.{suffix}")
    with pytest.raises(DataError, match=r"nnn_00000_00000\.tif: the file name is too long"):
        prepare("folder", own_options(source, tmp_path / "out", tile=8), quiet)


def test_images_that_differ_by_their_ending_only_are_refused_if_their_tiles_would_not_differ(tmp_path: Path) -> None:
    source, rng = own_source(tmp_path / "src"), np.random.default_rng(0)
    shutil.rmtree(source / "train")
    shutil.rmtree(source / "val")
    for split in ("train", "val"):
        for folder, shape in (("images", (3, 24, 20)), ("masks", (1, 24, 20))):
            for ending, write in (("tif", write_tif), ("png", lambda path, a: write_png(path, a.squeeze().T))):
                write(source / split / folder / f"0.{ending}", rng.integers(0, 3, shape).astype(np.uint8))
    patterns = {"images": "{split}/images/*.*", "masks": "{split}/masks/*.*"}
    with pytest.raises(DataError, match=r"train/images/0\.png and train/images/0\.tif differ .* ending only"):
        prepare("folder", own_options(source, tmp_path / "out", folder=patterns, tile=8), quiet)


@pytest.mark.parametrize(
    "text", ["train/images/0\n", "\ufefftrain/images/0\r\n", "train\\images\\0.tif\ntrain/images/0.tif\n# note\n"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_split_lists_of_other_systems_are_read(tmp_path: Path, text: str, encoding: str) -> None:
    source = own_source(tmp_path / "src")
    (tmp_path / "train.txt").write_bytes(text.removeprefix("\ufeff" if encoding == "utf-16" else "").encode(encoding))
    lists = {"images": "*/images/*.tif", "masks": "*/masks/*.png", "split_lists": {"train": tmp_path / "train.txt"}}
    index = SegmentationIndex.load(prepare("folder", own_options(source, tmp_path / "out", folder=lists), quiet))
    assert [item.image for item in index.items] == ["train/images/0.tif"]


def test_a_split_list_in_another_encoding_names_file_and_line(tmp_path: Path) -> None:
    source = own_source(tmp_path / "src")
    (tmp_path / "train.txt").write_bytes("0\nZürich\n".encode("cp1252"))
    lists = {"images": "*/images/*.tif", "masks": "*/masks/*.png", "split_lists": {"train": tmp_path / "train.txt"}}
    with pytest.raises(DataError, match=r"train\.txt, line 2: is not UTF-8 text"):
        prepare("folder", own_options(source, tmp_path / "out", folder=lists), quiet)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("tile", 10**20, "--tile"), ("scale", (0.0, float("inf")), "--scale"), ("ignore", (10**30,), "--ignore"),
        ("bands", ("red", "red"), "bands must be different"), ("bands", ("red", ""), "bands must be different"),
        ("jobs", 0, "--jobs"), ("stretch", "max", "--stretch"),
    ],
)  # fmt: skip
def test_absurd_options_are_refused_with_their_name(option: str, value: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_options("folder", {option: value})
