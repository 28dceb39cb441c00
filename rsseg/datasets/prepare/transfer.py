"""Copy the files of a dataset into the stage, whole or cut into tiles.

Whole images are hard-linked if the disk allows it. Tiles are GeoTIFF with Zstandard, processed row by row, so that
several threads share a large scene. Converted masks hold class indices, and 255 for ignored pixels.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rsseg.data.index import IndexItem, LabelMap
from rsseg.data.labels import LabelTable
from rsseg.datasets.card import Variant
from rsseg.datasets.measure import in_order, mask_errors, open_image, open_mask
from rsseg.datasets.prepare.plan import Plan
from rsseg.datasets.prepare.tiles import TileMetadata, copy_as_tiff, tile_name, write_tile
from rsseg.errors import DataError
from rsseg.files import require_free_disk
from rsseg.raster import Raster, RasterInfo, Window
from rsseg.task import IGNORE_INDEX

Progress = Callable[[int, int], None]

JOURNAL = ".done"
"""Below the stage: results of finished steps."""


@dataclass(frozen=True)
class Transfer:
    """How the files of one layout are copied and converted."""

    plan: Plan
    variant: Variant

    @property
    def bands(self) -> tuple[str, ...] | None:
        """Names of the files' bands; None uses the files' own."""
        return self.variant.bands or None

    @property
    def chosen(self) -> tuple[int, ...] | None:
        """0-based bands to keep, in order; None keeps all."""
        kept = self.plan.bands
        if kept is None or kept == self.variant.bands:
            return None
        return tuple(self.variant.bands.index(band) for band in kept)

    @property
    def rewrites_images(self) -> bool:
        """Whether images are rewritten."""
        return self.plan.grid is not None or self.chosen is not None or self.plan.stretch

    @property
    def converts_masks(self) -> bool:
        """Whether masks are rewritten as class indices."""
        return bool(self.plan.labels.label_map.colors) or self.plan.card.first_mask_band or self.rewrites_images

    @cached_property
    def labels(self) -> LabelTable:
        """Meaning of the values or colours of the files' masks."""
        rule, labels = self.plan.rule, self.plan.labels
        unknown = rule.unknown_label if rule is not None and rule.ignore_unknown else None
        return LabelTable(labels.label_map, len(labels.classes), unknown=unknown)

    @property
    def label_map(self) -> LabelMap:
        """Meaning of the copied masks."""
        if not self.converts_masks:
            return self.plan.labels.label_map
        return LabelMap(values={**{i: i for i in range(len(self.plan.labels.classes))}, IGNORE_INDEX: IGNORE_INDEX})


class Journal:
    """Results of finished steps, kept below the stage for resuming."""

    def __init__(self, stage: Path) -> None:
        """Use the stage's folder."""
        self._folder = stage / JOURNAL
        self._folder.mkdir(exist_ok=True)

    def get(self, number: int) -> Any | None:
        """The result of a step, or None."""
        try:
            return json.loads((self._folder / str(number)).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def put(self, number: int, result: Any) -> None:
        """Store the result of a step, as JSON."""
        partial = self._folder / f"{number}.partial"
        partial.write_text(json.dumps(result), encoding="utf-8")
        partial.replace(self._folder / str(number))


class _Part(NamedTuple):
    """Some windows of an item; None: the whole files."""

    item: IndexItem
    windows: tuple[Window, ...] | None


def transfer(
    items: Sequence[IndexItem], files: Mapping[str, Path], stage: Path, how: Transfer, jobs: int, progress: Progress
) -> list[IndexItem]:
    """Copy all items into `stage`; steps that an interrupted call finished are not repeated.

    Args:
        items: images with masks and splits; their paths are keys of `files`.
        files: paths of the files.
        stage: folder to fill.
        how: conversions.
        jobs: threads; the result does not depend on their number.
        progress: called with the numbers of finished and of all steps.

    Returns:
        Items with paths relative to `stage`, one per tile that has a pixel with data.

    Raises:
        DataError: an unreadable file, a mask of another size, undeclared labels, two images of one name in `stage`.
        MachineError: the disk is full.
    """
    _check_names([item for item in items if how.rewrites_images or (how.converts_masks and item.mask)])
    planned = in_order(lambda item: _parts(item, files, how), items, jobs)
    parts = [part for several in planned for part in several]
    journal = Journal(stage)

    def copy(number: int) -> list[IndexItem]:
        done = journal.get(number)
        if done is None:
            done = [item.model_dump(mode="json") for item in _copy(parts[number], files, stage, how)]
            journal.put(number, done)
        return [IndexItem.model_validate(item) for item in done]

    copied = list(in_order(copy, range(len(parts)), jobs, progress))
    return [item for several in copied for item in several]


def _check_names(items: Sequence[IndexItem]) -> None:
    """Raise `DataError` for two rewritten images whose tiles or masks, all GeoTIFFs, would have the same name."""
    seen: dict[PurePosixPath, str] = {}
    for name in (_names(item)[0] for item in items):
        other = seen.setdefault(PurePosixPath(name).with_suffix(""), name)
        if other != name:
            raise DataError(
                f"{other} and {name} differ by their ending only, but are written anew. Rename one of them."
            )


def _parts(item: IndexItem, files: Mapping[str, Path], how: Transfer) -> list[_Part]:
    """One part per row of tiles if files allow random access, else one for the image: PNG and JPEG are sequential."""
    if how.plan.grid is None:
        return [_Part(item, None)]
    with _open(item, files, how) as raster:
        info = raster.info
    windows = how.plan.grid.windows(info.height, info.width)
    if not windows:
        # smaller than a tile of a grid that drops remainders
        return []
    if how.plan.stretch or not all(name.lower().endswith((".tif", ".tiff", ".vrt")) for name in _names(item)):
        return [_Part(item, tuple(windows))]
    rows = sorted({window.row for window in windows})
    return [_Part(item, tuple(window for window in windows if window.row == row)) for row in rows]


def _copy(part: _Part, files: Mapping[str, Path], stage: Path, how: Transfer) -> list[IndexItem]:
    item, windows = part
    if windows is not None:
        return _cut(item, windows, files, stage, how)
    if how.rewrites_images:
        with _open(item, files, how) as raster:
            whole = Window(0, 0, raster.info.height, raster.info.width)
        return _cut(item, (whole,), files, stage, how)
    names = [place_file(name, files[name], Raster, stage) for name in _names(item)]
    mask = item.mask
    if mask is not None and how.converts_masks:
        require_free_disk(stage, files[mask].stat().st_size)
        # named after the image: images may share a mask, and two threads must not write one file
        mask = f"masks/{PurePosixPath(_names(item)[0]).with_suffix('.tif')}"
        _convert_mask(item, files, stage / mask, how)
    elif mask is not None:
        mask = place_file(mask, files[mask], open_mask, stage)
    return [item.model_copy(update={"image": "|".join(names), "mask": mask})]


def place_file(name: str, source: Path, opened: Callable[[Path], Raster], stage: Path) -> str:
    """Hard-link (or copy) a file and its side files, or write a file that refers to other files as GeoTIFF.

    Args:
        name: path below `stage`.
        source: file.
        opened: opens it, to list the files that belong to it.
        stage: folder to fill.

    Returns:
        The path below `stage`.
    """
    target = stage / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with opened(source) as raster:
        used = [Path(file) for file in raster.files]
    if any(file.parent != source.parent for file in used) or source.suffix.lower() == ".vrt":
        copy_as_tiff(source, stage / f"{name}.tif")
        return f"{name}.tif"
    for old in used:
        new = target.parent / old.name
        if new.exists():
            continue
        try:
            os.link(old.resolve(), new)
        except OSError:
            # another file system, or one without hard links
            partial = new.with_name(f"{new.name}.partial")
            shutil.copyfile(old, partial)
            partial.replace(new)
    return name


def _cut(
    item: IndexItem, windows: Sequence[Window], files: Mapping[str, Path], stage: Path, how: Transfer
) -> list[IndexItem]:
    stem = str(PurePosixPath(_names(item)[0]).with_suffix(""))
    area = _bounds(windows)
    tiles = []
    with _open(item, files, how) as raster:
        info = raster.info
        # the stretch uses the range of the whole image, also outside the tiles
        inside = Window(0, 0, info.height, info.width) if how.plan.stretch else _clip(area, info)
        pixels, valid = _stored(raster, inside, how)
        require_free_disk(stage, pixels.nbytes)
        labels = None if item.mask is None else _labels(item.mask, files, info, inside, how)
        metadata = TileMetadata.of(info, how.bands, how.chosen)
        metadata = metadata.stretched() if how.plan.stretch else metadata
        pad_label = IGNORE_INDEX if how.plan.rule is None else how.plan.rule.pad_label
        for window in windows:
            cut = window.within(inside.row, inside.col)
            if not valid[cut].any():
                continue
            name = tile_name(item, window).removeprefix("images/") if how.plan.grid is not None else f"{stem}.tif"
            data = _padded(valid[cut], window, False)
            write_tile(stage / "images" / name, _padded(pixels[:, *cut], window, 0), window, metadata, data)
            if labels is not None:
                indices = _padded(labels[cut][None], window, pad_label)
                write_tile(stage / "masks" / name, indices, window, metadata.for_masks(how.plan.labels.classes))
            update = {
                "image": f"images/{name}",
                "mask": None if labels is None else f"masks/{name}",
                "scene": item.scene or item.image,
                "origin": (window.row, window.col) if how.plan.grid is not None else None,
            }
            tiles.append(item.model_copy(update=update))
    return tiles


def _stored(raster: Raster, window: Window, how: Transfer) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Stored (or stretched) values of the bands to keep, and where there is data."""
    _, valid = raster.read(window)
    pixels = raster.read_raw(window)
    if how.chosen is not None:
        pixels = pixels[list(how.chosen)]
    if not how.plan.stretch:
        return pixels, valid
    # truncated, not rounded, as in the published script
    low = pixels.min(axis=(1, 2), keepdims=True).astype(np.float64)
    span = np.maximum(pixels.max(axis=(1, 2), keepdims=True) - low, 1)
    return ((pixels - low) / span * 255).astype(np.uint8), valid


def _labels(name: str, files: Mapping[str, Path], info: RasterInfo, window: Window, how: Transfer) -> NDArray[np.uint8]:
    """Class indices of a window of a mask; raises `DataError` if the mask lies on another grid than its image."""

    card, threshold = how.plan.card, how.plan.card.color_threshold

    def edit(stored: NDArray[Any]) -> NDArray[Any]:
        if threshold is not None and len(stored) == 3:
            stored = np.where(stored >= threshold, 255, 0).astype(np.uint8)
        return stored[:1] if card.first_mask_band else stored

    with open_mask(files[name], info, jpeg=threshold is not None) as raster, mask_errors():
        return how.labels.read(raster, window, edit=edit)


def _convert_mask(item: IndexItem, files: Mapping[str, Path], target: Path, how: Transfer) -> None:
    with _open(item, files, how) as raster:
        info = raster.info
    whole = Window(0, 0, info.height, info.width)
    indices = _labels(item.mask or "", files, info, whole, how)
    write_tile(target, indices[None], whole, TileMetadata.of(info, None).for_masks(how.plan.labels.classes))


def _open(item: IndexItem, files: Mapping[str, Path], how: Transfer) -> Raster:
    paths = [files[name] for name in _names(item)]
    return open_image(paths, how.bands, nodata=how.plan.nodata, zero_collar=how.plan.zero_collar)


def _names(item: IndexItem) -> list[str]:
    return item.image.split("|")


def _bounds(windows: Sequence[Window]) -> Window:
    row, col = min(w.row for w in windows), min(w.col for w in windows)
    bottom, right = max(w.row + w.height for w in windows), max(w.col + w.width for w in windows)
    return Window(row, col, bottom - row, right - col)


def _clip(window: Window, info: RasterInfo) -> Window:
    height, width = min(window.height, info.height - window.row), min(window.width, info.width - window.col)
    return Window(window.row, window.col, height, width)


def _padded(array: NDArray[Any], window: Window, value: Any) -> NDArray[Any]:
    """The array padded at the bottom and right to the window's size."""
    below, right = window.height - array.shape[-2], window.width - array.shape[-1]
    if not below and not right:
        return array
    return np.pad(array, ((0, 0),) * (array.ndim - 2) + ((0, below), (0, right)), constant_values=value)
