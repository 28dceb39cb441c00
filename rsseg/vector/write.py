"""Polygons of a class raster as a GeoPackage, GeoJSON or GeoParquet file, streamed."""

import json
import math
import os
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.crs import CRS

from rsseg.errors import MachineError, UsageError
from rsseg.raster import Raster, Window
from rsseg.task import NODATA, Task
from rsseg.vector.grid import Grid, Points, reproject
from rsseg.vector.polygons import trace_polygons
from rsseg.vector.wkb import polygon_to_wkb

SUFFIXES = (".gpkg", ".geojson", ".parquet")
_BATCH = 2000
"""Polygons that are brought to coordinates and written at once."""
_LAYER = "classes"


@dataclass(frozen=True)
class PolygonOptions:
    """min_area: smaller polygons are left out; square metres where the raster's coordinates are, else pixels
    simplify: pixels by which borders may move; neighbours keep their common border
    """

    min_area: float = 0.0
    simplify: float = 0.0


@dataclass(frozen=True)
class _Feature:
    value: int
    name: str
    pixels: int
    area_m2: float | None
    rings: list[Points]
    """In coordinates on the ground; the outer ring first, counterclockwise."""


def check_polygon_output(path: Path, *, overwrite: bool) -> None:
    """Say what stands against writing `path` before any work is done.

    Raises:
        UsageError: the format is unknown or needs a package that is not there, or the file exists already.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path}: polygons are written to {', '.join(SUFFIXES)}. Choose one of these endings.")
    if path.exists() and not overwrite:
        raise UsageError(f"{path}: exists already. Choose another name, or replace it with --overwrite.")
    if path.suffix.lower() == ".parquet":
        _arrow()


def write_polygons(classes: Path, task: Task, output: Path, options: PolygonOptions, *, overwrite: bool = False) -> int:
    """Turn a class raster into polygons, one per area of one class that hangs together; returns how many.

    Each has `value`, `class`, `pixels` and `area_m2` (null where the coordinates are no lengths), the last two before
    any simplification. GeoJSON holds longitude and latitude, the others the coordinates of the raster. A raster that
    has only ground control points is placed by their polynomial, one without coordinates in columns and rows.

    Args:
        classes: class raster, as predicted.
        task: names of the values.
        output: file to make, it appears when it is complete.
        options: what to leave out.
        overwrite: replace an existing file.

    Raises:
        UsageError: see `check_polygon_output`.
        DataError: the raster is damaged, or its coordinates have no longitude and latitude.
        MachineError: the file cannot be written.
    """
    check_polygon_output(output, overwrite=overwrite)
    temporary = output.with_name(f".{output.stem}.{os.getpid()}.tmp{output.suffix}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with Raster(classes) as raster:
            grid = Grid(raster.info)
            features = _features(raster, grid, task, options)
            match output.suffix.lower():
                case ".gpkg":
                    count = _write_geopackage(temporary, features, grid.crs, grid.is_located)
                case ".geojson":
                    count = _write_geojson(temporary, features, grid.crs, str(output))
                case _:
                    count = _write_geoparquet(temporary, features, grid.crs)
        temporary.replace(output)
    except (OSError, sqlite3.Error) as error:
        raise MachineError(f"{output}: cannot be written: {error}. Make room on the disk or choose another.") from None
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _features(raster: Raster, grid: Grid, task: Task, options: PolygonOptions) -> Iterator[_Feature]:
    names = {c.value: c.name for c in task.classes}
    info, pixel_area = raster.info, grid.pixel_area

    def read(start: int, stop: int) -> NDArray[np.uint8]:
        pixels, valid = raster.read(Window(start, 0, stop - start, info.width))
        return np.where(valid, pixels[0], np.uint8(NODATA))

    for polygon in trace_polygons(read, info.height, info.width, simplify=options.simplify):
        area = None if pixel_area is None else polygon.pixels * pixel_area
        if (polygon.pixels if area is None else area) < options.min_area:
            continue
        points = grid.to_ground(np.concatenate([np.array(ring, np.float64) for ring in polygon.rings]))
        rings, at = [], 0
        for number, ring in enumerate(polygon.rings):
            placed = points[at : at + len(ring)]
            at += len(ring)
            rings.append(placed if (_area(placed) > 0) == (number == 0) else placed[::-1])
        yield _Feature(polygon.value, names.get(polygon.value, str(polygon.value)), polygon.pixels, area, rings)


def _area(ring: Points) -> float:
    x, y = (ring - ring[0]).T
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum())


def _batches(features: Iterator[_Feature]) -> Iterator[list[_Feature]]:
    while batch := list(islice(features, _BATCH)):
        yield batch


def _write_geojson(path: Path, features: Iterator[_Feature], crs: CRS | None, what: str) -> int:
    target, count = CRS.from_epsg(4326), 0
    with path.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for batch in _batches(features):
            points = np.concatenate([ring for feature in batch for ring in feature.rings])
            placed = iter(np.round(points if crs is None else reproject(points, crs, target, what), 9).tolist())
            for feature in batch:
                rings = [list(islice(placed, len(ring))) for ring in feature.rings]
                item = {
                    "type": "Feature",
                    "properties": _properties(feature),
                    "geometry": {"type": "Polygon", "coordinates": rings},
                }
                file.write((",\n" if count else "\n") + json.dumps(item))
                count += 1
        file.write("\n]}\n")
    return count


def _properties(feature: _Feature) -> dict[str, Any]:
    return {
        "value": feature.value,
        "class": feature.name,
        "pixels": feature.pixels,
        "area_m2": feature.area_m2,
    }


_TABLES = f"""
PRAGMA application_id = {0x47504B47};
PRAGMA user_version = 10300;
CREATE TABLE gpkg_spatial_ref_sys (srs_name TEXT NOT NULL, srs_id INTEGER NOT NULL PRIMARY KEY,
  organization TEXT NOT NULL, organization_coordsys_id INTEGER NOT NULL, definition TEXT NOT NULL, description TEXT);
CREATE TABLE gpkg_contents (table_name TEXT NOT NULL PRIMARY KEY, data_type TEXT NOT NULL, identifier TEXT UNIQUE,
  description TEXT DEFAULT '', last_change DATETIME NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ','now')),
  min_x DOUBLE, min_y DOUBLE, max_x DOUBLE, max_y DOUBLE, srs_id INTEGER REFERENCES gpkg_spatial_ref_sys (srs_id));
CREATE TABLE gpkg_geometry_columns (table_name TEXT NOT NULL UNIQUE REFERENCES gpkg_contents (table_name),
  column_name TEXT NOT NULL, geometry_type_name TEXT NOT NULL, srs_id INTEGER NOT NULL
  REFERENCES gpkg_spatial_ref_sys (srs_id), z TINYINT NOT NULL, m TINYINT NOT NULL,
  PRIMARY KEY (table_name, column_name));
CREATE TABLE {_LAYER} (fid INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL, geom POLYGON,
  value INTEGER, class TEXT, pixels INTEGER, area_m2 REAL);
"""
"""The tables that OGC 12-128r17 asks for, and the layer."""
_OWN_SYSTEM = 100000
"""Number for a coordinate system that has none."""


def _write_geopackage(path: Path, features: Iterator[_Feature], crs: CRS | None, located: bool) -> int:
    system, rows = _systems(crs, located)
    box = [math.inf, math.inf, -math.inf, -math.inf]
    count = 0
    with closing(sqlite3.connect(path)) as database, database:
        database.executescript(_TABLES)
        database.executemany("INSERT INTO gpkg_spatial_ref_sys VALUES (?, ?, ?, ?, ?, '')", rows)
        for batch in _batches(features):
            values = []
            for f in batch:
                low, high = f.rings[0].min(0), f.rings[0].max(0)
                box = [*np.minimum(box[:2], low).tolist(), *np.maximum(box[2:], high).tolist()]
                # Version 0, little-endian, with the box of the geometry.
                head = struct.pack("<2sBBi4d", b"GP", 0, 0b011, system, low[0], high[0], low[1], high[1])
                values.append((head + polygon_to_wkb(f.rings), f.value, f.name, f.pixels, f.area_m2))
            columns = "geom, value, class, pixels, area_m2"
            database.executemany(f"INSERT INTO {_LAYER} ({columns}) VALUES (?, ?, ?, ?, ?)", values)
            count += len(batch)
        extent = box if count else [None] * 4
        database.execute(
            "INSERT INTO gpkg_contents (table_name, data_type, identifier, min_x, min_y, max_x, max_y, srs_id) "
            "VALUES (?, 'features', ?, ?, ?, ?, ?, ?)",
            (_LAYER, _LAYER, *extent, system),
        )
        database.execute("INSERT INTO gpkg_geometry_columns VALUES (?, 'geom', 'POLYGON', ?, 0, 0)", (_LAYER, system))
    return count


def _systems(crs: CRS | None, located: bool) -> tuple[int, list[tuple[str, int, str, int, str]]]:
    """Number of the layer's coordinate system, and the table of systems."""
    rows = [
        ("Undefined Cartesian", -1, "NONE", -1, "undefined"),
        ("Undefined geographic", 0, "NONE", 0, "undefined"),
        ("WGS 84", 4326, "EPSG", 4326, CRS.from_epsg(4326).to_wkt()),
    ]
    if crs is None or not located:
        return -1, rows
    code = crs.to_epsg()
    if code is None:
        return _OWN_SYSTEM, [*rows, ("of the raster", _OWN_SYSTEM, "RASTER", _OWN_SYSTEM, crs.to_wkt())]
    return code, rows if code == 4326 else [*rows, (f"EPSG:{code}", code, "EPSG", code, crs.to_wkt())]


def _write_geoparquet(path: Path, features: Iterator[_Feature], crs: CRS | None) -> int:
    arrow, parquet = _arrow()
    column: dict[str, Any] = {"encoding": "WKB", "geometry_types": ["Polygon"], "orientation": "counterclockwise"}
    column["crs"] = None if crs is None else crs.to_dict(projjson=True)
    about = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
    schema = arrow.schema(
        {
            "value": arrow.uint8(),
            "class": arrow.string(),
            "pixels": arrow.int64(),
            "area_m2": arrow.float64(),
            "geometry": arrow.binary(),
        },
        metadata={"geo": json.dumps(about)},
    )
    count = 0
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in _batches(features):
            rows = [_properties(f) | {"geometry": polygon_to_wkb(f.rings)} for f in batch]
            writer.write_table(arrow.Table.from_pylist(rows, schema=schema))
            count += len(batch)
    return count


def _arrow() -> tuple[Any, Any]:
    """pyarrow is large and needed for this alone, so it is not among the requirements."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(
            "writing .parquet needs pyarrow: pip install 'rsseg[parquet]'. Or choose .gpkg or .geojson."
        ) from None
    return pyarrow, pyarrow.parquet
