"""Input of a scene: its files, and its tiles in bounded memory, each row decoded once."""

import hashlib
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.errors import RasterioError

from rsseg.errors import DataError
from rsseg.files import content_hash, is_file
from rsseg.inference.blend import StoredPixels, Tile
from rsseg.inference.predict import NetworkFacts
from rsseg.inference.tiling import AxisPlan, Panel, Span, mirror
from rsseg.raster import Raster, Window
from rsseg.scene.options import SceneOptions
from rsseg.vector.grid import Grid

if TYPE_CHECKING:
    from rsseg.vector.aoi import Region

TAG = "RSSEG_MADE_FROM"
"""Tag of each output raster; holds `PreparedScene.identity`."""
_LEAST_ROWS = 128
"""Minimum rows per read, which limits the number of calls."""
_QUICK_TYPES = ("uint8", "uint16", "int16", "float32")
_QUICK_BANDS = 128
"""Types that OpenCV interleaves, many times faster than NumPy."""


def open_scene(
    scene: Path | str, options: SceneOptions, bands: tuple[int, ...] | None, columns: int | None = None
) -> Raster:
    """Open a scene according to the options; `columns` is the widest window that will be read.

    Raises:
        DataError: it is missing, unreadable, or a pipe or device; it is to be resampled but has no coordinates.
    """
    if is_local(scene):
        try:
            mode = Path(scene).stat().st_mode
        except FileNotFoundError:
            pass  # GDAL accepts names that are not paths, such as those of subdatasets
        except OSError as error:
            raise DataError(f"{scene}: cannot be read: {error.strerror}.") from None
        else:
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise DataError(f"{scene}: a pipe or device, not a file. Save it to a file first.")
    shrink = None
    if options.gsd is not None:
        with Raster(scene) as original:
            sides = Grid(original.info).ground_sides()
            if sides is None or original.info.gcps:
                raise DataError(f"{scene}: --gsd needs a coordinate system and a transform. Warp the scene first.")
            shrink = options.gsd / sides[0], options.gsd / sides[1]
    return Raster(
        scene, bands=bands, nodata=options.nodata, zero_collar=options.zero_collar, columns=columns, shrink=shrink
    )


def is_local(name: Path | str) -> bool:
    """False for URLs and GDAL's virtual file systems."""
    return not re.match(r"/vsi|\w+://|<", str(name))


def identify_files(files: Iterable[Path | str]) -> str:
    """Hash of the contents of files or of their archives; other names, such as URLs, are hashed as text."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        path = local_file(file)
        if path is None:
            digest.update(str(file).encode())
        else:
            digest.update(content_hash(path))
            if path != Path(file):
                digest.update(str(file).encode())
    return digest.hexdigest()


def local_file(name: Path | str) -> Path | None:
    """The file on this machine behind a name, which may be the archive of a virtual file system such as /vsizip/."""
    path = Path(re.sub(r"/vsi(zip|tar|gzip|7z|rar|cached|sparse|subfile)/|[{}]", "", str(name)))
    if is_local(name):
        path = Path(name)
    return next((part for part in (path, *path.parents) if is_file(part)), None)


def source_files(files: Iterable[str]) -> tuple[str, ...]:
    """The files of a raster, and those of the VRTs among them, sorted."""
    found: set[str] = set()
    waiting = list(files)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            if name.lower().endswith(".vrt") and is_file(name):
                with suppress(RasterioError), rasterio.open(name) as file:
                    waiting += file.files
    return tuple(sorted(found))


def made_from(path: Path | str) -> str | None:
    """Hash in the tag of a raster that a prediction made; None for other files."""
    try:
        with rasterio.open(path) as file:
            tag: str | None = file.tags().get(TAG)
            return tag
    except RasterioError:
        return None


class _Rows(NamedTuple):
    """One row of tiles.

    number: of the row
    pixels: (C, tile, covered)
    valid: bool (tile, covered), where the scene has data
    wanted: bool (tile, covered), where the output has data
    """

    number: int
    pixels: NDArray[Any]
    valid: NDArray[np.bool_]
    wanted: NDArray[np.bool_]


def read_tiles(
    rasters: Sequence[Raster],
    panels: Sequence[Panel],
    network: NetworkFacts,
    *,
    rows: Sequence[Span] | None = None,
    region: "Region | None" = None,
) -> Iterator[Tile]:
    """Yield the tiles of panels, row by row of each, in scaled units and filled where there is no data.

    Args:
        rasters: the scene, opened with the task's bands in the task's order once per thread that decodes.
        panels: of the raster.
        network: gives scale, offset and fill.
        rows: rows of tiles of each panel; None: all.
        region: tiles without a pixel of it are empty and not read; pixels outside it in the others are context.
    """
    task = network.task

    def scaled(raw: NDArray[Any], good: NDArray[np.bool_]) -> NDArray[np.float32]:
        return task.scaled(raw, good, network.fill).transpose(2, 0, 1)

    def tiles_of(number: int, panel: Panel) -> Iterator[Tile]:
        span = Span(0, len(panel.plan.rows.origins)) if rows is None else rows[number]
        for row in _read_rows(rasters, panel, span, region):
            for col, left in enumerate(panel.plan.cols.origins):
                area = slice(left, left + panel.plan.cols.tile)
                wanted = row.wanted[:, area].copy()
                if wanted.any():
                    good = wanted if region is None else row.valid[:, area].copy()
                    stored = StoredPixels(_interleaved(row.pixels[:, :, area]), good)
                    yield Tile(row.number, col, partial(scaled, *stored), wanted, stored, number)
                else:
                    yield Tile(row.number, col, partial(_not_loaded, row.number, col), wanted, None, number)

    # The buffers of a panel end with its generator, before those of the next one are made.
    for number, panel in enumerate(panels):
        yield from tiles_of(number, panel)


def _not_loaded(row: int, col: int) -> NDArray[np.float32]:
    raise AssertionError(f"tile {row}, {col} is empty")


def _read_rows(rasters: Sequence[Raster], panel: Panel, rows: Span, region: "Region | None") -> Iterator[_Rows]:
    """Yield rows of tiles in buffers that the next one overwrites."""
    if not rows.length:
        return
    info, axis, width = rasters[0].info, panel.plan.rows, panel.plan.cols.length
    tile, covered = axis.tile, max(panel.plan.cols.covered, width)
    pixels = np.zeros((info.count, tile, covered), info.dtype)
    valid = np.zeros((tile, covered), np.bool_)
    wanted = valid if region is None else np.zeros((tile, covered), np.bool_)
    # The buffers hold the rows up to `done` of these columns.
    done, held = axis.origins[rows.start], Span(0, width)
    for row in range(rows.start, rows.stop):
        top = axis.origins[row]
        end = min(top + tile, info.height)
        needed = Span(0, width)
        if region is not None:
            wanted[:] = False
            wanted[: end - top, :width] = region.mask(Window(top, panel.left, end - top, width))
            needed = _needed(panel.plan.cols, wanted)
            if not needed.length:
                done, held = axis.origins[min(row + 1, len(axis.origins) - 1)], Span(0, width)
                yield _Rows(row, pixels, valid, wanted)
                continue
        kept = done - top if held.start <= needed.start and needed.stop <= held.stop else 0
        pixels[:, :kept] = pixels[:, tile - kept :]
        valid[:kept] = valid[tile - kept :]
        for window, (stored, good) in _read_windows(rasters, Span(top + kept, end), needed.moved(panel.left)):
            area = Span(window.row - top, window.row - top + window.height).area
            columns = Span(window.col - panel.left, window.col - panel.left + window.width).area
            pixels[:, area, columns], valid[area, columns] = stored, good
        if covered > width:
            beyond = mirror(width, covered)[width:]
            pixels[:, :, width:], valid[:, width:] = pixels[:, :, beyond], valid[:, beyond]
        if end - top < tile:
            beyond = mirror(end - top, tile)[end - top :]
            pixels[:, end - top :], valid[end - top :] = pixels[:, beyond], valid[beyond]
        if region is not None:
            wanted &= valid
        done, held = end, needed
        yield _Rows(row, pixels, valid, wanted)


def _needed(axis: AxisPlan, wanted: NDArray[np.bool_]) -> Span:
    """Columns of the tiles that have a wanted pixel, and of what is mirrored for them."""
    cols = np.asarray(wanted.any(axis=0))
    tiles = [origin for origin in axis.origins if cols[origin : origin + axis.tile].any()]
    if not tiles:
        return Span(0, 0)
    mirrored = max(2 * axis.length - axis.covered - 1, 0) if tiles[-1] + axis.tile > axis.length else axis.length
    return Span(min(tiles[0], mirrored), min(tiles[-1] + axis.tile, axis.length))


def _interleaved(pixels: NDArray[Any]) -> NDArray[Any]:
    """(C, h, w) -> (h, w, C), the layout that the network wants."""
    if len(pixels) <= _QUICK_BANDS and pixels.dtype in _QUICK_TYPES:
        return np.asarray(cv2.merge(list(pixels))).reshape(*pixels.shape[1:], len(pixels))
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def _read_windows(
    rasters: Sequence[Raster], rows: Span, cols: Span
) -> Iterator[tuple[Window, tuple[NDArray[Any], NDArray[np.bool_]]]]:
    """Read a part of the scene, one window per raster at a time."""
    windows = list(_windows(rasters[0].info.block_shape, rows, cols, len(rasters)))
    if len(rasters) == 1:
        yield from ((window, rasters[0].read(window)) for window in windows)
        return
    free: SimpleQueue[Raster] = SimpleQueue()
    for raster in rasters:
        free.put(raster)

    def read(window: Window) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        raster = free.get()
        try:
            return raster.read(window)
        finally:
            free.put(raster)

    with ThreadPoolExecutor(len(rasters), "rsseg-decoder") as threads:
        yield from zip(windows, threads.map(read, windows), strict=True)


def _windows(block: tuple[int, int], rows: Span, cols: Span, parts: int) -> Iterator[Window]:
    """Split into reads that end where the file's blocks end, so that GDAL's cache need not hold more; columns only as
    far as there are to be several parts."""
    steps = block[0] * -(-_LEAST_ROWS // block[0]), block[1] * max(cols.length // (parts * block[1]), 1)
    for top, bottom in pairwise(_cuts(rows, steps[0])):
        for left, right in pairwise(_cuts(cols, steps[1]) if parts > 1 else (cols.start, cols.stop)):
            yield Window(top, left, bottom - top, right - left)


def _cuts(span: Span, step: int) -> list[int]:
    """The ends of a span, and the multiples of a step between them."""
    return [span.start, *range((span.start // step + 1) * step, span.stop, step), span.stop]
