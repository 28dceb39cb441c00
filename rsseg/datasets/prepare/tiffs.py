"""Writes tiles as GeoTIFF."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import rasterio
import rasterio.windows
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.transform import Affine

from rsseg.raster import RasterInfo, Window
from rsseg.task import IGNORE_INDEX, ClassInfo

_LEVEL = 1
"""Of Zstandard: a third of deflate's time for the same size on aerial images."""


@dataclass(frozen=True)
class Look:
    """What a tile takes over from the image that it is cut from."""

    crs: CRS | None
    transform: Affine
    nodata: float | None = None
    names: tuple[str, ...] = ()
    """Of the bands."""
    scales: tuple[float, ...] = ()
    offsets: tuple[float, ...] = ()
    masked: bool = False
    """The image has an alpha or mask band."""
    colormap: tuple[tuple[int, tuple[int, int, int]], ...] = ()

    @classmethod
    def of(cls, info: RasterInfo, names: Sequence[str] | None, chosen: Sequence[int] | None = None) -> Self:
        """Of an image, with the names of its bands if these are known better, and with some of its bands."""
        kept = range(info.count) if chosen is None else chosen
        known = info.band_names if names is None else names
        return cls(
            crs=info.crs,
            transform=info.transform,
            nodata=info.nodata,
            names=tuple(known[i] for i in kept),
            scales=tuple(info.scales[i] for i in kept),
            offsets=tuple(info.offsets[i] for i in kept),
            masked=info.has_alpha or info.has_mask,
        )

    def stretched(self) -> Self:
        """With values that mean something else than the image's."""
        return dataclasses.replace(self, nodata=None, scales=(), offsets=())

    def for_masks(self, classes: Sequence[ClassInfo]) -> Self:
        """Of class indices on the same grid."""
        colors = tuple((i, info.color) for i, info in enumerate(classes))
        return type(self)(self.crs, self.transform, colormap=(*colors, (IGNORE_INDEX, (0, 0, 0))))


def write_tile(
    path: Path, pixels: NDArray[Any], window: Window, look: Look, valid: NDArray[np.bool_] | None = None
) -> None:
    """Write a tile.

    Args:
        path: file; its folder is made.
        pixels: `(bands, h, w)`, stored values.
        window: where it lies in its image.
        look: of the image.
        valid: bool `(h, w)`, written as a mask band if the image has one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    profile: dict[str, Any] = {
        "driver": "GTiff", "height": window.height, "width": window.width, "count": len(pixels), "dtype": pixels.dtype,
        "nodata": look.nodata, "compress": "zstd", "zstd_level": _LEVEL, "interleave": "pixel",
    }  # fmt: skip
    if not look.colormap:
        profile["predictor"] = 3 if pixels.dtype.kind == "f" else 2
    if look.crs is not None or look.transform != Affine.identity():
        corner = rasterio.windows.Window(window.col, window.row, window.width, window.height)
        profile |= {"crs": look.crs, "transform": rasterio.windows.transform(corner, look.transform)}
    # half a file of an interrupted call: GDAL would try to open it
    path.unlink(missing_ok=True)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "w", **profile) as file:
        # tags before pixels: otherwise the file's directory is written twice
        if look.colormap:
            file.write_colormap(1, dict(look.colormap))
        else:
            # otherwise GDAL takes a fourth band for alpha
            file.colorinterp = _colors(look.names)
        for band, name in enumerate(look.names, start=1):
            file.set_band_description(band, name)
        if look.scales and (set(look.scales) != {1.0} or set(look.offsets) != {0.0}):
            file.scales, file.offsets = look.scales, look.offsets
        file.write(pixels)
        if valid is not None and look.masked:
            file.write_mask(valid)


def _colors(names: Sequence[str]) -> list[ColorInterp]:
    known = {"red": ColorInterp.red, "green": ColorInterp.green, "blue": ColorInterp.blue}
    if len(names) == 1:
        return [ColorInterp.gray]
    return [known.get(name, ColorInterp.undefined) for name in names]
