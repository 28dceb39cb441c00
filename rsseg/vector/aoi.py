"""The area of interest: polygons of a vector file, as a mask of a scene's pixels."""

import json
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.features import rasterize
from rasterio.transform import Affine

from rsseg.errors import DataError
from rsseg.raster import RasterInfo, Window
from rsseg.vector.grid import Grid, Points, reproject
from rsseg.vector.wkb import polygons_of_wkb

Polygon = list[Points]
_PIECES = 32
"""Points per edge when an area is brought to another coordinate system, where straight lines are curves."""


_SYSTEM_QUERY = """
SELECT organization, organization_coordsys_id, definition FROM gpkg_spatial_ref_sys WHERE srs_id = ?
"""


@dataclass(frozen=True)
class Region:
    """Polygons in pixels of a scene; a pixel belongs to it if its centre does."""

    polygons: tuple[Polygon, ...]

    def mask(self, window: Window) -> NDArray[np.bool_]:
        """bool (h, w) of the window."""
        near = [
            {"type": "Polygon", "coordinates": [ring.tolist() for ring in polygon]}
            for polygon, (left, top, right, bottom) in zip(self.polygons, self._bounds, strict=True)
            if left < window.col + window.width and right > window.col
            if top < window.row + window.height and bottom > window.row
        ]
        shape = window.height, window.width
        if not near:
            return np.zeros(shape, np.bool_)
        burnt = rasterize(near, shape, transform=Affine.translation(window.col, window.row), dtype=np.uint8)
        return np.asarray(burnt > 0)

    @cached_property
    def _bounds(self) -> list[tuple[float, float, float, float]]:
        return [(*ring.min(0).tolist(), *ring.max(0).tolist()) for ring, *_ in self.polygons]


def read_region(path: Path, info: RasterInfo) -> Region:
    """The polygons of a GeoJSON or GeoPackage file on the pixels of a scene.

    Raises:
        DataError: no such file, no polygon in it, or no way to the scene's coordinates.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file.")
    match path.suffix.lower():
        case ".geojson" | ".json":
            layers = [_read_geojson(path)]
        case ".gpkg":
            layers = _read_geopackage(path)
        case suffix:
            raise DataError(f"{path}: areas are read from .geojson, .json and .gpkg, not from {suffix or 'this'}.")
    grid = Grid(info)
    placed = [_placed(polygon, crs, grid, path) for crs, polygons in layers for polygon in polygons]
    if not placed:
        raise DataError(f"{path}: there is no polygon in this file.")
    return Region(tuple(placed))


def _placed(polygon: Polygon, crs: CRS | None, grid: Grid, path: Path) -> Polygon:
    if grid.crs is None and crs is not None and not grid.is_located:
        raise DataError(f"{path}: the scene has no coordinates, so that an area cannot be found in it.")
    if crs is None or grid.crs is None or crs == grid.crs:
        return [grid.to_pixels(ring) for ring in polygon]
    return [grid.to_pixels(reproject(_divided(ring), crs, grid.crs, str(path))) for ring in polygon]


def _divided(ring: Points) -> Points:
    steps = np.linspace(0, 1, _PIECES, endpoint=False)[:, None]
    pieces = [start + (end - start) * steps for start, end in pairwise(ring)]
    return np.concatenate([*pieces, ring[-1:]])


def _read_geojson(path: Path) -> tuple[CRS | None, list[Polygon]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        # The standard knows longitude and latitude only; an older one named others.
        name = ((content.get("crs") or {}).get("properties") or {}).get("name", "OGC:CRS84")
        polygons = list(_geojson_polygons(content))
    except (ValueError, AttributeError, TypeError, KeyError, IndexError):
        raise DataError(f"{path}: this is not GeoJSON that can be read.") from None
    try:
        return CRS.from_user_input(name), polygons
    except CRSError:
        raise DataError(f"{path}: the coordinate system {name!r} is unknown.") from None


def _geojson_polygons(item: dict[str, Any]) -> Iterator[Polygon]:
    match item["type"]:
        case "FeatureCollection":
            for feature in item["features"]:
                yield from _geojson_polygons(feature)
        case "Feature" if item["geometry"]:
            yield from _geojson_polygons(item["geometry"])
        case "GeometryCollection":
            for geometry in item["geometries"]:
                yield from _geojson_polygons(geometry)
        case "Polygon":
            yield [_points(ring) for ring in item["coordinates"]]
        case "MultiPolygon":
            for polygon in item["coordinates"]:
                yield [_points(ring) for ring in polygon]


def _points(ring: list[list[float]]) -> Points:
    points = np.array([point[:2] for point in ring], np.float64)
    if points.ndim != 2 or len(points) < 4:
        raise ValueError("a ring has at least four points")
    return points


def _read_geopackage(path: Path) -> list[tuple[CRS | None, list[Polygon]]]:
    layers = []
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            tables = database.execute("SELECT table_name, column_name, srs_id FROM gpkg_geometry_columns").fetchall()
            for table, column, system in tables:
                row = database.execute(_SYSTEM_QUERY, (system,)).fetchone()
                blobs = database.execute(f'SELECT "{column}" FROM "{table}" WHERE "{column}" IS NOT NULL')
                polygons = [polygon for (blob,) in blobs for polygon in polygons_of_wkb(_without_header(blob))]
                layers.append((_system(row), polygons))
    except (sqlite3.Error, ValueError, struct.error, CRSError) as error:
        raise DataError(f"{path}: this is not a GeoPackage that can be read: {error}.") from None
    return layers


def _system(row: tuple[str, int, str] | None) -> CRS | None:
    if row is None or row[0].upper() == "NONE":
        return None
    return CRS.from_epsg(row[1]) if row[0].upper() == "EPSG" else CRS.from_wkt(row[2])


def _without_header(blob: bytes) -> bytes:
    """A GeoPackage puts its own header before the well-known binary."""
    if blob[:2] != b"GP":
        raise ValueError("a geometry has no GeoPackage header")
    box = (0, 32, 48, 48, 64)[blob[3] >> 1 & 7]
    return blob[8 + box :]
