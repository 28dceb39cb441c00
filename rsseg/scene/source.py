"""From a raster to tiles: each row is decoded once, and memory holds one row of tiles in the file's own type."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from rsseg.inference.blend import Tile
from rsseg.inference.tiling import Panel, Span, mirror
from rsseg.methods.base import Segmenter
from rsseg.raster import Raster, Window
from rsseg.vector.aoi import Region

_LEAST_ROWS = 128
"""Least rows of one read; bounds the calls, as the read bounds the memory beside the band."""
_QUICK_TYPES = ("uint8", "uint16", "int16", "float32")
_QUICK_BANDS = 128
"""What OpenCV can interleave, many times as fast as NumPy."""


def read_tiles(
    raster: Raster, panel: Panel, segmenter: Segmenter, *, rows: Span, region: Region | None = None
) -> Iterator[Tile]:
    """Tiles of a panel, row by row, in scaled units and filled where there is no data.

    Args:
        raster: opened with the task's bands in the task's order.
        panel: of the raster.
        segmenter: gives scale, offset and fill.
        rows: rows of tiles that are wanted.
        region: outside of it nothing is read, and there is no data.
    """
    task, tile = segmenter.task, panel.plan.cols.tile

    def scaled(raw: NDArray[Any], good: NDArray[np.bool_]) -> torch.Tensor:
        return torch.from_numpy(task.scaled(raw, good, segmenter.fill)).permute(2, 0, 1)

    for row, pixels, valid in _bands(raster, panel, rows, region):
        for col, left in enumerate(panel.plan.cols.origins):
            area = slice(left, left + tile)
            good, raw = valid[:, area].copy(), pixels[:, :, area]
            yield Tile(row, col, partial(scaled, _interleaved(raw), good), good)


def _bands(
    raster: Raster, panel: Panel, rows: Span, region: Region | None
) -> Iterator[tuple[int, NDArray[Any], NDArray[np.bool_]]]:
    """Per row of tiles its number, pixels (C, tile, covered) and where they have data; the next one overwrites them."""
    info, axis, width = raster.info, panel.plan.rows, panel.plan.cols.length
    tile, covered = axis.tile, max(panel.plan.cols.covered, width)
    pixels = np.empty((info.count, tile, covered), info.dtype)
    valid = np.empty((tile, covered), np.bool_)
    done = axis.origins[rows.start]
    for row in range(rows.start, rows.stop):
        top = axis.origins[row]
        kept, end = done - top, min(top + tile, info.height)
        pixels[:, :kept] = pixels[:, tile - kept :]
        valid[:kept] = valid[tile - kept :]
        for window in _windows(raster, Span(done, end), Span(panel.left, panel.left + width)):
            area = slice(window.row - top, window.row - top + window.height)
            pixels[:, area, :width], valid[area, :width] = _read(raster, window, region)
        if covered > width:
            beyond = mirror(width, covered)[width:]
            pixels[:, :, width:], valid[:, width:] = pixels[:, :, beyond], valid[:, beyond]
        if end - top < tile:
            beyond = mirror(end - top, tile)[end - top :]
            pixels[:, end - top :], valid[end - top :] = pixels[:, beyond], valid[beyond]
        done = end
        yield row, pixels, valid


def _interleaved(pixels: NDArray[Any]) -> NDArray[Any]:
    """(C, h, w) -> (h, w, C), the layout that the network wants."""
    if len(pixels) <= _QUICK_BANDS and pixels.dtype in _QUICK_TYPES:
        return np.asarray(cv2.merge(list(pixels)))
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def _read(raster: Raster, window: Window, region: Region | None) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    if region is None:
        return raster.read(window)
    inside = region.mask(window)
    if not inside.any():
        return np.zeros((raster.info.count, window.height, window.width), raster.info.dtype), inside
    pixels, valid = raster.read(window)
    return pixels, valid & inside


def _windows(raster: Raster, rows: Span, cols: Span) -> Iterator[Window]:
    """The rows in reads that end where the file's blocks end, so that GDAL's cache need not hold more."""
    block, start = raster.info.block_shape[0], rows.start
    step = block * -(-_LEAST_ROWS // block)
    while start < rows.stop:
        end = min((start // step + 1) * step, rows.stop)
        yield Window(start, cols.start, end - start, cols.length)
        start = end
