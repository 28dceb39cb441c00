"""Add labeled images to a prepared dataset: windows with corrected masks, or scenes with labels drawn in a GIS."""

import glob
import hashlib
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import rasterio
from numpy.typing import NDArray

from rsseg.data.dataset import SampleReader
from rsseg.data.index import IndexItem, LabelMap, SegmentationIndex, match_classes
from rsseg.data.labels import LabelTable, histogram
from rsseg.datasets.class_file import ClassEntry, ClassFile, class_file_text, load_classes
from rsseg.datasets.measure import open_image, open_mask
from rsseg.datasets.prepare.options import PrepareOptions
from rsseg.datasets.prepare.run import Progress, prepare
from rsseg.datasets.prepare.tiles import TileMetadata, write_tile
from rsseg.datasets.prepare.transfer import place_file
from rsseg.datasets.prepare.vectors import ISSUES_NAME
from rsseg.errors import DataError, RssegWarning
from rsseg.files import write_text
from rsseg.raster import Raster, RasterInfo, Window
from rsseg.task import IGNORE_INDEX, Color, Task

IMAGES, MASKS, CLASSES = "images", "masks", "classes.yaml"
ADDED = "added"
"""Folder of a dataset that holds what was added, one folder per call."""
_SCENE_TAG, _MASK_TAG = "RSSEG_SCENE", "RSSEG_PREDICTED_MASK"
"""Of a window's image: its scene, and the hash of its predicted mask."""


@dataclass(frozen=True, eq=False)
class Chip:
    """A window of a scene.

    pixels: (bands, h, w)
    valid: bool (h, w)
    classes: uint8 (h, w), class indices
    info: grid of the scene
    """

    pixels: NDArray[Any]
    valid: NDArray[np.bool_]
    classes: NDArray[np.uint8]
    info: RasterInfo
    window: Window


def write_chip(folder: Path, name: str, chip: Chip, task: Task, *, source: str) -> None:
    """Write a window and its mask, which holds the `value` of each class and 255 where there is no data."""
    metadata = TileMetadata.of(chip.info, task.bands)
    write_tile(folder / IMAGES / name, chip.pixels, chip.window, metadata, chip.valid)
    values = np.full(256, IGNORE_INDEX, np.uint8)
    values[: task.num_classes] = [c.value for c in task.classes]
    mask = np.where(chip.valid, values[chip.classes], np.uint8(IGNORE_INDEX))
    colors = TileMetadata(metadata.crs, metadata.transform, colormap=tuple((c.value, c.color) for c in task.classes))
    write_tile(folder / MASKS / name, mask[None], chip.window, colors)
    with rasterio.open(folder / IMAGES / name, "r+") as file:
        predicted = _hash(np.where(chip.valid, chip.classes, np.uint8(IGNORE_INDEX)))
        file.update_tags(**{_SCENE_TAG: source, _MASK_TAG: predicted})


def write_chip_classes(folder: Path, task: Task) -> None:
    """Write the class file of the masks: what each pixel value means."""
    write_text(folder / CLASSES, class_file_text(_class_file(task)))


def add_chips(dataset: Path, chips: Path, *, split: str = "train") -> list[IndexItem]:
    """Add windows with corrected masks to a dataset; warns of those that are still as they were predicted.

    Args:
        dataset: prepared dataset.
        chips: folder with `images/`, `masks/` of the same names, and `classes.yaml`, as `write_chip` makes them.
        split: of the new images.

    Raises:
        DataError: a folder or mask is missing, an image is added already, an unknown mask value, or classes, bands or
            pixel types that differ from the dataset's.
    """
    index = SegmentationIndex.load(dataset)
    files = sorted(path for path in (chips / IMAGES).glob("*") if path.is_file() and path.suffix != ".xml")
    if not files:
        raise DataError(f"{chips}: no image in {IMAGES}/. Give a folder made by `rsseg suggest --chips`.")
    classes = load_classes(chips / CLASSES)
    names = [entry.name for entry in classes.classes]
    if set(names) != set(index.task.class_names):
        raise DataError(
            f"{chips / CLASSES}: the classes are {', '.join(names)}, those of {dataset} "
            f"{', '.join(index.task.class_names)}. Use the same names."
        )
    table = LabelTable(classes.label_map(), len(names))
    order = np.full(256, IGNORE_INDEX, np.uint8)
    order[: len(names)] = [index.task.class_names.index(name) for name in names]
    found, untouched = [], []
    for file in files:
        mask = next(iter(sorted((chips / MASKS).glob(f"{glob.escape(file.stem)}.*"))), None)
        if mask is None:
            raise DataError(f"{file}: there is no mask {MASKS}/{file.stem}.tif. Restore it, or remove the image.")
        with open_image([file], index.task.bands) as image, open_mask(mask, image.info) as raster:
            if image.info.dtype != index.task.dtype:
                raise DataError(
                    f"{file}: the pixels are {image.info.dtype}, those of {dataset} {index.task.dtype}. Cut the "
                    "windows from the same kind of scene."
                )
            labels, tags = table.read(raster, None), _tags_of(file)
        if tags.get(_MASK_TAG) == _hash(labels):
            untouched.append(file.name)
        found.append(_Labeled(file, file.name, order[labels], Path(tags.get(_SCENE_TAG, file.name)).stem))
    items = _adopt(dataset, index, found, split)
    if untouched:
        folder = index.root / Path(items[0].image).parents[1] / MASKS
        warnings.warn(
            f"{len(untouched)} of {len(files)} masks are as the model predicted them, {untouched[0]} first. A network "
            f"that is trained with them repeats its errors: check them, and correct them in {folder}.",
            RssegWarning,
            stacklevel=2,
        )
    return items


def add_vectors(dataset: Path, options: PrepareOptions, *, split: str, progress: Progress) -> list[IndexItem]:
    """Draw the labels of a vector file on scenes, as `prepare vectors` does, and add the labeled images to a dataset.

    Args:
        dataset: prepared dataset, whose classes the labels have.
        options: those of `prepare vectors`; output, class file, bands and splits are replaced.
        split: of the new images.
        progress: see `prepare`.

    Raises:
        DataError: no label lies in a scene, an unknown class, or bands or a pixel type that differ from the dataset's.
        UsageError: options that contradict each other.
    """
    index, labels = SegmentationIndex.load(dataset), options.vectors
    assert labels is not None
    with tempfile.TemporaryDirectory(prefix=".adding-", dir=index.root) as folder:
        classes = Path(folder) / CLASSES
        write_text(classes, class_file_text(_class_file(index.task)))

        def forward(text: str, done: int, total: int) -> None:
            if folder not in text:  # a file that is moved later
                progress(text, done, total)

        own: dict[str, Any] = {
            "out": Path(folder) / "made",
            "bands": index.task.bands,
            "split_ratio": {"train": 1.0},
            "vectors": labels.model_copy(update={"classes": classes}),
        }
        made = prepare("vectors", options.model_copy(update=own), forward)
        new = match_classes(SegmentationIndex.load(made), index.task.classes, what=str(labels.labels))
        if new.task.dtype != index.task.dtype:
            raise DataError(
                f"{options.src}: the pixels are {new.task.dtype}, those of {dataset} {index.task.dtype}. Give scenes "
                "of that type."
            )
        reader = SampleReader(new, new.task.bands, cache=False)
        found = (
            _Labeled(new.root / i.image, i.image.removeprefix(f"{IMAGES}/"), reader.mask(i), i.scene or i.image)
            for i in new.items
            if i.mask is not None
        )
        items = _adopt(dataset, index, found, split)
        if (made / ISSUES_NAME).is_file():
            listed = index.root / Path(*Path(items[0].image).parts[:2]) / ISSUES_NAME
            shutil.move(made / ISSUES_NAME, listed)
            progress(f"all issues of the labels are listed in {listed}", 1, 1)
        return items


class _Labeled(NamedTuple):
    """An image to add, its name below the folder of images, its class indices uint8 (h, w), and its scene."""

    file: Path
    name: str
    classes: NDArray[np.uint8]
    scene: str


def _adopt(dataset: Path, index: SegmentationIndex, found: Iterable[_Labeled], split: str) -> list[IndexItem]:
    """Copy images and write their masks (class indices) as the dataset's label map reads them; extends the index."""
    # added/NNN/images/NAME
    known = {
        str(PurePosixPath(*PurePosixPath(item.image).parts[3:]))
        for item in index.items
        if item.image.startswith(f"{ADDED}/")
    }
    number = 1
    while (index.root / ADDED / f"{number:03d}").exists():
        number += 1
    target = index.root / ADDED / f"{number:03d}"
    items = []
    values = dict(index.label_map.values)
    if values and IGNORE_INDEX not in (*values, *values.values()):
        # New masks have pixels without a label, even if those of the dataset have none.
        labels = LabelMap(values={**values, IGNORE_INDEX: IGNORE_INDEX})
        index = index.model_copy(update={"label_map": labels})
    with tempfile.TemporaryDirectory(prefix=".adding-", dir=index.root) as place:
        work = Path(place) / "new"
        for file, name, classes, scene in found:
            if name in known:
                raise DataError(
                    f"{index.root}: {name} was added before. Add only new windows, or give it another name."
                )
            _check_split(index, name, scene, split)
            image = work / place_file(f"{IMAGES}/{name}", file, Raster, work)
            with open_image([image], index.task.bands) as raster:
                info = raster.info
            mask = work / MASKS / Path(name).with_suffix(".tif")
            encoded = _encoded(classes, index.label_map)
            bands = ("label",) if len(encoded) == 1 else ("red", "green", "blue")
            metadata = TileMetadata(info.crs, info.transform, names=bands)
            write_tile(mask, encoded, Window(0, 0, *classes.shape), metadata)
            names = [
                f"{target.relative_to(index.root).as_posix()}/{p.relative_to(work).as_posix()}" for p in (image, mask)
            ]
            counts = histogram(classes)[: index.task.num_classes]
            if not counts.any():
                raise DataError(f"{file}: its mask has no labeled pixel. Correct it, or remove the window.")
            items.append(
                IndexItem(image=names[0], mask=names[1], split=split, scene=scene, classes=tuple(counts.tolist()))
            )
        target.parent.mkdir(exist_ok=True)
        work.rename(target)
    index.model_copy(update={"items": (*index.items, *items)}).save(dataset)
    return items


def _check_split(index: SegmentationIndex, name: str, scene: str, split: str) -> None:
    """Warn if an image of a scene is to be in another split than the rest of it."""
    known = {item.split for item in index.items if (item.scene or Path(item.image).stem) == scene}
    # Unlabeled images are no test of anything.
    others = known - {split, "unlabeled"}
    if others and split not in known:
        warnings.warn(
            f"{name} seems to be part of {scene}, which is in the split {min(others)!r}: one place would be learnt and "
            f"tested. If it is, add such windows with --split {min(others)}, or leave them out.",
            RssegWarning,
            stacklevel=2,
        )


def _encoded(classes: NDArray[np.uint8], labels: LabelMap) -> NDArray[Any]:
    """Class indices as mask pixels (bands, h, w) that the label map reads back."""
    pairs: list[tuple[int | Color, int]] = [*labels.values.items(), *labels.colors]
    raw_of = {index: raw for raw, index in reversed(pairs)}
    found = np.unique(classes).tolist()
    if missing := [index for index in found if index not in raw_of]:
        what = "ignored pixels" if missing[0] == IGNORE_INDEX else f"class {missing[0]}"
        raise DataError(
            f"the masks of the dataset have no value for {what}. Prepare it again with an ignored value (--ignore 255)."
        )
    first = next(iter(raw_of.values()))
    bands = 3 if isinstance(first, tuple) else 1
    table = np.zeros((256, bands), np.int64)
    for index in found:
        table[index] = raw_of[index]
    encoded = table[classes].transpose(2, 0, 1)
    if encoded.min() < 0 or encoded.max() > 255:
        return encoded.astype(np.int32)
    return encoded.astype(np.uint8)


def _class_file(task: Task) -> ClassFile:
    entries = tuple(ClassEntry(name=c.name, color=c.color, value=c.value) for c in task.classes)
    name = "".join(c if c.isalnum() or c in "_ .-" else "_" for c in task.name).lstrip(" .-") or "classes"
    ignored = () if any(c.value == IGNORE_INDEX for c in task.classes) else (IGNORE_INDEX,)
    return ClassFile(name=name, classes=entries, ignore=ignored)


def _tags_of(file: Path) -> dict[str, str]:
    with rasterio.open(file) as raster:
        return dict(raster.tags())


def _hash(labels: NDArray[np.uint8]) -> str:
    """Of class indices (h, w)."""
    return hashlib.blake2b(np.ascontiguousarray(labels).data, digest_size=16).hexdigest()
