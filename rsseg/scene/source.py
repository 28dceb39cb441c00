"""From a raster to tiles: each row is decoded once, and memory holds one row of tiles in the file's own type."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rsseg.inference.blend import Tile
from rsseg.inference.tiling import TilePlan
from rsseg.methods.base import Segmenter
from rsseg.raster import Raster, Window

_LEAST_ROWS = 128
"""Least rows of one read; bounds the calls, as the read bounds the memory beside the band."""


def read_tiles(raster: Raster, plan: TilePlan, segmenter: Segmenter) -> Iterator[Tile]:
    """Tiles of a raster, row by row, in scaled units and filled where there is no data.

    Args:
        raster: opened with the task's bands in the task's order.
        plan: of the raster's size.
        segmenter: gives scale, offset and fill.
    """
    task = segmenter.task
    scale, offset = np.array(task.scale, np.float32), np.array(task.offset, np.float32)
    fill = np.array(segmenter.fill, np.float32)
    for row, (pixels, valid) in enumerate(_bands(raster, plan)):
        for col, left in enumerate(plan.cols.origins):
            area = slice(left, left + plan.cols.tile)
            good = valid[:, area].copy()
            if not good.any():
                yield Tile(row, col, torch.empty(0), good)
                continue
            # Channels last from here on: the layout that the network wants.
            image = np.multiply(pixels[:, :, area].transpose(1, 2, 0), scale, dtype=np.float32, order="C")
            image += offset
            image[~good] = fill
            yield Tile(row, col, torch.from_numpy(image).permute(2, 0, 1), good)


def _bands(raster: Raster, plan: TilePlan) -> Iterator[tuple[NDArray[Any], NDArray[np.bool_]]]:
    """Per row of tiles, its pixels (C, tile, W) and where they have data; both are overwritten by the next one."""
    info, tile = raster.info, plan.rows.tile
    pixels = np.empty((info.count, tile, info.width), info.dtype)
    valid = np.empty((tile, info.width), np.bool_)
    done = 0
    for top in plan.rows.origins:
        kept = done - top
        pixels[:, :kept] = pixels[:, tile - kept :]
        valid[:kept] = valid[tile - kept :]
        for window in _windows(raster, done, top + tile):
            rows = slice(window.row - top, window.row - top + window.height)
            pixels[:, rows], valid[rows] = raster.read(window)
        done = top + tile
        yield pixels, valid


def _windows(raster: Raster, start: int, stop: int) -> Iterator[Window]:
    """Rows [start, stop) in reads that end where the file's blocks end, so that GDAL's cache need not hold more."""
    block = raster.info.block_shape[0]
    step = block * -(-_LEAST_ROWS // block)
    while start < stop:
        end = min((start // step + 1) * step, stop)
        yield Window(start, 0, end - start, raster.info.width)
        start = end
