"""Polygons of a class raster as a vector file, in bounded memory; default QGIS styles inside a GeoPackage."""

import json
import shutil
import sqlite3
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import numpy as np
import pyogrio
import shapely
from numpy.typing import NDArray
from rasterio.crs import CRS

from rsseg.errors import MachineError, UsageError
from rsseg.files import check_outputs, remove_leftovers, replaced, temporary_path
from rsseg.raster import Raster, Window
from rsseg.task import NODATA, Task
from rsseg.vector.grid import LONGITUDE_LATITUDE, Grid, reproject
from rsseg.vector.polygons import PixelPolygon, trace_polygons
from rsseg.vector.read import VECTOR_ERRORS

# GDAL's warnings, with lines of source code, and those of missing coordinates, which are normal here. Once for the
# process: a filter around a call leaks between threads.
warnings.filterwarnings("ignore", module=r"pyogrio\.")
warnings.filterwarnings("ignore", message="'crs' was not provided", category=UserWarning)

DRIVERS = {".gpkg": "GPKG", ".geojson": "GeoJSON", ".fgb": "FlatGeobuf", ".shp": "ESRI Shapefile", ".parquet": ""}
"""GDAL's name of each format that is written; GeoParquet is written by pyarrow."""
SHAPEFILE_PARTS = (".shp", ".shx", ".dbf", ".prj", ".cpg")
_BATCH = 2000
"""Polygons per batch that is georeferenced and written."""
_CHECKED = 100_000
"""Polygons per batch that is read back."""
_FIELDS = ("value", "class", "pixels", "area_m2")
_LAYER = "classes"
_STYLES = """
CREATE TABLE IF NOT EXISTS layer_styles (
  id INTEGER PRIMARY KEY AUTOINCREMENT, f_table_catalog TEXT(256), f_table_schema TEXT(256), f_table_name TEXT(256),
  f_geometry_column TEXT(256), styleName TEXT(30), styleQML TEXT, styleSLD TEXT, useAsDefault BOOLEAN,
  description TEXT, owner TEXT(30), ui TEXT(30),
  update_time DATETIME DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')))
"""


def polygon_files(output: Path) -> tuple[Path, ...]:
    """All files that polygons are written to; a shapefile has several.

    Raises:
        UsageError: the format is unknown or needs a package that is missing.
    """
    match output.suffix.lower():
        case ".shp":
            return tuple(output.with_suffix(part) for part in SHAPEFILE_PARTS)
        case ".parquet":
            _arrow()
        case suffix if suffix not in DRIVERS:
            raise UsageError(f"{output}: polygons are written to {', '.join(DRIVERS)}. Choose one of these extensions.")
    return (output,)


def are_own(path: Path) -> bool:
    """Whether a file holds polygons of `write_polygons`."""
    try:
        return tuple(pyogrio.read_info(path)["fields"]) == tuple(_FIELDS)
    except VECTOR_ERRORS:
        return False


def write_polygons(
    classes: Path, task: Task, output: Path, *, min_area: float = 0.0, simplify: float = 0.0, overwrite: bool = False
) -> int:
    """Write one polygon per 4-connected component of a class raster; returns their number.

    Attributes are `value`, `class`, `pixels` and `area_m2`, the last two before any simplification. GeoJSON holds
    longitude and latitude, cut at the antimeridian (RFC 7946); other formats hold the coordinates of the raster. A
    raster that has only ground control points is located by their polynomial; one without coordinates uses columns and
    rows.

    Args:
        classes: class raster, as predicted.
        task: names of the values.
        output: file to write; it appears when it is complete. The extension gives the format.
        min_area: smaller polygons are left out; square metres, or pixels if pixel areas are unknown.
        simplify: tolerance in pixels; neighbours keep their common border.
        overwrite: replace an existing file.

    Raises:
        UsageError: see `polygon_files`, or the file exists already.
        DataError: the raster is damaged, or its coordinates have no longitude and latitude.
        MachineError: the file cannot be written.
    """
    check_outputs([("--polygons", file) for file in polygon_files(output)], [classes], overwrite=overwrite)
    work = temporary_path(output)
    traced, made = work / "traced.gpkg", work / output.name
    try:
        work.mkdir(parents=True)
        with Raster(classes) as raster:
            grid = Grid(raster.info)
            if output.suffix.lower() == ".geojson" and grid.crs is not None:
                # GDAL gives no reason for a failed transformation.
                reproject(grid.to_ground(np.zeros((1, 2))), grid.crs, LONGITUDE_LATITUDE, str(output))
            count = _write_traced(traced, raster, grid, task, min_area, simplify)
        _convert(traced, made, grid)
        _check_written(made, count)
        if output.suffix.lower() == ".shp":
            # Left by a replaced file: a coordinate system that the new one has not, or an index of other polygons.
            for ending in (*SHAPEFILE_PARTS, ".qix", ".sbn", ".sbx"):
                if not made.with_suffix(ending).exists():
                    output.with_suffix(ending).unlink(missing_ok=True)
        for file in sorted(work.glob(f"{made.stem}.*"), key=lambda file: file == made):
            if file != traced:
                file.replace(output.with_suffix(file.suffix) if file != made else output)
    except VECTOR_ERRORS as error:
        raise MachineError(
            f"{output}: cannot be written: {str(error).rstrip('.')}. Make room on the disk, close programs that have "
            "the file open, or choose another name."
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
        remove_leftovers(output.parent)
    return count


def write_shapes(
    output: Path,
    shapes: Sequence[Any],
    crs: CRS | None,
    fields: Mapping[str, NDArray[Any]],
    *,
    layer: str,
    style: str,
) -> None:
    """Write a GeoPackage of shapely polygons with their attributes and a style for QGIS.

    Raises:
        MachineError: the file cannot be written.
    """
    with replaced(output, sqlite3.Error, *VECTOR_ERRORS, ending=output.suffix) as temporary:
        output.parent.mkdir(parents=True, exist_ok=True)
        pyogrio.raw.write(
            temporary,
            geometry=shapely.to_wkb(np.array(shapes, object)),
            field_data=[v.astype(object) if v.dtype.kind == "U" else v for v in fields.values()],
            fields=list(fields),
            layer=layer,
            driver="GPKG",
            geometry_type="Polygon",
            crs=None if crs is None else crs.to_wkt(),
        )
        add_style(temporary, layer, style)


def _write_traced(path: Path, raster: Raster, grid: Grid, task: Task, min_area: float, simplify: float) -> int:
    """All polygons as a GeoPackage without an index: it can be appended to, and read as a stream."""
    names = {c.value: c.name for c in task.classes}
    areas, info, count = grid.pixel_areas(), raster.info, 0

    def read(start: int, stop: int) -> NDArray[np.uint8]:
        pixels, valid = raster.read(Window(start, 0, stop - start, info.width))
        return np.where(valid, pixels[0], np.uint8(NODATA))

    def wanted() -> Iterator[PixelPolygon]:
        area_of = None if areas is None else areas.of_ring
        for polygon in trace_polygons(read, info.height, info.width, simplify=simplify, area_of=area_of):
            if (polygon.pixels if polygon.area is None else polygon.area) >= min_area:
                yield polygon

    polygons = wanted()
    while (batch := list(islice(polygons, _BATCH))) or not count:
        pyogrio.raw.write(
            path,
            shapely.to_wkb(_placed(batch, grid)),
            [
                np.array([p.value for p in batch], np.int32),
                np.array([names.get(p.value, str(p.value)) for p in batch], np.object_),
                np.array([p.pixels for p in batch], np.int64),
                np.array([np.nan if p.area is None else p.area for p in batch], np.float64),
            ],
            _FIELDS,
            layer=_LAYER,
            driver="GPKG",
            geometry_type="Polygon",
            crs=None if grid.crs is None else grid.crs.to_wkt(),
            append=count > 0,
            **({} if count else {"SPATIAL_INDEX": "NO"}),
        )
        count += len(batch)
        if not batch:
            break
    return count


def _placed(batch: list[PixelPolygon], grid: Grid) -> NDArray[np.object_]:
    """Shapely polygons in coordinates on the ground, outer rings counterclockwise."""
    if not batch:
        return np.array([], np.object_)
    rings = [ring for polygon in batch for ring in polygon.rings]
    points = grid.to_ground(np.concatenate([np.array(ring, np.float64) for ring in rings]))
    ends = np.cumsum([0, *map(len, rings)]), np.cumsum([0, *(len(polygon.rings) for polygon in batch)])
    placed = shapely.from_ragged_array(shapely.GeometryType.POLYGON, points, ends)
    return np.asarray(shapely.orient_polygons(placed), np.object_)


def _convert(traced: Path, made: Path, grid: Grid) -> None:
    """Stream the traced polygons into the requested format."""
    suffix = made.suffix.lower()
    with pyogrio.raw.open_arrow(traced, use_pyarrow=suffix == ".parquet", batch_size=_BATCH) as (about, stream):
        if suffix == ".parquet":
            _write_geoparquet(stream, made, about["geometry_name"], grid)
            return
        options = {}
        if suffix == ".geojson":
            options = {"COORDINATE_PRECISION": "9"} | ({} if grid.crs is None else {"RFC7946": "YES"})
        elif suffix == ".shp":
            options = {"ENCODING": "UTF-8"}
        pyogrio.raw.write_arrow(
            stream,
            made,
            layer=made.stem if suffix == ".shp" else _LAYER,
            driver=DRIVERS[suffix],
            geometry_name=about["geometry_name"],
            geometry_type="Polygon",
            crs=about["crs"],
            **options,
        )


def _check_written(path: Path, count: int) -> None:
    """Raise OSError if a file is incomplete: GDAL does not report every write that fails when a file is closed."""
    read = 0
    if path.suffix.lower() == ".parquet":
        return  # pyarrow reports every failure
    if path.suffix.lower() == ".geojson":
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 20, 0))
            read = count if b"".join(file.read().split()).endswith(b"]}") else -1
    else:
        while read < count:
            part = pyogrio.raw.read(path, columns=["pixels"], skip_features=read, max_features=_CHECKED)
            if not len(part[2]):
                break
            read += len(part[2])
        if path.suffix.lower() == ".gpkg" and not pyogrio.read_info(path)["capabilities"]["fast_spatial_filter"]:
            read = -1  # the index is written last
    if read != count:
        raise OSError("the file on the disk is incomplete")


def _write_geoparquet(stream: Any, path: Path, geometry: str, grid: Grid) -> None:
    arrow, parquet = _arrow()
    column: dict[str, Any] = {"encoding": "WKB", "geometry_types": ["Polygon"], "orientation": "counterclockwise"}
    column["crs"] = None if grid.crs is None else grid.crs.to_dict(projjson=True)
    about = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
    fields = [("geometry", arrow.binary()) if f.name == geometry else (f.name, f.type) for f in stream.schema]
    schema = arrow.schema(fields, metadata={"geo": json.dumps(about)})
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in stream:
            writer.write_table(arrow.Table.from_arrays(batch.columns, schema=schema))


def _arrow() -> tuple[Any, Any]:
    """Import pyarrow, an optional dependency because it is large and only needed here."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(
            "writing .parquet needs pyarrow: pip install 'rsseg[parquet]'. Or choose .gpkg or .fgb."
        ) from None
    return pyarrow, pyarrow.parquet


def form_style(choices: Mapping[str, Sequence[str]], *, hidden: Sequence[str] = ()) -> str:
    """QML whose form offers a list of values for the fields of `choices` and does not show the `hidden` ones."""
    root = Xml.Element("qgis", version="3.22", styleCategories="Fields|Forms")
    fields = Xml.SubElement(root, "fieldConfiguration")
    for name, values in choices.items():
        config = _widget(fields, name, "ValueMap")
        options = Xml.SubElement(Xml.SubElement(config, "Option", type="Map"), "Option", name="map", type="List")
        for value in values:
            entry = Xml.SubElement(options, "Option", type="Map")
            Xml.SubElement(entry, "Option", name=value, value=value, type="QString")
    for name in hidden:
        Xml.SubElement(_widget(fields, name, "Hidden"), "Option")
    return Xml.tostring(root, encoding="unicode")


def outline_style(label: str, *, color: str = "255,127,0,255") -> str:
    """QML that draws polygons as outlines, labeled with the values of a field."""
    root = Xml.Element("qgis", version="3.22", styleCategories="Symbology|Labeling", labelsEnabled="1")
    symbols = Xml.SubElement(Xml.SubElement(root, "renderer-v2", type="singleSymbol"), "symbols")
    layer = Xml.SubElement(Xml.SubElement(symbols, "symbol", type="fill", name="0"), "layer")
    layer.set("class", "SimpleFill")
    options = Xml.SubElement(layer, "Option", type="Map")
    for name, value in (
        ("style", "no"),
        ("outline_color", color),
        ("outline_style", "solid"),
        ("outline_width", "0.8"),
    ):
        Xml.SubElement(options, "Option", name=name, value=value, type="QString")
    settings = Xml.SubElement(Xml.SubElement(root, "labeling", type="simple"), "settings")
    Xml.SubElement(settings, "text-style", fieldName=label, textColor=color, fontSize="11", fontSizeUnit="Point")
    return Xml.tostring(root, encoding="unicode")


def _widget(fields: Xml.Element, name: str, kind: str) -> Xml.Element:
    field = Xml.SubElement(fields, "field", name=name)
    return Xml.SubElement(Xml.SubElement(field, "editWidget", type=kind), "config")


def add_style(geopackage: Path, layer: str, qml: str) -> None:
    """Store a style that QGIS applies when it opens the layer.

    QGIS keeps styles in an attribute table of the file, `layer_styles`. Raises `sqlite3.Error`.
    """
    with closing(sqlite3.connect(geopackage)) as database, database:
        column = database.execute(
            "SELECT column_name FROM gpkg_geometry_columns WHERE table_name = ?", (layer,)
        ).fetchone()
        database.execute(_STYLES)
        database.execute(
            "INSERT OR IGNORE INTO gpkg_contents (table_name, data_type, identifier, srs_id) "
            "VALUES ('layer_styles', 'attributes', 'layer_styles', 0)"
        )
        database.execute(
            "INSERT INTO layer_styles (f_table_catalog, f_table_schema, f_table_name, f_geometry_column, styleName, "
            "styleQML, styleSLD, useAsDefault, description, owner) VALUES ('', '', ?, ?, 'rsseg', ?, '', 1, '', '')",
            (layer, column[0], qml),
        )
