"""Read vector files: layers and fields, with errors that name what there is, and geometries in pixels of a raster."""

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyogrio
import shapely
from numpy.typing import NDArray
from pyogrio._err import CPLE_BaseError  # what GDAL's own errors are raised as; it has no public name
from rasterio.crs import CRS
from rasterio.errors import CRSError

from rsseg.errors import DataError
from rsseg.files import is_file, is_folder
from rsseg.vector.grid import Grid, Points, reproject, transformed

Shapes = NDArray[np.object_]
"""Shapely geometries."""
MARGIN = 0.02
"""Margin of the box around a scene, relative to its size."""
_PIECES = 256
"""Segments along a scene that are short enough to stay straight in another coordinate system."""
VECTOR_ERRORS = (
    pyogrio.errors.DataSourceError,
    pyogrio.errors.DataLayerError,
    CPLE_BaseError,
    OSError,
    UnicodeDecodeError,  # names of layers or fields
)


@contextmanager
def vector_errors(path: Path) -> Iterator[None]:
    """Turn errors of GDAL, GEOS and PROJ about a vector file into `DataError`."""
    try:
        yield
    except (*VECTOR_ERRORS, shapely.GEOSException) as error:
        reason = vector_reason(error, path)
        raise DataError(
            f"{path}: not a readable vector file: {reason}. Give a .gpkg, .geojson, .fgb, .shp or .kml file "
            "that no other program has open."
        ) from None
    except CRSError as error:
        raise DataError(f"{path}: its coordinate system is unknown: {error}.") from None


def vector_reason(error: BaseException, path: Path) -> str:
    """GDAL's message without the name of the file, statements in SQL and repetitions."""
    if isinstance(error, UnicodeDecodeError):
        return "its text is not UTF-8; save it as UTF-8"
    clauses = str(error).removeprefix(f"{path}: ").split("; ")[0].split(": ")
    kept = [clause.strip() for clause in clauses if not re.search(r"\b(SELECT|PRAGMA)\b", clause)]
    return ": ".join(dict.fromkeys(kept)).rstrip(".") or "the database is damaged"


def spatial_layers(path: Path) -> list[str]:
    """Names of the layers with geometries; raises `DataError`."""
    if not (is_file(path) or is_folder(path)):
        raise DataError(f"{path}: there is no such file.")
    with vector_errors(path):
        return [str(name) for name, geometry in pyogrio.list_layers(path) if geometry is not None]


def split_layer(text: str) -> tuple[Path, str | None]:
    """`labels.gpkg:roads` -> path and layer; without a layer, or if a file of the whole name exists, None."""
    path, colon, layer = text.rpartition(":")
    # C:\labels.gpkg
    if not colon or len(path) < 2 or "/" in layer or "\\" in layer or is_file(Path(text)):
        return Path(text), None
    return Path(path), layer


def find_layer(path: Path, layer: str | None) -> str:
    """The layer of a name, or the only one of the file.

    Raises:
        DataError: an unreadable file, no such layer, or several and none was chosen; the message lists them.
    """
    layers = spatial_layers(path)
    if layer is None:
        if len(layers) == 1:
            return layers[0]
        if not layers:
            raise DataError(f"{path}: the file has no layer with geometries.")
        raise DataError(f"{path}: has several layers: {', '.join(layers)}. Choose one, such as {path}:{layers[0]}.")
    if layer not in layers:
        raise DataError(f"{path}: there is no layer {layer!r}; {nearest(layer, layers)}")
    return layer


def layer_fields(path: Path, layer: str) -> list[str]:
    """Names of a layer's attribute fields."""
    with vector_errors(path):
        return [str(name) for name in pyogrio.read_info(path, layer=layer)["fields"]]


def find_field(path: Path, layer: str, field: str, option: str) -> str:
    """Raise `DataError` listing the fields unless the layer has the field; returns it."""
    known = layer_fields(path, layer)
    if field not in known:
        have = nearest(field, known) if known else "the layer has no fields."
        raise DataError(f"{option} {field}: {path} (layer {layer}) has no such field; {have}")
    return field


def layer_crs(path: Path, text: str | None) -> CRS | None:
    """The coordinate system that a file states; raises `DataError` for an unknown one."""
    with vector_errors(path):
        return None if text is None else CRS.from_user_input(text)


def attribute_text(value: object) -> str:
    """An attribute's value as text: whole numbers without a fraction, "" for NULL."""
    if isinstance(value, float | np.floating):
        if not np.isfinite(value):
            return ""
        value = int(value) if value.is_integer() else value
    return "" if value is None else str(value).strip()


def nearest(name: str, known: Sequence[str]) -> str:
    """`did you mean 'x'? There are x, y.`"""
    by_case = {one.casefold(): one for one in known}
    found = difflib.get_close_matches(name.casefold(), by_case, n=1)
    shown = f"{', '.join(known[:20])}{', ...' if len(known) > 20 else ''}"
    return f"did you mean {by_case[found[0]]!r}? There are {shown}." if found else f"there are {shown}."


class Placed(NamedTuple):
    """Geometries in columns and rows of a raster, counted from the outer corner of its first pixel."""

    shapes: Shapes
    source: NDArray[np.int64]
    """Position of each among the given geometries; those far from the raster are left out."""


def place(shapes: Shapes, crs: CRS | None, grid: Grid, what: str, *, margin: float = MARGIN) -> Placed:
    """Convert points, lines and polygons of one part each to pixels; those that reach far beyond the raster are cut.

    Without a coordinate system on either side, the coordinates are taken to be those of the raster.

    Args:
        shapes: valid geometries in `crs`.
        crs: their coordinate system.
        grid: location of the raster.
        what: name of their file, for messages.
        margin: width of the surroundings in which nothing is cut, relative to the raster.

    Raises:
        DataError: the raster has no location, or the coordinates cannot be transformed.
    """
    if grid.crs is None and crs is not None and not grid.is_located:
        raise DataError(f"{what}: the scene has no coordinates, so the area cannot be located in it.")
    if crs is None or grid.crs is None:
        return Placed(_mapped(shapes, grid.to_pixels), np.arange(len(shapes)))
    box, turn = _box_around(grid, crs, what, margin)
    near, source = _near(shapes, box, turns=crs.is_geographic, same=crs == grid.crs)
    middle = grid.middle[0]

    def to_scene(points: Points) -> Points:
        assert grid.crs is not None
        moved = reproject(points, crs, grid.crs, what)
        if grid.crs.is_geographic:
            # Longitudes can differ from the scene's by multiples of 360 degrees.
            expected = points[:, 0] + turn if crs.is_geographic else middle
            moved = np.stack([expected + (moved[:, 0] - expected + 180) % 360 - 180, moved[:, 1]], axis=1)
        return grid.to_pixels(moved)

    # The corners of a box around a view of the whole globe may lie off the globe.
    whole = shapely.area(near) > (1 - 1e-9) * shapely.area(box)
    placed = np.full(len(near), shapely.box(0, 0, grid.info.width, grid.info.height), np.object_)
    placed[~whole] = _mapped(near[~whole], to_scene)
    return Placed(placed, source)


def buffered(placed: Placed, meters: NDArray[np.float64], grid: Grid, what: str) -> Placed:
    """Widen geometries, or narrow polygons by negative distances; what vanishes is left out.

    Args:
        placed: geometries in pixels.
        meters: float64 (n,), distance on the ground for each.
        grid: location of the raster.
        what: name of their file, for messages.

    Raises:
        DataError: the raster has no coordinate system with an ellipsoid.
    """
    centres = shapely.get_coordinates(shapely.centroid(placed.shapes))
    sizes = grid.pixel_sizes(centres)
    if sizes is None:
        raise DataError(
            f"{what}: distances in metres need a scene with a coordinate system. Assign one to the scene "
            "(`rio edit-info --crs`)."
        )
    points, which = shapely.get_coordinates(placed.shapes, return_index=True)
    wide = shapely.buffer(shapely.set_coordinates(placed.shapes.copy(), points * sizes[which]), meters)
    points, which = shapely.get_coordinates(wide, return_index=True)
    parts, source = shapely.get_parts(shapely.set_coordinates(wide, points / sizes[which]), return_index=True)
    kept = ~shapely.is_empty(parts)
    return Placed(parts[kept], placed.source[source[kept]])


def polygon_parts(shapes: Shapes) -> tuple[Shapes, NDArray[np.int64]]:
    """The polygons of geometries, without lines and points, and the position of each one's geometry."""
    parts, source = single_parts(shapes)
    kept = shapely.get_type_id(parts) == shapely.GeometryType.POLYGON
    return parts[kept], source[kept]


def single_parts(shapes: Shapes) -> tuple[Shapes, NDArray[np.int64]]:
    """The points, lines and polygons of geometries and collections, and the position of each one's geometry."""
    if (shapely.get_type_id(shapes) <= shapely.GeometryType.POLYGON).all() and not shapely.is_empty(shapes).any():
        return shapes, np.arange(len(shapes))
    outer, first = shapely.get_parts(shapes, return_index=True)
    parts, second = shapely.get_parts(outer, return_index=True)
    kept = ~shapely.is_empty(parts)
    return parts[kept], first[second[kept]]


def _mapped(shapes: Shapes, function: Any) -> Shapes:
    return np.asarray(shapely.transform(shapes, function), np.object_)


def _box_around(grid: Grid, crs: CRS, what: str, margin: float) -> tuple[Any, float]:
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
    around = (high - low) * margin
    low, high = low - around, high + around
    if crs.is_geographic:
        low[1], high[1] = max(low[1], -90.0), min(high[1], 90.0)
    return shapely.box(*low, *high), turn


def _near(shapes: Shapes, box: Any, *, turns: bool, same: bool) -> Placed:
    """Geometries that meet the box, clipped to it.

    Args:
        shapes: geometries.
        box: rectangle.
        turns: also after a shift by 360 degrees either way.
        same: the scene has the same coordinate system; otherwise vertices are added to long segments.
    """
    if shapely.is_empty(box):
        return Placed(shapes[:0], np.zeros(0, np.int64))
    low_x, low_y, high_x, high_y = shapely.bounds(box)
    found, sources = [], []
    for shift in (-360.0, 0.0, 360.0) if turns else (0.0,):
        moved = shapely.transform(shapes, partial(np.add, (shift, 0))) if shift else shapes
        left, bottom, right, top = shapely.bounds(moved).T
        meets = (left <= high_x) & (right >= low_x) & (bottom <= high_y) & (top >= low_y)
        inside = (left >= low_x) & (right <= high_x) & (bottom >= low_y) & (top <= high_y)
        across = np.flatnonzero(meets & ~inside)
        parts, source = single_parts(shapely.intersection(moved[across], box))
        # A polygon that only touches the box leaves a line.
        kept = shapely.get_dimensions(parts) == shapely.get_dimensions(moved[across])[source]
        found += [moved[inside], parts[kept]]
        sources += [np.flatnonzero(inside), across[source[kept]]]
    near = np.concatenate(found)
    if not same:
        near = shapely.segmentize(near, max(high_x - low_x, high_y - low_y) / _PIECES)
    return Placed(np.asarray(near, np.object_), np.concatenate(sources))
