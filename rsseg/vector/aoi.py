"""Areas of interest: polygons of a vector file, as a mask of a scene's pixels."""

import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyogrio
import shapely
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.features import rasterize
from rasterio.transform import Affine

from rsseg.errors import DataError, RssegWarning
from rsseg.raster import RasterInfo, Window
from rsseg.text import load_json
from rsseg.vector.grid import Grid
from rsseg.vector.read import find_layer, layer_crs, place, polygon_parts, spatial_layers, vector_errors

Polygons = NDArray[np.object_]
"""Shapely polygons and multipolygons."""
_ROWS = 512
_MOST_COUNTED = 1 << 26
"""Bytes of a GeoJSON file whose features are counted."""


@dataclass(frozen=True)
class Region:
    """Polygons in columns and rows of a scene; a pixel belongs to the region if its centre lies inside."""

    polygons: Polygons

    def mask(self, window: Window) -> NDArray[np.bool_]:
        """bool (h, w), True for the pixels of a window that belong to the region."""
        left, top, right, bottom = self._bounds
        near = (left < window.col + window.width) & (right > window.col)
        near &= (top < window.row + window.height) & (bottom > window.row)
        shape = window.height, window.width
        if not near.any():
            return np.zeros(shape, np.bool_)
        place = Affine.translation(window.col, window.row)
        return np.asarray(rasterize(self.polygons[near], shape, transform=place, dtype=np.uint8) > 0)

    def has_pixels(self, height: int, width: int) -> bool:
        """Whether any pixel of a scene of this size belongs to the region."""
        starts = range(0, height, _ROWS)
        return any(self.mask(Window(row, 0, min(_ROWS, height - row), width)).any() for row in starts)

    @cached_property
    def _bounds(self) -> tuple[NDArray[np.float64], ...]:
        return tuple(shapely.bounds(self.polygons).T)


def read_region(path: Path, info: RasterInfo, *, layer: str | None = None, must_meet: bool = True) -> Region:
    """Read the polygons of all layers of a vector file in pixel coordinates of a scene.

    Args:
        path: vector file.
        info: the scene.
        layer: only this layer.
        must_meet: raise if no pixel of the scene lies in the region.

    Raises:
        DataError: the file is missing or unreadable, holds no polygon, lies outside the scene, or cannot be converted
                to the scene's coordinate system.
    """
    grid = Grid(info)
    names = spatial_layers(path) if layer is None else [find_layer(path, layer)]
    layers = [_read_layer(path, name) for name in names]
    used = sum(layer.used for layer in layers)
    features = _declared(path) or sum(layer.features for layer in layers if layer.used)
    if not used:
        raise DataError(f"{path}: the file has no polygon. Draw the area as polygons.")
    if used < features:
        warnings.warn(
            f"{path}: {features - used} of {features} features have no polygon, or a damaged one, and are left out.",
            RssegWarning,
            stacklevel=2,
        )
    placed = [place(layer.polygons, layer.crs, grid, str(path)).shapes for layer in layers if layer.used]
    region = Region(polygon_parts(np.concatenate(placed))[0])
    if must_meet and not region.has_pixels(info.height, info.width):
        raise DataError(
            f"{path}: no pixel of the scene lies in this area. Check its location and its coordinate system."
        )
    return region


def region_files(path: Path) -> tuple[Path, ...]:
    """The vector file and its side files."""
    if path.suffix.lower() != ".shp":
        return (path,)
    return tuple(sorted(file for file in path.parent.iterdir() if file.stem == path.stem))


class _Layer(NamedTuple):
    """Polygons of a layer, and the numbers of its features and of those with a polygon."""

    crs: CRS | None
    polygons: Polygons
    features: int
    used: int


def _declared(path: Path) -> int:
    """Features in the text of a GeoJSON file, of which GDAL skips what is none; 0 for other and for large files."""
    if path.suffix.lower() not in (".geojson", ".json") or not path.is_file() or path.stat().st_size > _MOST_COUNTED:
        return 0
    try:
        content = load_json(path.read_bytes(), str(path), DataError)
    except DataError:  # GDAL reads more than JSON allows
        return 0
    features = content.get("features") if isinstance(content, dict) else None
    return len(features) if isinstance(features, list) else 0


def _read_layer(path: Path, layer: str) -> _Layer:
    with vector_errors(path):
        about, _, wkb, _ = pyogrio.raw.read(path, layer=layer, columns=[], force_2d=True)
        shapes = shapely.from_wkb(wkb)
    polygons, source = polygon_parts(shapes[~shapely.is_missing(shapes)])
    if not np.isfinite(shapely.get_coordinates(polygons)).all():
        raise DataError(f"{path}: some of its coordinates are not finite. Correct them.")
    valid, _ = polygon_parts(shapely.make_valid(polygons))
    return _Layer(layer_crs(path, about["crs"]), valid, len(shapes), len(np.unique(source)))
