"""`rsseg dataset` as a user types it."""

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image

from rsseg.cli import run
from rsseg.data.index import SegmentationIndex
from rsseg.datasets.prepare import transfer
from rsseg.datasets.prepare.run import prepare
from tests.conftest import write_png
from tests.unit.test_prepare import own_options, own_source, quiet


@pytest.fixture
def tiled(tmp_path: Path) -> Path:
    """Four images of 64 x 64 pixels in tiles of 16."""
    source = own_source(tmp_path / "src", size=(64, 64))
    return prepare("folder", own_options(source, tmp_path / "out", tile=16), quiet)


def command(source: Path, out: Path) -> list[str]:
    return [
        "dataset", "prepare", "folder", "--src", str(source), "--classes", str(source / "classes.yaml"), "--images",
        "{split}/images/*.tif", "--masks", "{split}/masks/*.png", "--tile", "16", "--jobs", "1", "--out", str(out),
    ]  # fmt: skip


def test_list_tells_all_and_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["dataset", "list"]) == 0
    assert "landcovernet-s2" in capsys.readouterr().out
    assert run(["dataset", "list", "potsdam"]) == 0
    assert "368 rows" in capsys.readouterr().out
    assert run(["dataset", "list", "loveda", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["classes"][0] == "background"
    assert told["license"] == "cc-by-nc-sa-4.0"
    assert told["citation"]
    assert "zenodo" in told["download"]
    assert run(["dataset", "list", "lovda"]) == 2
    assert "did you mean 'loveda'" in capsys.readouterr().err


def test_inspect_writes_a_picture_or_shows_one_here(
    tiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "sample.png"
    assert run(["dataset", "inspect", str(tiled), "--out", str(picture)]) == 0
    with Image.open(picture) as image:
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 24) or ()}
    assert {(0, 255, 0), (0, 0, 255)} <= colors
    assert run(["dataset", "inspect", str(tiled), "--out", str(picture)]) == 2
    capsys.readouterr()
    assert run(["dataset", "inspect", str(tiled), "val"]) == 0
    answer = capsys.readouterr()
    assert "\u2580" in answer.out
    assert "land" in answer.out
    assert "split val" in answer.err
    assert run(["dataset", "inspect", str(tiled), "nowhere"]) == 4


def test_inspect_never_replaces_an_input_or_leaves_half_a_file(
    tiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def inspect(out: Path, *more: str) -> int:
        return run(["dataset", "inspect", str(tiled), "--out", str(out), *more])

    image = next(tiled.rglob("images/**/*.tif"))
    before = image.read_bytes()
    assert inspect(image, "--overwrite") == 2
    assert inspect(tiled / "new.png", "--overwrite") == 2
    assert inspect(tmp_path, "--overwrite") == 2
    (tmp_path / "dangling.png").symlink_to("nowhere.png")
    assert inspect(tmp_path / "dangling.png") == 2
    assert inspect(tmp_path / f"{'n' * 300}.png") == 2
    (tmp_path / "file").touch()
    assert inspect(tmp_path / "file/s.png") == 6
    assert inspect(Path("/proc/s.png")) == 6
    assert "bug" not in capsys.readouterr().err
    assert image.read_bytes() == before
    (tmp_path / "link.png").symlink_to(image)
    assert inspect(tmp_path / "link.png", "--overwrite") == 2
    assert image.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("bands", [1, 8])
def test_inspect_shows_images_without_colours(tmp_path: Path, bands: int) -> None:
    source = own_source(tmp_path / "src", dtype="uint16", bands=bands)
    out = prepare("folder", own_options(source, tmp_path / "out"), quiet)
    assert run(["dataset", "inspect", str(out), "--out", str(tmp_path / "s.png")]) == 0


def test_split_by_scene_keeps_tiles_together_and_asks_before_it_writes(
    tiled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (tiled / "rsseg-index.json").read_bytes()
    typed = ["dataset", "split", str(tiled), "--ratio", "train=0.5,val=0.25,test=0.25", "--seed", "3"]
    assert run(typed) == 0
    assert (tiled / "rsseg-index.json").read_bytes() == before
    assert "--overwrite" in capsys.readouterr().err
    assert run([*typed, "--overwrite"]) == 0
    index = SegmentationIndex.load(tiled)
    scenes = {(item.scene, item.split) for item in index.items}
    assert sorted(split for _, split in scenes) == ["test", "train", "train", "val"]
    assert run(["dataset", "verify", str(tiled)]) == 0
    assert run(["dataset", "split", str(tiled), "--ratio", "train=0.5,val=0.1"]) == 2


def test_split_of_an_index_of_another_name_is_written_to_that_file(tiled: Path) -> None:
    own, other = tiled / "rsseg-index.json", tiled / "other.json"
    before = own.read_bytes()
    other.write_bytes(before)
    assert run(["dataset", "split", str(other), "--ratio", "train=0.5,val=0.5", "--overwrite"]) == 0
    assert own.read_bytes() == before
    assert {item.split for item in SegmentationIndex.load(other).items} == {"train", "val"}


def test_split_by_block_leaves_out_tiles_between_blocks(tmp_path: Path) -> None:
    source = own_source(tmp_path / "src", size=(64, 64))
    out = prepare("folder", own_options(source, tmp_path / "out", tile=16, stride=8), quiet)
    typed = ["dataset", "split", str(out), "--ratio", "train=0.5,val=0.5", "--by", "block", "--block"]
    assert run([*typed, "32", "--overwrite"]) == 0
    items = SegmentationIndex.load(out).items
    covered: dict[str, set[tuple[str | None, int, int]]] = {"train": set(), "val": set(), "unused": set()}
    for item in items:
        assert item.origin is not None
        row, col = item.origin
        covered[item.split] |= {(item.scene, r, c) for r in range(row, row + 16) for c in range(col, col + 16)}
    assert covered["unused"]
    assert not covered["train"] & covered["val"]
    assert run([*typed, "8"]) == 2


def test_ctrl_c_says_where_the_rest_is_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = own_source(tmp_path / "src", size=(64, 64)), tmp_path / "out"
    write, calls = transfer.write_tile, []

    def interrupted(*arguments: object) -> None:
        calls.append(1)
        if len(calls) == 30:
            raise KeyboardInterrupt
        write(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(transfer, "write_tile", interrupted)
        assert run(command(source, out)) == 130
    assert f"{out}.partial; the same command continues" in capsys.readouterr().err
    assert not out.exists()
    assert run(command(source, out)) == 0
    assert len(SegmentationIndex.load(out).items) == 64


def test_a_full_disk_is_exit_code_6_and_the_rest_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = own_source(tmp_path / "src", size=(64, 64)), tmp_path / "out"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(transfer, "write_tile", full)
        assert run(command(source, out)) == 6
    assert "the disk is full" in capsys.readouterr().err
    assert run(command(source, out)) == 0


def test_a_palette_image_that_was_saved_as_colours_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = own_source(tmp_path / "src")
    write_png(source / "val/masks/0.png", np.random.default_rng(0).integers(0, 9, (24, 20, 3)).astype(np.uint8))
    assert run(command(source, tmp_path / "out")) == 4
    assert "palette image that was saved as red, green and blue" in capsys.readouterr().err


def test_tiles_open_in_other_programs_with_class_colours(tiled: Path) -> None:
    mask = next((tiled / "masks").rglob("*.tif"))
    with rasterio.open(mask) as file:
        assert file.colormap(1)[1][:3] == (0, 0, 255)
