"""The built-in dataset: two regions of generated land cover with masks, unlabeled tiles and one georeferenced scene.

No two tiles show the same place, so splits share nothing. The label map is the identity; no image pixel is 0.

`scene/scene.tif` is a scene of the north with a nodata collar, `scene/truth.tif` its ground truth.
"""

import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import rasterio
from numpy.typing import NDArray
from PIL import Image
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin

from rsseg.data.index import IndexItem
from rsseg.datasets.cards import CARDS
from rsseg.datasets.demo.landscape import Canvas, Look, add_clouds, sense
from rsseg.datasets.measure import in_order
from rsseg.datasets.prepare.tiles import writing

NORTH = Look(
    crops=(
        (0.30, 0.44, 0.18), (0.22, 0.38, 0.14), (0.17, 0.29, 0.12), (0.47, 0.52, 0.25), (0.66, 0.58, 0.37),
        (0.60, 0.52, 0.40), (0.44, 0.36, 0.27), (0.33, 0.27, 0.21), (0.55, 0.53, 0.47), (0.27, 0.31, 0.19),
    ),
    woods=((0.14, 0.23, 0.11), (0.11, 0.19, 0.11), (0.20, 0.30, 0.12), (0.25, 0.28, 0.14)),
    roads=((0.44, 0.43, 0.42), (0.33, 0.33, 0.34), (0.57, 0.55, 0.51), (0.61, 0.53, 0.41)),
    roofs=(
        (0.56, 0.36, 0.27), (0.47, 0.31, 0.24), (0.36, 0.29, 0.25), (0.42, 0.42, 0.43), (0.30, 0.31, 0.33),
        (0.64, 0.60, 0.53), (0.83, 0.83, 0.82),
    ),
    waters=((0.12, 0.18, 0.20), (0.15, 0.22, 0.17), (0.19, 0.26, 0.27), (0.29, 0.29, 0.22)),
    parcel_px=(38.0, 110.0),
    crown_px=5.0,
    haze=0.04,
    haze_color=(0.75, 0.80, 0.88),
    response=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    gamma=0.85,
)  # fmt: skip
"""Temperate early summer, clear air, true colours."""

SOUTH = Look(
    crops=(
        (0.46, 0.46, 0.24), (0.36, 0.40, 0.19), (0.70, 0.58, 0.36), (0.62, 0.48, 0.31), (0.55, 0.40, 0.28),
        (0.66, 0.61, 0.48), (0.58, 0.55, 0.33), (0.45, 0.34, 0.25), (0.40, 0.36, 0.23),
    ),
    woods=((0.20, 0.25, 0.13), (0.25, 0.28, 0.15), (0.17, 0.21, 0.12)),
    roads=((0.48, 0.46, 0.44), (0.38, 0.37, 0.36), (0.62, 0.55, 0.44), (0.58, 0.52, 0.45)),
    roofs=(
        (0.72, 0.68, 0.61), (0.82, 0.80, 0.77), (0.58, 0.42, 0.32), (0.62, 0.56, 0.47), (0.45, 0.41, 0.38),
    ),
    waters=((0.20, 0.28, 0.24), (0.16, 0.24, 0.24), (0.30, 0.32, 0.25)),
    parcel_px=(26.0, 80.0),
    crown_px=6.0,
    haze=0.11,
    haze_color=(0.86, 0.81, 0.72),
    response=((0.96, 0.08, 0.0), (0.06, 0.88, 0.0), (0.02, 0.10, 0.80)),
    gamma=0.9,
)  # fmt: skip
"""Dry late summer, dusty air, small parcels, flat pale roofs, a sensor whose bands overlap."""

TILE = 256
SCENE_SHAPE = (1024, 1536)
SEED = 20
LOOKS = {"north": NORTH, "south": SOUTH}

CARD = CARDS["demo"]


class Place(NamedTuple):
    """image uint8 (H, W, 3), never 0, and label uint8 (H, W): the class index of each pixel."""

    image: NDArray[np.uint8]
    label: NDArray[np.uint8]


class Part(NamedTuple):
    """Tiles of one domain and split."""

    domain: str
    split: str
    tiles: int
    masks: bool


PARTS = (
    Part("north", "train", 40, True),
    Part("north", "unlabeled", 32, False),
    Part("north", "val", 8, True),
    Part("north", "test", 12, True),
    Part("south", "unlabeled", 40, False),
    Part("south", "val", 8, True),
    Part("south", "test", 12, True),
)


def generate_place(
    rng: np.random.Generator, height: int, width: int, look: Look, *, cloud_level: float | None
) -> Place:
    """Generate a place; equal generator states give equal pixels.

    Args:
        rng: random generator.
        height: rows.
        width: columns.
        look: the region.
        cloud_level: clouds appear where a noise of unit variance exceeds this; None for a clear sky.
    """
    shape = (height, width)
    canvas = Canvas(rng, shape, look)
    canvas.fields()
    canvas.forests()
    canvas.waters()
    for road in canvas.roads():
        for _ in range(max(len(road) // 200, 1)):
            canvas.settlement(road)
    canvas.farmsteads()
    surface = canvas.lit()
    label = canvas.label
    if cloud_level is not None:
        surface, label = add_clouds(rng, surface, label, cloud_level)
    return Place(sense(rng, surface, look), label)


def demo_tile(domain: str, split: str, number: int, *, size: int = TILE) -> Place:
    """One tile of the dataset; equal arguments give equal pixels."""
    generator = _generator(f"{domain}/{split}/{number}")
    cloud_level = float(generator.uniform(0.6, 1.5)) if number % 5 in (1, 3) else None
    return generate_place(generator, size, size, LOOKS[domain], cloud_level=cloud_level)


def demo_scene(*, shape: tuple[int, int] = SCENE_SHAPE) -> tuple[Place, NDArray[np.bool_]]:
    """The scene, and where it has data: a rotated rectangle, as in satellite images."""
    place = generate_place(_generator("scene"), *shape, NORTH, cloud_level=1.5)
    height, width = shape
    lean = round(0.09 * height)
    corners = np.array([[lean, 0], [width - 1, lean // 2], [width - 1 - lean, height - 1], [0, height - 1 - lean // 2]])
    valid = np.zeros(shape, np.uint8)
    cv2.fillConvexPoly(valid, corners.astype(np.int32), 1)
    return place, valid.astype(bool)


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng([SEED, zlib.crc32(name.encode())])


def write_demo(
    folder: Path,
    jobs: int,
    progress: Callable[[int, int], None],
    *,
    parts: Sequence[Part] = PARTS,
    size: int = TILE,
    scene_shape: tuple[int, int] = SCENE_SHAPE,
) -> tuple[IndexItem, ...]:
    """Generate tiles of `size` pixels and the scene into `folder`, which must be empty."""
    tiles = [(part, number) for part in parts for number in range(part.tiles)]
    with ThreadPoolExecutor(max_workers=1) as pool:
        scene = pool.submit(_write_scene, folder / "scene", scene_shape)
        items = in_order(lambda tile: _write_tile(folder, *tile, size), tiles, jobs, progress)
        written = tuple(items)
        scene.result()
    return written


def _write_tile(folder: Path, part: Part, number: int, size: int) -> IndexItem:
    place = demo_tile(part.domain, part.split, number, size=size)
    name = f"{part.domain}/{part.split}/{{}}/{part.domain}_{part.split}_{number:02d}.png"
    image, mask = name.format("images"), name.format("masks") if part.masks else None
    (folder / image).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(place.image).save(folder / image, compress_level=1)
    if mask is not None:
        (folder / mask).parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(place.label)
        picture.putpalette(bytes(value for info in CARD.classes for value in info.color))
        picture.save(folder / mask, compress_level=6)
    return IndexItem(image=image, mask=mask, split=part.split, domain=part.domain)


def _write_scene(folder: Path, shape: tuple[int, int]) -> None:
    place, valid = demo_scene(shape=shape)
    folder.mkdir(parents=True, exist_ok=True)
    gsd = CARD.gsd_m
    grid = {
        "driver": "GTiff", "height": shape[0], "width": shape[1], "dtype": "uint8", "crs": "EPSG:32632",
        "transform": from_origin(500_000.0, 5_400_000.0, gsd, gsd), "compress": "deflate", "tiled": True,
        "blockxsize": 256, "blockysize": 256,
    }  # fmt: skip
    with (
        writing(folder),
        rasterio.open(folder / "scene.tif", "w", count=3, nodata=0, photometric="RGB", predictor=2, **grid) as file,
    ):
        file.write(np.where(valid, place.image.transpose(2, 0, 1), 0))
        file.colorinterp = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
    with writing(folder), rasterio.open(folder / "truth.tif", "w", count=1, nodata=255, **grid) as file:
        file.write(np.where(valid, place.label, np.uint8(255)), 1)
        file.write_colormap(1, {info.value: (*info.color, 255) for info in CARD.classes})
