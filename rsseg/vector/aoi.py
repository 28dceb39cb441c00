"""Areas of interest: polygons of a vector file, as a mask of a scene's pixels."""

import warnings
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyogrio
import shapely
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.features import rasterize
from rasterio.transform import Affine

from rsseg.errors import DataError, RssegWarning
from rsseg.files import is_file, is_folder
from rsseg.raster import RasterInfo, Window
from rsseg.text import load_json
from rsseg.vector.grid import Grid, Points, reproject, transformed
from rsseg.vector.write import VECTOR_ERRORS, vector_reason

Polygons = NDArray[np.object_]
"""Shapely polygons and multipolygons."""
_PIECES = 256
"""Segments along a scene that are short enough to stay straight in another coordinate system."""
_MARGIN = 0.02
"""Margin of the box around a scene, relative to its size."""
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


def read_region(path: Path, info: RasterInfo) -> Region:
    """Read the polygons of all layers of a vector file in pixel coordinates of a scene.

    Raises:
        DataError: the file is missing or unreadable, holds no polygon, lies outside the scene, or cannot be converted
                to the scene's coordinate system.
    """
    grid = Grid(info)
    layers = _read_layers(path)
    used = sum(layer.used for layer in layers)
    features = _declared(path) or sum(layer.features for layer in layers if layer.used)
    if 0 < used < features:
        warnings.warn(
            f"{path}: {features - used} of {features} features have no polygon, or a damaged one, and are left out.",
            RssegWarning,
            stacklevel=2,
        )
    if not used:
        raise DataError(f"{path}: the file has no polygon. Draw the area as polygons.")
    placed = np.concatenate([_placed(layer.polygons, layer.crs, grid, path) for layer in layers if layer.used])
    region = Region(placed)
    if not region.has_pixels(info.height, info.width):
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


def _read_layers(path: Path) -> list[_Layer]:
    if not (is_file(path) or is_folder(path)):
        raise DataError(f"{path}: there is no such file.")
    try:
        names = [name for name, geometry in pyogrio.list_layers(path) if geometry is not None]
        return [_read_layer(path, name) for name in names]
    except (*VECTOR_ERRORS, shapely.GEOSException) as error:
        reason = vector_reason(error, path)
        raise DataError(
            f"{path}: not a readable vector file: {reason}. Give a .gpkg, .geojson, .fgb, .shp or .kml file "
            "that no other program has open."
        ) from None
    except CRSError as error:
        raise DataError(f"{path}: its coordinate system is unknown: {error}.") from None


def _read_layer(path: Path, layer: str) -> _Layer:
    about, _, wkb, _ = pyogrio.raw.read(path, layer=layer, columns=[], force_2d=True)
    shapes = shapely.from_wkb(wkb)
    parts, first = shapely.get_parts(shapes, return_index=True)
    parts, second = shapely.get_parts(parts, return_index=True)
    usual = (shapely.get_type_id(parts) == shapely.GeometryType.POLYGON) & ~shapely.is_empty(parts)
    polygons, used = parts[usual], len(np.unique(first[second[usual]]))
    if not np.isfinite(shapely.get_coordinates(polygons)).all():
        raise DataError(f"{path}: some of its coordinates are not finite. Correct them.")
    crs = None if about["crs"] is None else CRS.from_user_input(about["crs"])
    return _Layer(crs, polygons, len(shapes), used)


def _placed(polygons: Polygons, crs: CRS | None, grid: Grid, path: Path) -> Polygons:
    """The polygons in columns and rows of the scene."""
    if grid.crs is None and crs is not None and not grid.is_located:
        raise DataError(f"{path}: the scene has no coordinates, so the area cannot be located in it.")
    if crs is None or grid.crs is None:
        return _mapped(polygons, grid.to_pixels)
    box, turn = _box_around(grid, crs, str(path))
    near = _near(polygons, box, turns=crs.is_geographic)
    if (shapely.area(near) > (1 - 1e-9) * shapely.area(box)).any():
        # The corners of a box around a view of the whole globe may lie off the globe.
        return np.array([shapely.box(0, 0, grid.info.width, grid.info.height)], np.object_)
    middle = grid.middle[0]

    def to_scene(points: Points) -> Points:
        assert grid.crs is not None
        moved = reproject(points, crs, grid.crs, str(path))
        if grid.crs.is_geographic:
            # Longitudes can differ from the scene's by multiples of 360 degrees.
            expected = points[:, 0] + turn if crs.is_geographic else middle
            moved = np.stack([expected + (moved[:, 0] - expected + 180) % 360 - 180, moved[:, 1]], axis=1)
        return grid.to_pixels(moved)

    return _mapped(near, to_scene)


def _mapped(polygons: Polygons, function: Any) -> Polygons:
    return np.asarray(shapely.transform(polygons, function), np.object_)


def _box_around(grid: Grid, crs: CRS, what: str) -> tuple[Any, float]:
    """Box around a scene in another coordinate system, and the offset of the scene's own longitudes from the box's.

    Longitudes of the box continue beyond 180 degrees.
    """
    assert grid.crs is not None
    points = transformed(grid.to_ground(grid.lattice(33)), grid.crs, crs, what)
    points = points[np.isfinite(points).all(axis=1)]
    if not len(points):
        return shapely.Polygon(), 0.0
    turn = 0.0
    if crs.is_geographic:
        middle = points[len(points) // 2, 0]
        points[:, 0] = middle + (points[:, 0] - middle + 180) % 360 - 180
        turn = 360.0 * round((grid.middle[0] - middle) / 360) if grid.crs.is_geographic else 0.0
    low, high = points.min(0), points.max(0)
    margin = (high - low) * _MARGIN
    low, high = low - margin, high + margin
    if crs.is_geographic:
        low[1], high[1] = max(low[1], -90.0), min(high[1], 90.0)
    return shapely.box(*low, *high), turn


def _near(polygons: Polygons, box: Any, *, turns: bool) -> Polygons:
    """The polygons clipped to the box, with added vertices; `turns`: also after a shift by 360 degrees either way."""
    if shapely.is_empty(box):
        return polygons[:0]
    low_x, low_y, high_x, high_y = shapely.bounds(box)
    step = max(high_x - low_x, high_y - low_y) / _PIECES
    found = []
    for shift in (-360.0, 0.0, 360.0) if turns else (0.0,):
        moved = shapely.transform(polygons, partial(np.add, (shift, 0)))
        moved = moved[shapely.intersects(shapely.box(*shapely.bounds(moved).T), box)]
        cut = shapely.intersection(shapely.make_valid(moved), box)
        found.append(cut)
    parts = shapely.get_parts(np.concatenate(found))
    parts = parts[shapely.get_type_id(parts) == shapely.GeometryType.POLYGON]
    return np.asarray(shapely.segmentize(parts, step), np.object_)
