"""Small seeded datasets on disk, and the folder of real images if it is there."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from PIL import Image
from rasterio.transform import Affine

from rsseg.config import BaseRecipe
from rsseg.data.index import IndexItem, LabelMap, SegmentationIndex
from rsseg.task import ClassInfo, Task

SHARED = Path(os.environ.get("RSSEG_SHARED", Path(__file__).parents[2] / "shared")).resolve()
COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
CLASSES = tuple(
    ClassInfo(name=name, value=value, color=color)
    for value, (name, color) in enumerate(zip(("field", "road", "water"), COLORS, strict=True))
)


class PlainRecipe(BaseRecipe):
    """A recipe without a method."""

    def stream_names(self) -> tuple[str, ...]:
        return ("labeled", "unlabeled")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"no real images in {SHARED}; set RSSEG_SHARED")
    return SHARED / "data"


def write_tif(path: Path, pixels: NDArray[Any], **options: Any) -> Path:
    """Write `(bands, h, w)` as a georeferenced GeoTIFF; `descriptions` and other rasterio options may be given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptions: Sequence[str] = options.pop("descriptions", ())
    profile = {
        "crs": "EPSG:32631",
        "transform": Affine(10, 0, 500000, 0, -10, 4000000),
        "dtype": pixels.dtype,
    } | options
    count, height, width = pixels.shape
    with rasterio.open(path, "w", driver="GTiff", count=count, height=height, width=width, **profile) as file:
        file.write(pixels)
        for band, description in enumerate(descriptions, start=1):
            file.set_band_description(band, description)
    return path


def write_png(path: Path, pixels: NDArray[np.uint8]) -> Path:
    """Write `(h, w)` or `(h, w, 3)`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def _scenes(bands: int, top: int, dtype: str) -> list[tuple[str, NDArray[Any], NDArray[np.uint8]]]:
    """Eight images of different sizes whose pixels tell the class: name, `(h, w, bands)`, class indices."""
    rng = np.random.default_rng(7)
    scenes = []
    for number in range(8):
        height, width = 40 + 3 * number, 64 - 5 * number
        mask = np.repeat(np.repeat(rng.integers(0, 3, (9, 9)), 8, 0), 8, 1)[:height, :width].astype(np.uint8)
        tones = np.linspace(0.2, 0.8, 3 * bands).reshape(3, bands)[mask] + rng.normal(0, 0.03, (height, width, bands))
        scenes.append((f"{number:02d}", (tones.clip(0, 1) * top).astype(dtype), mask))
    return scenes


def _split(number: int) -> str:
    return "train" if number < 5 else "val" if number < 7 else "test"


def _save(root: Path, task: Task, label_map: LabelMap, names: Sequence[tuple[str, str]], masks: Any) -> Path:
    items = tuple(
        IndexItem(
            image=image,
            mask=mask,
            split=_split(number),
            domain="north" if number % 2 else "south",
            classes=tuple(int(n) for n in np.bincount(masks[number].ravel(), minlength=3)),
        )
        for number, (image, mask) in enumerate(names)
    )
    SegmentationIndex(task=task, label_map=label_map, items=items).save(root)
    return root


def rgb_task(name: str = "tiny") -> Task:
    return Task(name=name, classes=CLASSES, bands=("red", "green", "blue"), scale=(1 / 255,) * 3, offset=(0.0,) * 3)


@pytest.fixture
def rgb_dataset(tmp_path: Path) -> Path:
    """Eight 8-bit PNG images with single-band masks; 5 train, 2 val, 1 test; domains north and south."""
    root, scenes = tmp_path / "rgb", _scenes(3, 255, "uint8")
    for name, image, mask in scenes:
        write_png(root / "images" / f"{name}.png", image)
        write_png(root / "masks" / f"{name}.png", mask)
    names = [(f"images/{name}.png", f"masks/{name}.png") for name, _, _ in scenes]
    return _save(root, rgb_task(), LabelMap(values={0: 0, 1: 1, 2: 2, 255: 255}), names, [m for _, _, m in scenes])


@pytest.fixture
def color_mask_dataset(tmp_path: Path) -> Path:
    """Like `rgb_dataset`, with masks in red, green and blue."""
    root, scenes = tmp_path / "color", _scenes(3, 255, "uint8")
    for name, image, mask in scenes:
        write_png(root / "images" / f"{name}.png", image)
        write_png(root / "masks" / f"{name}.png", np.array(COLORS, np.uint8)[mask])
    names = [(f"images/{name}.png", f"masks/{name}.png") for name, _, _ in scenes]
    label_map = LabelMap(colors=tuple((color, index) for index, color in enumerate(COLORS)))
    return _save(root, rgb_task(), label_map, names, [m for _, _, m in scenes])


@pytest.fixture
def uint16_dataset(tmp_path: Path) -> Path:
    """Eight 16-bit GeoTIFFs with four bands, deflate, nodata 0 in the first two rows, and GeoTIFF masks."""
    root, scenes = tmp_path / "uint16", _scenes(4, 10000, "uint16")
    for name, image, mask in scenes:
        image[:2] = 0
        write_tif(root / "images" / f"{name}.tif", image.transpose(2, 0, 1), nodata=0, compress="deflate", predictor=2)
        write_tif(root / "masks" / f"{name}.tif", mask[None])
    task = Task(
        name="tiny16",
        classes=CLASSES,
        bands=("red", "green", "blue", "nir"),
        dtype="uint16",
        scale=(1e-4,) * 4,
        offset=(0.0,) * 4,
    )
    names = [(f"images/{name}.tif", f"masks/{name}.tif") for name, _, _ in scenes]
    return _save(root, task, LabelMap(values={0: 0, 1: 1, 2: 2}), names, [m for _, _, m in scenes])


@pytest.fixture
def plain_recipe(rgb_dataset: Path) -> PlainRecipe:
    """Crops of 32 pixels, two at a time, from `rgb_dataset`."""
    return PlainRecipe.model_validate(
        {
            "name": "plain",
            "seed": 3,
            "data": {"path": rgb_dataset, "augment": {"crop_size": 32}},
            "trainer": {"batch_size": 2, "workers": 0},
        }
    )


def with_changes(recipe: BaseRecipe, **parts: dict[str, Any]) -> Any:
    """Copy of a recipe with keys of its parts replaced: `with_changes(recipe, trainer={"workers": 1})`."""
    values = recipe.model_dump()
    for part, changes in parts.items():
        values[part].update(changes)
    return type(recipe).model_validate(values)
