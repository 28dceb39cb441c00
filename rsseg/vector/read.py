"""Layers and fields of vector files, with errors that name what there is."""

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyogrio
import shapely
from pyogrio._err import CPLE_BaseError  # what GDAL's own errors are raised as; it has no public name
from rasterio.crs import CRS
from rasterio.errors import CRSError

from rsseg.errors import DataError
from rsseg.files import is_file, is_folder

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
