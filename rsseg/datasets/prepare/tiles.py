"""Tile grids, and tiles written as GeoTIFF."""

import dataclasses
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self

import numpy as np
import rasterio
import rasterio.shutil
import rasterio.windows
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError
from rasterio.transform import Affine

from rsseg.data.index import IndexItem
from rsseg.errors import DataError, MachineError
from rsseg.inference.tiling import tile_origins
from rsseg.raster import RasterInfo, Window
from rsseg.task import IGNORE_INDEX, ClassInfo

_FULL_BYTES = 100 << 20
"""A disk with less free space counts as full, whatever error GDAL reports."""
_MASK_BLOCK = 512
_LEVEL = 1
"""Zstandard level: a third of deflate's time at the same size on aerial images."""


@dataclass(frozen=True)
class Grid:
    """Grid that cuts images into squares of `tile` pixels at a distance of `stride`."""

    tile: int
    stride: int
    step: int | None = None
    """Distance between tiles if it differs from `stride`, which then only sets their number (as published for
    Potsdam)."""
    edge: Literal["move", "drop", "pad"] = "move"
    """Remainder at the right and bottom edge: the last tile is shifted inwards, the remainder is dropped, or the tile
    is padded."""

    def windows(self, height: int, width: int) -> list[Window]:
        """Windows row by row; with `pad` they may extend beyond the image, with `move` a small image stays whole."""
        rows, cols = self._origins(height), self._origins(width)
        if self.edge == "move":
            return [Window(row, col, min(self.tile, height), min(self.tile, width)) for row in rows for col in cols]
        return [Window(row, col, self.tile, self.tile) for row in rows for col in cols]

    def resized(self, tile: int | None, stride: int | None) -> "Grid":
        """The grid with another tile or stride; by default the ratio of stride to tile stays the same."""
        tile = tile or self.tile
        step = None if self.step is None else max(self.step * tile // self.tile, 1)
        return Grid(tile, stride or max(self.stride * tile // self.tile, 1), step, self.edge)

    def _origins(self, length: int) -> list[int]:
        if self.edge == "drop":
            return whole_tile_origins(length, self.tile, self.stride, step=self.step)
        if self.edge == "pad":
            return list(range(0, max(length - self.tile + self.stride, 1), self.stride))
        return tile_origins(length, self.tile, self.stride)


def whole_tile_origins(length: int, tile: int, stride: int, *, step: int | None = None) -> list[int]:
    """Left edges of the complete tiles; the remainder is dropped, as in the published scripts.

    Args:
        length: side of the scene in pixels.
        tile: side of the tile in pixels.
        stride: sets the number of tiles.
        step: distance between tiles where it was published to differ from `stride` (ISPRS Potsdam: `tile`); tiles that
            would leave the scene are shifted inwards.
    """
    if length < tile:
        return []
    count = (length - tile) // stride + 1
    return sorted({min(i * (step or stride), length - tile) for i in range(count)})


def tile_name(item: IndexItem, window: Window) -> str:
    """Path of a tile of an image below the dataset's folder."""
    stem = PurePosixPath(item.image.split("|")[0]).with_suffix("")
    return f"images/{stem}_{window.row:05d}_{window.col:05d}.tif"


@dataclass(frozen=True)
class TileMetadata:
    """Metadata that a tile inherits from its image."""

    crs: CRS | None
    transform: Affine
    nodata: float | None = None
    names: tuple[str, ...] = ()
    """Band names."""
    scales: tuple[float, ...] = ()
    offsets: tuple[float, ...] = ()
    masked: bool = False
    """Whether validity is written as a mask band."""
    colormap: tuple[tuple[int, tuple[int, int, int]], ...] = ()

    @classmethod
    def of(cls, info: RasterInfo, names: Sequence[str] | None, chosen: Sequence[int] | None = None) -> Self:
        """Metadata of an image; `names` replaces its band names, `chosen` selects bands (0-based)."""
        kept = range(info.count) if chosen is None else chosen
        known = info.band_names if names is None else names
        nodata = {str(value) for value in info.band_nodata}
        # GeoTIFF has one nodata value for all bands, so that of a dropped band still matters.
        by_mask = len(nodata) > 1 or (nodata != {"None"} and len(kept) < info.count)
        return cls(
            crs=info.crs,
            transform=info.transform,
            nodata=None if by_mask else info.nodata,
            names=tuple(known[i] for i in kept),
            scales=tuple(info.scales[i] for i in kept),
            offsets=tuple(info.offsets[i] for i in kept),
            masked=info.has_alpha or info.has_mask or by_mask,
        )

    def stretched(self) -> Self:
        """Without nodata, scale and offset, which do not hold for stretched values."""
        return dataclasses.replace(self, nodata=None, scales=(), offsets=())

    def for_masks(self, classes: Sequence[ClassInfo]) -> Self:
        """Metadata of a raster of class indices on the same grid."""
        colors = tuple((i, info.color) for i, info in enumerate(classes))
        return type(self)(self.crs, self.transform, colormap=(*colors, (IGNORE_INDEX, (0, 0, 0))))


def write_tile(
    path: Path, pixels: NDArray[Any], window: Window, metadata: TileMetadata, valid: NDArray[np.bool_] | None = None
) -> None:
    """Write a tile, and its folder.

    Args:
        path: file to write.
        pixels: `(bands, h, w)`, stored values.
        window: position in the image.
        metadata: metadata of the image.
        valid: bool `(h, w)`, written as a mask band if the image has one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    profile: dict[str, Any] = {
        "driver": "GTiff", "height": window.height, "width": window.width, "count": len(pixels), "dtype": pixels.dtype,
        "nodata": metadata.nodata, "compress": "zstd", "zstd_level": _LEVEL, "interleave": "pixel",
    }  # fmt: skip
    if not metadata.colormap:
        profile["predictor"] = 3 if pixels.dtype.kind == "f" else 2
    if metadata.crs is not None or metadata.transform != Affine.identity():
        corner = rasterio.windows.Window(window.col, window.row, window.width, window.height)
        profile |= {"crs": metadata.crs, "transform": rasterio.windows.transform(corner, metadata.transform)}
    # an interrupted call may have left an incomplete file, which GDAL would try to open
    path.unlink(missing_ok=True)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), writing(path), rasterio.open(path, "w", **profile) as file:
        # tags before pixels: otherwise the file's directory is written twice
        if metadata.colormap:
            file.write_colormap(1, dict(metadata.colormap))
        else:
            # otherwise GDAL interprets a fourth band as alpha
            file.colorinterp = _colors(metadata.names)
        for band, name in enumerate(metadata.names, start=1):
            file.set_band_description(band, name)
        if metadata.scales and (set(metadata.scales) != {1.0} or set(metadata.offsets) != {0.0}):
            file.scales, file.offsets = metadata.scales, metadata.offsets
        file.write(pixels)
        if valid is not None and metadata.masked:
            file.write_mask(valid)


def write_mask(
    path: Path, height: int, width: int, metadata: TileMetadata, strips: Iterable[tuple[Window, NDArray[np.uint8]]]
) -> None:
    """Write a mask of any size strip by strip, under a temporary name until it is complete.

    Args:
        path: file to write.
        height: rows.
        width: columns.
        metadata: grid and colours.
        strips: windows that cover the mask, whose rows begin at multiples of the block size, and class indices (h, w).
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    profile: dict[str, Any] = {
        "driver": "GTiff", "height": height, "width": width, "count": 1, "dtype": "uint8", "compress": "zstd",
        "zstd_level": _LEVEL, "tiled": True, "blockxsize": _MASK_BLOCK, "blockysize": _MASK_BLOCK,
        "bigtiff": "if_safer",
    }  # fmt: skip
    if metadata.crs is not None or metadata.transform != Affine.identity():
        profile |= {"crs": metadata.crs, "transform": metadata.transform}
    with writing(path), rasterio.open(partial, "w", **profile) as file:
        file.write_colormap(1, dict(metadata.colormap))
        for window, pixels in strips:
            place = rasterio.windows.Window(window.col, window.row, window.width, window.height)
            file.write(pixels, 1, window=place)
    partial.replace(path)


def copy_as_tiff(source: Path, target: Path) -> None:
    """Write an image of any format, such as a VRT, as a GeoTIFF with all its metadata, block by block."""
    target.unlink(missing_ok=True)
    options = {"compress": "zstd", "zstd_level": _LEVEL, "tiled": True, "bigtiff": "if_safer"}
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), writing(target):
        rasterio.shutil.copy(source, target, driver="GTiff", **options)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn errors of GDAL into `MachineError` if the disk is full, else `DataError`."""
    try:
        yield
    except (RasterioError, CPLE_BaseError) as error:
        reason = f"{target}: cannot be written: {error.__cause__ or error}"
        if shutil.disk_usage(target.parent).free < _FULL_BYTES:
            raise MachineError(f"{reason}. The disk is full: free some space and repeat the command.") from None
        raise DataError(f"{reason}.") from None


def _colors(names: Sequence[str]) -> list[ColorInterp]:
    known = {"red": ColorInterp.red, "green": ColorInterp.green, "blue": ColorInterp.blue}
    if len(names) == 1:
        return [ColorInterp.gray]
    return [known.get(name, ColorInterp.undefined) for name in names]
