"""The built-in dataset: two regions of generated land cover with masks, unlabeled tiles and one georeferenced scene.

Every tile is a place of its own, so splits share nothing. The label map is the identity; images hold no zero pixel.

    domain  split       tiles  masks
    north   train       40     yes
    north   unlabeled   32     no
    north   val         8      yes
    north   test        12     yes
    south   unlabeled   40     no
    south   val         8      yes
    south   test        12     yes

`scene/scene.tif` is a place in the north with a collar without data; `scene/truth.tif` is its ground truth.
"""

import zlib
from collections.abc import Callable
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

from rsseg.data.cards import CARDS
from rsseg.data.index import IndexItem
from rsseg.data.prepare.landscape import Place, generate_place
from rsseg.data.prepare.looks import NORTH, SOUTH, Look

TILE = 256
SCENE_SHAPE = (1024, 1536)
SEED = 20
LOOKS = {"north": NORTH, "south": SOUTH}

CARD = CARDS["demo"]


class _Part(NamedTuple):
    domain: str
    split: str
    tiles: int
    masks: bool


PARTS = (
    _Part("north", "train", 40, True),
    _Part("north", "unlabeled", 32, False),
    _Part("north", "val", 8, True),
    _Part("north", "test", 12, True),
    _Part("south", "unlabeled", 40, False),
    _Part("south", "val", 8, True),
    _Part("south", "test", 12, True),
)


def demo_tile(domain: str, split: str, number: int, *, size: int = TILE) -> Place:
    """One tile of the dataset; the same arguments give the same pixels in every process."""
    generator = _generator(f"{domain}/{split}/{number}")
    cloud_level = float(generator.uniform(0.6, 1.5)) if number % 5 in (1, 3) else None
    return generate_place(generator, size, size, LOOKS[domain], cloud_level=cloud_level)


def demo_scene(*, shape: tuple[int, int] = SCENE_SHAPE, look: Look = NORTH) -> tuple[Place, NDArray[np.bool_]]:
    """The scene and where it has data: a rectangle that lies aslant in the raster, as a satellite's swath does."""
    place = generate_place(_generator("scene"), *shape, look, cloud_level=1.5)
    height, width = shape
    lean = round(0.09 * height)
    corners = np.array([[lean, 0], [width - 1, lean // 2], [width - 1 - lean, height - 1], [0, height - 1 - lean // 2]])
    valid = np.zeros(shape, np.uint8)
    cv2.fillConvexPoly(valid, corners.astype(np.int32), 1)
    return place, valid.astype(bool)


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng([SEED, zlib.crc32(name.encode())])


def write_demo(folder: Path, jobs: int, progress: Callable[[int, int], None]) -> tuple[IndexItem, ...]:
    """Generate all tiles and the scene into `folder`, which must be empty."""
    items = []
    with ThreadPoolExecutor(max_workers=max(jobs, 1)) as pool:
        tiles = [(part, number) for part in PARTS for number in range(part.tiles)]
        scene = pool.submit(_write_scene, folder / "scene")
        for done, item in enumerate(pool.map(lambda tile: _write_tile(folder, *tile), tiles), start=1):
            items.append(item)
            progress(done, len(tiles) + 1)
        scene.result()
        progress(len(tiles) + 1, len(tiles) + 1)
    return tuple(items)


def _write_tile(folder: Path, part: _Part, number: int) -> IndexItem:
    place = demo_tile(part.domain, part.split, number)
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


def _write_scene(folder: Path) -> None:
    place, valid = demo_scene()
    folder.mkdir(parents=True)
    gsd = CARD.gsd_m
    grid = {
        "driver": "GTiff", "height": SCENE_SHAPE[0], "width": SCENE_SHAPE[1], "dtype": "uint8", "crs": "EPSG:32632",
        "transform": from_origin(500_000.0, 5_400_000.0, gsd, gsd), "compress": "deflate", "tiled": True,
        "blockxsize": 256, "blockysize": 256,
    }  # fmt: skip
    with rasterio.open(folder / "scene.tif", "w", count=3, nodata=0, photometric="RGB", predictor=2, **grid) as file:
        file.write(np.where(valid, place.image.transpose(2, 0, 1), 0))
        file.colorinterp = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
    with rasterio.open(folder / "truth.tif", "w", count=1, nodata=255, **grid) as file:
        file.write(np.where(valid, place.label, np.uint8(255)), 1)
        file.write_colormap(1, {info.value: (*info.color, 255) for info in CARD.classes})
