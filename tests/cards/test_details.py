"""What single cards promise beside being prepared at all."""

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from rsseg.data.index import SegmentationIndex
from rsseg.datasets.card import WebSource, fetch_web
from rsseg.datasets.cards import CARDS
from rsseg.datasets.prepare.options import PrepareOptions
from rsseg.datasets.prepare.run import prepare
from rsseg.errors import DataError, UsageError
from tests.cards.miniatures import (
    city_osm,
    deepglobe,
    gid,
    landcovernet,
    loveda,
    loveda_zips,
    mask_of,
    pixels,
    potsdam,
    potsdam_zips,
    scene,
)
from tests.conftest import write_png, write_tif


def quiet(what: str, done: int, total: int) -> None:
    """No progress."""


def made(card: str, source: Path, out: Path, **options: Any) -> SegmentationIndex:
    return SegmentationIndex.load(prepare(card, PrepareOptions(src=source, out=out, jobs=1, **options), quiet))


def test_label_tiles_take_the_grid_of_their_image(tmp_path: Path) -> None:
    source = potsdam(tmp_path / "src", kinds=("IRRG",))
    for file in (source / "3_Ortho_IRRG").glob("*.tif"):
        with rasterio.open(file) as image:
            content = image.read()
        write_tif(file, content, crs=None, transform=None)
    index = made("potsdam", source, tmp_path / "out", tile=16)
    item = next(item for item in index.items if item.origin == (16, 32))
    for file in (*index.image_files(item), index.mask_file(item)):
        with rasterio.open(file) as tile:
            # of the world file beside the image
            assert tile.transform.a == pytest.approx(0.05)
            assert tile.transform.c == pytest.approx(366976.5 - 0.025 + 32 * 0.05)


def test_the_published_grid_drops_the_rest_and_the_default_keeps_it(tmp_path: Path) -> None:
    source = potsdam(tmp_path / "src", kinds=("RGB",), size=(40, 56))
    whole = made("potsdam", source, tmp_path / "a", tile=16)
    published = made("potsdam", source, tmp_path / "b", split="st-dasegnet", tile=16)
    tiles = [{item.origin for item in index.items if item.scene == "2_10"} for index in (whole, published)]
    assert max(tiles[0]) == (24, 40)
    assert tiles[1] == {(row, col) for row in (0, 16) for col in (0, 16, 32)}


def test_images_smaller_than_a_tile_are_dropped_where_remainders_are(tmp_path: Path) -> None:
    source = city_osm(tmp_path / "src")
    for kind, image in (("image", pixels), ("labels", lambda classes: mask_of("city-osm", classes))):
        write_png(source / f"paris/paris1_{kind}.png", image(scene("paris1", 3, (8, 30))))
    index = made("city-osm", source, tmp_path / "out", split="st-dasegnet", tile=16)
    assert "paris1" not in {item.scene for item in index.items}
    assert len(index.items) == 9 * 2 * 3


def test_padding_is_clutter_where_it_was_published_so(tmp_path: Path) -> None:
    source = potsdam(tmp_path / "src", kinds=("RGB",), size=(40, 40))
    index = made("potsdam", source, tmp_path / "out", split="rs-dwl", tile=32)
    corner = next(item for item in index.items if item.origin == (32, 32))
    mask = index.mask_file(corner)
    assert mask is not None
    with rasterio.open(mask) as file:
        assert (file.shape, set(file.read(1)[8:].ravel())) == ((32, 32), {5})


def test_loveda_keeps_domains_and_hides_the_masks_of_test(tmp_path: Path) -> None:
    index = made("loveda", loveda(tmp_path / "src"), tmp_path / "out")
    assert {(item.split, item.domain) for item in index.items} == {
        (split, domain) for split in ("train", "val", "test") for domain in ("rural", "urban")
    }
    assert {item.split for item in index.items if item.mask is None} == {"test"}
    assert index.label_map.values[0] == 255


def test_label_lists_name_images_of_the_index(tmp_path: Path) -> None:
    index = made("loveda", loveda(tmp_path / "src", (80, 80)), tmp_path / "out", split="rs-dwl", tile=8)
    lists = {path.name: path.read_text().split() for path in (tmp_path / "out/lists").iterdir()}
    assert sorted(lists) == ["labeled-10pct.txt", "labeled-1pct.txt", "labeled-5pct.txt"]
    assert len(lists["labeled-5pct.txt"]) == 30
    assert set(lists["labeled-10pct.txt"]) <= {item.image for item in index.items if item.split == "train"}


def test_colours_that_are_not_pure_are_rounded_for_deepglobe(tmp_path: Path) -> None:
    index = made("deepglobe", deepglobe(tmp_path / "src", others=("valid",)), tmp_path / "out")
    assert sum(item.split == "unlabeled" for item in index.items) == 1
    with_unknown = made("deepglobe", deepglobe(tmp_path / "src"), tmp_path / "b", labels="with-unknown")
    assert with_unknown.task.class_names == (*index.task.class_names, "unknown")
    unknown = sum(item.classes[6] for item in with_unknown.items if item.classes)
    assert unknown > 0
    counted = sum(sum(item.classes) for item in index.items if item.classes)
    assert counted + unknown == 6 * 40 * 48


def test_unknown_colours_name_the_line_to_add_and_become_what_was_published(tmp_path: Path) -> None:
    source = city_osm(tmp_path / "src")
    mask = mask_of("city-osm", scene("paris1", 3))
    mask[5, 7:9] = (10, 11, 12)
    write_png(source / "paris/paris1_labels.png", mask)
    expected = (
        r"\(10, 11, 12\) \(2 pixels\), first at row 5, column 7; .*ignore_colors: \[\"#0a0b0c\"\].*--ignore '#0a0b0c'"
    )
    with pytest.raises(DataError, match=rf"paris1_labels\.png: .*{expected}"):
        made("city-osm", source, tmp_path / "a")
    ignored = made("city-osm", source, tmp_path / "b", ignore=[(10, 11, 12)])
    published = made("city-osm", source, tmp_path / "c", split="st-dasegnet", tile=8)
    totals = [np.sum([item.classes for item in index.items], axis=0) for index in (ignored, published)]
    assert (totals[1] - totals[0]).tolist() == [2, 0, 0]
    with pytest.raises(UsageError, match="hold colours"):
        made("city-osm", source, tmp_path / "d", ignore=[7])


def test_only_listed_dates_of_landcovernet_are_used_and_may_be_stretched(tmp_path: Path) -> None:
    source = landcovernet(tmp_path / "src")
    index = made("landcovernet-s2", source, tmp_path / "a")
    assert len(index.items) == 5 * 2 * 2
    assert index.task.dtype == "uint16"
    stretched = made("landcovernet-s2", source, tmp_path / "b", bands=("red", "green"), stretch="minmax")
    assert (stretched.task.dtype, stretched.task.bands) == ("uint8", ("red", "green"))
    with rasterio.open(stretched.image_files(stretched.items[0])[0]) as file:
        band = file.read(2)
        assert (band.min(), band.max(), file.descriptions) == (0, 255, ("red", "green"))


def test_the_fourth_band_is_kept_as_data(tmp_path: Path) -> None:
    index = made("gid5", gid(tmp_path / "src"), tmp_path / "out", tile=16)
    assert index.task.bands == ("nir", "red", "green", "blue")
    item = next(item for item in index.items if item.scene and item.scene.endswith("0-MSS1") and item.origin == (0, 0))
    with rasterio.open(index.image_files(item)[0]) as file:
        np.testing.assert_array_equal(file.read(), pixels(scene("gid0", 5), 4).transpose(2, 0, 1)[:, :16, :16])


def test_missing_labels_and_unknown_choices_say_what_there_is(tmp_path: Path) -> None:
    source = potsdam(tmp_path / "src", kinds=("RGB",), labels=("5_Labels_all_noBoundary",))
    with pytest.raises(DataError, match="Pass --labels no-boundary"):
        made("potsdam", source, tmp_path / "out")
    for options, expected in (
        ({"split": "paper"}, "--split paper: potsdam has isprs, isprs-val"),
        ({"labels": "half"}, "--labels half: potsdam has full, no-boundary"),
        ({"bands": ("swir",)}, "--bands swir: potsdam has red,green,blue or nir,red,green"),
        ({"ignore_classes": ("water",)}, "--ignore-class water: there is no such class; there are impervious"),
    ):
        with pytest.raises(UsageError, match=expected):
            made("potsdam", source, tmp_path / "out", **options)


def test_an_archive_that_ends_early_or_escapes_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    packed = loveda_zips(tmp_path)
    content = (packed / "Val.zip").read_bytes()
    (packed / "Val.zip").write_bytes(content[: len(content) // 2] + content[-200:])
    with pytest.raises(DataError, match="damaged or incomplete"):
        made("loveda", packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_only_what_is_wanted_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = potsdam_zips(tmp_path)
    seen: set[str] = set()

    def look(what: str, done: int, total: int) -> None:
        if what == "cut tiles":
            seen.update(path.name for path in (tmp_path / "out.partial/.unpacked").iterdir())

    options = PrepareOptions(src=packed, out=tmp_path / "out", jobs=1, tile=16, bands=("nir", "red", "green"))
    prepare("potsdam", options, look)
    # three sources of these bands: false-colour files, and four-band files that hold them too
    assert seen == {"3_Ortho_IRRG", "4_Ortho_RGBIR", "5_Labels_all"}


@pytest.mark.parametrize("size", [(1, 1), (2, 2)])
def test_tiny_images_and_odd_names_work(tmp_path: Path, size: tuple[int, int]) -> None:
    source = tmp_path / "my [src] ü"
    for number in range(5):
        name = f"GF2 (ä)[{number}] 卫星"
        classes = scene(name, 5, size)
        base = source / "Large-scale_Classification_5classes"
        write_tif(base / "image_NirRGB" / f"{name}.tif", pixels(classes, 4).transpose(2, 0, 1))
        write_tif(base / "label_5classes" / f"{name}_label.tif", mask_of("gid5", classes).transpose(2, 0, 1))
    for out, tile in (("whole", None), ("tiles", 2)):
        index = made("gid5", source, tmp_path / out, tile=tile)
        assert sum(sum(item.classes or ()) for item in index.items) == 5 * size[0] * size[1]


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A server of a folder on this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    (tmp_path / "served").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_files_from_the_web_are_fetched_with_consent_and_checked(tmp_path: Path, web: str) -> None:
    import dataclasses

    (tmp_path / "served/Train.zip").write_bytes(b"content")
    md5 = hashlib.md5(b"content").hexdigest()
    card = dataclasses.replace(CARDS["loveda"], web=(WebSource(f"{web}/Train.zip", "Train.zip", md5),))
    folder = tmp_path / "fetched"
    with pytest.raises(DataError, match=r"--download to fetch Train\.zip \(licence cc-by-nc-sa"):
        fetch_web(card, folder, download=False, offline=False, progress=quiet)
    with pytest.raises(DataError, match="offline"):
        fetch_web(card, folder, download=True, offline=True, progress=quiet)
    folder.mkdir()
    (folder / "Train.zip.partial").write_bytes(b"con")
    fetch_web(card, folder, download=True, offline=False, progress=quiet)
    assert (folder / "Train.zip").read_bytes() == b"content"
    assert fetch_web(card, folder, download=False, offline=True, progress=quiet) == folder
    (folder / "Train.zip").unlink()
    (tmp_path / "served/Train.zip").write_bytes(b"other")
    with pytest.raises(DataError, match="MD5"):
        fetch_web(card, folder, download=True, offline=False, progress=quiet)
    assert list(folder.iterdir()) == []
