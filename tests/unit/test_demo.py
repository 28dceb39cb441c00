"""The generated dataset."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import rasterio

from rsseg.datasets.demo.dataset import PARTS, demo_scene, demo_tile, write_demo
from rsseg.datasets.prepare.finish import finish_index
from rsseg.datasets.prepare.options import PrepareOptions
from rsseg.datasets.prepare.plan import make_plan
from rsseg.datasets.verify import verify


def quiet(done: int, total: int) -> None:
    """No progress."""


def digest(domain: str, number: int) -> str:
    place = demo_tile(domain, "train", number, size=64)
    return hashlib.sha256(place.image.tobytes() + place.label.tobytes()).hexdigest()


def test_a_tile_is_the_same_bit_for_bit_in_another_process() -> None:
    code = "from tests.unit.test_demo import digest; print(digest('north', 1), digest('south', 3))"
    root = Path(__file__).parents[2]
    other = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert other.stdout.split() == [digest("north", 1), digest("south", 3)]


def test_pixels_and_classes_are_those_of_the_published_dataset() -> None:
    """Not a hash: other processors may round the last bit of a sine or a blur differently."""
    place = demo_tile("north", "test", 0)
    shares = np.bincount(place.label.ravel(), minlength=6) / place.label.size
    np.testing.assert_allclose(place.image.mean((0, 1)), (141.28, 141.33, 106.89), atol=0.5)
    np.testing.assert_allclose(shares, (0.7537, 0.0313, 0.0541, 0.0248, 0.1360, 0), atol=5e-3)


def test_tiles_of_different_splits_and_numbers_are_different_places() -> None:
    labels = [demo_tile("north", split, number, size=64).label for split in ("train", "test") for number in (0, 1)]
    assert all((a != b).mean() > 0.1 for i, a in enumerate(labels) for b in labels[:i])


def test_no_valid_pixel_is_zero_so_that_zero_can_mean_no_data() -> None:
    assert demo_tile("south", "val", 1, size=96).image.min() >= 1


def test_colour_alone_does_not_tell_the_classes() -> None:
    """The best linear rule on single pixels (discriminant analysis) stays far below what shapes allow."""
    places = [demo_tile("north", "train", number) for number in range(8)]
    pixels = np.concatenate([place.image[::3, ::3].reshape(-1, 3) for place in places]).astype(float)
    label = np.concatenate([place.label[::3, ::3].ravel() for place in places])
    share = np.bincount(label, minlength=6) / len(label)
    mean = np.stack([pixels[label == c].mean(0) for c in range(6)])
    inverse = np.linalg.inv(np.cov((pixels - mean[label]).T))
    score = pixels @ inverse @ mean.T - np.einsum("ci,ij,cj->c", mean, inverse, mean) / 2 + np.log(share)
    matrix = np.bincount(6 * label + score.argmax(1), minlength=36).reshape(6, 6)
    iou = matrix.diagonal() / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())
    assert 0.2 < iou.mean() < 0.5


def test_domains_differ_at_a_glance() -> None:
    north, south = (
        np.mean([demo_tile(domain, "val", i).image.mean((0, 1)) for i in (0, 2, 4)], 0) for domain in ("north", "south")
    )
    assert north[1] > north[0]
    assert south[0] > south[1]


def test_the_collar_of_the_scene_is_aslant() -> None:
    _, valid = demo_scene(shape=(128, 192))
    assert 0.6 < valid.mean() < 0.95
    assert not valid[[0, 0, -1, -1], [0, -1, 0, -1]].any()


def test_all_domains_splits_masks_and_a_georeferenced_scene_are_written(tmp_path: Path) -> None:
    parts = [part._replace(tiles=2) for part in PARTS]
    items = write_demo(tmp_path, 2, quiet, parts=parts, size=64, scene_shape=(96, 128))
    assert {(i.domain, i.split, i.mask is not None) for i in items} == {(p.domain, p.split, p.masks) for p in PARTS}
    plan = make_plan("demo", PrepareOptions())
    index = finish_index(tmp_path, plan, None, items, scale="auto", jobs=2, progress=lambda *_: None)
    index.save(tmp_path)
    assert verify(tmp_path, pixels=True).ok
    with rasterio.open(tmp_path / "scene/scene.tif") as scene, rasterio.open(tmp_path / "scene/truth.tif") as truth:
        assert (scene.crs.to_epsg(), scene.res, scene.nodata, scene.count) == (32632, (2.0, 2.0), 0, 3)
        assert truth.transform == scene.transform
        np.testing.assert_array_equal(scene.dataset_mask() == 0, truth.read(1) == 255)


def test_the_dataset_as_shipped_has_enough_of_everything() -> None:
    tiles = {(part.domain, part.split): part.tiles for part in PARTS if part.masks}
    assert tiles["north", "train"] >= 40
    assert {split for domain, split in tiles if domain == "north"} == {"train", "val", "test"}
    assert {split for domain, split in tiles if domain == "south"} == {"val", "test"}
    assert {part.domain for part in PARTS if not part.masks} == {"north", "south"}
