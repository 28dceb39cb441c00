"""Puts the files of a dataset into the folder that is being prepared: whole, or cut into tiles."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import rasterio
import rasterio.windows
from numpy.typing import NDArray

from rsseg.data.index import IndexItem
from rsseg.errors import DataError
from rsseg.raster import Raster, RasterInfo, Window

_SIDECARS = (".aux.xml", ".msk")
"""Files beside an image that GDAL reads with it."""


def place_item(item: IndexItem, source: Path, folder: Path) -> list[IndexItem]:
    """Hard-link the files of an item into `folder` (copy them where that is impossible), same relative paths."""
    for name in [*item.image.split("|"), *([item.mask] if item.mask else [])]:
        for suffix in ("", *_SIDECARS):
            if not suffix or Path(f"{source / name}{suffix}").exists():
                _link(Path(f"{source / name}{suffix}"), Path(f"{folder / name}{suffix}"))
    return [item]


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except FileExistsError:
        return
    except OSError:
        # another file system, or one without hard links
        shutil.copyfile(source, target)


def cut_item(item: IndexItem, source: Path, folder: Path, *, tile: int, stride: int) -> list[IndexItem]:
    """Write the tiles of an item as GeoTIFF (deflate); grid, nodata, scale tags and band names are kept.

    Args:
        item: image and mask, relative to `source`.
        source: folder of the originals.
        folder: folder of the tiles.
        tile: side in pixels; the last tile of a row or column is moved in, a smaller image stays whole.
        stride: distance of the tiles, 1..tile.

    Returns:
        One item per tile that has a pixel with data.
    """
    stem = str(PurePosixPath(item.image.split("|")[0]).with_suffix(""))
    tiles = []
    with Raster([source / part for part in item.image.split("|")]) as image:
        mask = Raster(source / item.mask) if item.mask else None
        try:
            if mask is not None and _size(mask) != _size(image):
                raise DataError(
                    f"{mask.name}: the mask has {_size(mask)} pixels (rows, columns), its image {_size(image)}. "
                    "They must agree."
                )
            for window in tile_windows(image.info.height, image.info.width, tile, stride):
                _, valid = image.read(window)
                if not valid.any():
                    continue
                name = f"{stem}_{window.row:05d}_{window.col:05d}.tif"
                _write(folder / "images" / name, image.info, image.read_raw(window), window, valid)
                if mask is not None:
                    _write(folder / "masks" / name, mask.info, mask.read_raw(window), window, None)
                update = {"image": f"images/{name}", "mask": f"masks/{name}" if mask else None}
                tiles.append(item.model_copy(update=update))
        finally:
            if mask is not None:
                mask.close()
    return tiles


def _size(raster: Raster) -> tuple[int, int]:
    return raster.info.height, raster.info.width


def tile_windows(height: int, width: int, tile: int, stride: int) -> Sequence[Window]:
    """Windows that cover an image, row by row."""
    return [
        Window(row, col, min(tile, height), min(tile, width))
        for row in _origins(height, tile, stride)
        for col in _origins(width, tile, stride)
    ]


def _origins(length: int, tile: int, stride: int) -> list[int]:
    return [0] if length <= tile else [*range(0, length - tile, stride), length - tile]


def _write(path: Path, info: RasterInfo, pixels: NDArray[Any], window: Window, valid: NDArray[np.bool_] | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    profile: dict[str, Any] = {
        "driver": "GTiff", "height": window.height, "width": window.width, "count": len(pixels), "dtype": pixels.dtype,
        "nodata": info.nodata, "compress": "deflate", "predictor": 3 if pixels.dtype.kind == "f" else 2,
    }  # fmt: skip
    if info.crs is not None:
        corner = rasterio.windows.Window(window.col, window.row, window.width, window.height)
        profile |= {"crs": info.crs, "transform": rasterio.windows.transform(corner, info.transform)}
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "w", **profile) as file:
        file.write(pixels)
        if info.colormap is not None:
            file.write_colormap(1, info.colormap)
            return
        file.scales, file.offsets = info.scales, info.offsets
        for band, name in enumerate(info.band_names, start=1):
            file.set_band_description(band, name)
        if valid is not None and (info.has_alpha or info.has_mask):
            file.write_mask(valid)
