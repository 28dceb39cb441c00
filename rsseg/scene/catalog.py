"""Many scenes: STAC items that name them, lists of what a batch made, and one map of its class rasters."""

import csv
import io
import json
import os
import time
import urllib.request
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.transform import Affine
from rasterio.warp import transform_geom

from rsseg.errors import DataError, UsageError
from rsseg.files import is_file, replaced, write_text
from rsseg.raster import Raster, Window
from rsseg.scene.options import ClassArea, Outcome
from rsseg.scene.source import TAG, is_local
from rsseg.task import NODATA, Task
from rsseg.text import load_json, read_text
from rsseg.vector.grid import Grid

_SCENE = "rsseg:scene"
"""Property of an item: the input."""
_TIMEOUT_S = 30.0
_MOST_BYTES = 1 << 28
_NOT_DATA = {"thumbnail", "overview", "metadata", "data-mask"}
"""Roles of assets that are no scenes."""
_IMAGES = ("image/tiff", "image/vnd", "image/jp2", "application/x-hdf", "image/x.geotiff")
_ENDINGS = (".tif", ".tiff", ".vrt", ".jp2", ".img")
_COLUMNS = ("scene", "output", "status", "error", "width", "height", "crs", "west", "south", "east", "north")
_SIDE = 2048
"""Side of the windows that are counted, in pixels."""
_SAME = 1e-6
"""Relative tolerance of pixel sides."""


def expand_items(names: Sequence[str], asset: str | None = None) -> tuple[list[str], dict[str, str]]:
    """Replace STAC items and item collections by the scenes that they name.

    Args:
        names: scenes; files and URLs that end in .json or .geojson, and those of an API that end in /items, are STAC.
        asset: key of the asset to take; None takes the only image of an item.

    Returns:
        All scenes, and for those of items the id of the item, which names the output.

    Raises:
        DataError: no STAC, or it cannot be read.
        UsageError: no or several images in an item, or an asset that it lacks.
    """
    scenes: list[str] = []
    ids: dict[str, str] = {}
    for name in names:
        if not _is_catalog(name):
            scenes.append(name)
            continue
        for where, item in _items(name):
            href = _asset(name, item, asset)
            if is_local(href) and not Path(href).is_absolute():
                href = str(Path(where).parent / href) if is_local(where) else urljoin(where, href)
            scenes.append(href)
            ids[href] = str(item.get("id", Path(href).stem)).replace("/", "_")
    return scenes, ids


def _is_catalog(name: str) -> bool:
    path = urlsplit(name).path if name.startswith(("http://", "https://")) else name
    if is_local(name) and not is_file(name):
        return False
    return path.lower().endswith((".json", ".geojson")) or (path != name and path.rstrip("/").endswith("/items"))


def _items(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Items of all pages of a collection, each with the name of its page."""
    seen: set[str] = set()
    page: str | None = name
    is_empty = True
    while page is not None and page not in seen:
        seen.add(page)
        content = load_json(_read(page), page, DataError)
        kind = content.get("type") if isinstance(content, dict) else None
        if kind not in ("Feature", "FeatureCollection") or (kind == "Feature" and "assets" not in content):
            raise DataError(f"{page}: neither a STAC item nor an item collection (GeoJSON with assets).")
        links, features = (content.get(key) or [] for key in ("links", "features"))
        if not (isinstance(links, list) and isinstance(features, list)):
            raise DataError(f"{page}: damaged: `links` and `features` of STAC are lists.")
        for item in [content] if kind == "Feature" else features:
            is_empty = False
            if not isinstance(item, dict) or not isinstance(item.get("assets"), dict):
                raise DataError(f"{page}: a feature without assets is no STAC item.")
            yield page, item
        pages = [link for link in links if isinstance(link, dict) and link.get("rel") == "next" and "href" in link]
        page = urljoin(page, str(pages[0]["href"])) if pages and kind == "FeatureCollection" else None
    if is_empty:
        raise DataError(f"{name}: a collection without items.")


def _read(name: str) -> str:
    if is_local(name):
        return read_text(Path(name), DataError, limit=_MOST_BYTES)
    try:
        with urllib.request.urlopen(name, timeout=_TIMEOUT_S) as answer:
            return str(answer.read(_MOST_BYTES).decode("utf-8"))
    except (OSError, ValueError, HTTPException) as error:
        raise DataError(f"{name}: cannot be read: {error}. Check the address, or download it.") from None


def _asset(name: str, item: Mapping[str, Any], wanted: str | None) -> str:
    """Address of an asset of an item."""
    assets = {
        key: asset
        for key, asset in item["assets"].items()
        if isinstance(asset, dict) and isinstance(asset.get("href"), str)
    }
    images = {
        key: asset
        for key, asset in assets.items()
        if _NOT_DATA.isdisjoint(map(str, asset.get("roles") or ()))
        and (str(asset.get("type", "")).startswith(_IMAGES) or asset["href"].lower().endswith(_ENDINGS))
    }
    found = assets if wanted is not None else images
    key = wanted if wanted is not None else next(iter(images), None)
    if key not in found or (wanted is None and len(images) > 1):
        have = ", ".join(images) or "no image"
        raise UsageError(f"{name}: item {item.get('id')} has {have}. Name the asset to use with --asset.")
    return str(found[key]["href"])


def write_catalog(outcomes: Sequence[Outcome], output: Path) -> None:
    """Write what a batch made: a STAC item collection (.json, .geojson) with what is finished, or a CSV of all scenes.

    Raises:
        UsageError: another ending.
        MachineError: it cannot be written.
    """
    check_catalog(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = [_row(outcome) for outcome in outcomes]
    if output.suffix.lower() == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_text(output, text.getvalue())
        return
    items = [_item(row, output) for row in rows if row["status"] != "failed"]
    write_text(output, json.dumps({"type": "FeatureCollection", "features": items}, indent=1) + "\n")


def check_catalog(output: Path) -> None:
    """Raise `UsageError` if the format of a catalogue is unknown."""
    if output.suffix.lower() not in (".json", ".geojson", ".csv"):
        raise UsageError(f"{output}: --catalog writes .json or .geojson (STAC items) or .csv.")


def is_catalog(path: Path) -> bool:
    """Whether `write_catalog` made a file."""
    with path.open(encoding="utf-8", errors="replace") as file:
        head = file.read(1 << 16)
    return head.startswith(",".join(_COLUMNS)) or _SCENE in head or head.endswith('"features": []\n}\n')


def _row(outcome: Outcome) -> dict[str, Any]:
    row = dict.fromkeys(_COLUMNS, "") | {
        "scene": outcome.scene,
        "output": str(outcome.output),
        "status": outcome.status,
        "error": outcome.error or "",
    }
    if outcome.status == "failed":
        return row
    with rasterio.open(outcome.output) as file:
        row |= {"width": file.width, "height": file.height, "crs": file.crs.to_string() if file.crs else ""}
        left, bottom, right, top = file.bounds
        ring = [(left, bottom), (right, bottom), (right, top), (left, top), (left, bottom)]
        try:
            ring = transform_geom(file.crs, "EPSG:4326", {"type": "Polygon", "coordinates": [ring]})["coordinates"][0]
        except (RasterioError, TypeError, AttributeError, ValueError):  # no coordinates
            return row
    xs, ys = zip(*ring, strict=True)
    return row | {"west": min(xs), "south": min(ys), "east": max(xs), "north": max(ys), "_ring": ring}


def _item(row: Mapping[str, Any], catalog: Path) -> dict[str, Any]:
    path = Path(row["output"])
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(path.stat().st_mtime))
    located = "_ring" in row
    place = {"bbox": [row[side] for side in ("west", "south", "east", "north")]} if located else {}
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": [],
        "id": path.stem,
        "geometry": {"type": "Polygon", "coordinates": [row["_ring"]]} if located else None,
        **place,
        "properties": {"datetime": made, "created": made, _SCENE: row["scene"]},
        "links": [],
        "assets": {
            "classes": {
                "href": _relative(path, catalog.parent),
                "type": "image/tiff; application=geotiff",
                "roles": ["data"],
            }
        },
    }


def _relative(path: Path, folder: Path) -> str:
    path, folder = path.absolute(), folder.absolute()
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


@dataclass(frozen=True)
class _Placed:
    """A raster in the pixels of the mosaic."""

    path: Path
    left: int
    top: int
    width: int
    height: int

    def touches(self, window: Window) -> bool:
        return (
            self.left < window.col + window.width
            and window.col < self.left + self.width
            and self.top < window.row + window.height
            and window.row < self.top + self.height
        )


def check_mosaic(output: Path, scenes: Iterable[str] = ()) -> None:
    """Raise `UsageError` if the format of a mosaic is unknown, or readable scenes differ in their coordinate system."""
    if output.suffix.lower() not in (".vrt", ".tif", ".tiff"):
        raise UsageError(f"{output}: --mosaic writes .vrt or .tif.")
    first: tuple[str, CRS | None] | None = None
    for scene in scenes:
        try:
            with Raster(scene) as raster:
                crs = raster.info.crs
        except DataError:  # fails later, on its own
            continue
        first = first or (scene, crs)
        _check_same(scene, crs, *first)


def _check_same(path: Path | str, own: CRS | None, first: Path | str, crs: CRS | None) -> None:
    if own != crs:
        raise UsageError(
            f"--mosaic: {path} has the coordinate system {own}, {first} has {crs}. Make one mosaic for each."
        )


def write_mosaic(rasters: Sequence[Path], task: Task, output: Path) -> tuple[ClassArea, ...]:
    """Join class rasters; where they overlap, the later one is on top, except where it has no data.

    Args:
        rasters: class rasters of one coordinate system and pixel size. Rasters between the pixels of the first one are
            moved by up to half a pixel.
        task: classes and colours.
        output: .vrt that refers to the rasters, or .tif, a cloud-optimized copy. An existing file is replaced.

    Returns:
        Areas of the classes; pixels of an overlap are counted once.

    Raises:
        UsageError: another ending; rasters of several coordinate systems or pixel sizes.
        MachineError: it cannot be written.
    """
    check_mosaic(output)
    placed, transform, crs = _place(rasters)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix.lower() == ".vrt":
        write_text(output, _vrt(placed, transform, crs, task, output.parent))
        return _areas(output, placed, task)
    with replaced(output, RasterioError, ending=".tif") as temporary:
        vrt = temporary.with_suffix(".vrt")
        try:
            vrt.write_text(_vrt(placed, transform, crs, task, output.parent), encoding="utf-8")
            options = {"blocksize": 512, "compress": "deflate", "bigtiff": "IF_SAFER", "resampling": "mode"}
            rasterio.shutil.copy(vrt, temporary, driver="COG", **options)
            return _areas(vrt, placed, task)
        finally:
            vrt.unlink(missing_ok=True)
            temporary.with_name(f"{temporary.name}.aux.xml").unlink(missing_ok=True)


def _place(rasters: Sequence[Path]) -> tuple[list[_Placed], Affine, CRS | None]:
    """Rasters in the pixels of the smallest grid that holds all, and its transform."""
    found = []
    for path in rasters:
        try:
            with rasterio.open(path) as file:
                found.append((path, file.transform, file.crs, file.width, file.height))
        except RasterioError as error:
            raise DataError(f"{path}: cannot be read: {error}.") from None
    first, base, crs, *_ = found[0]
    sides = np.array([base.a, base.b, base.d, base.e])
    places = []
    for path, transform, own, width, height in found:
        _check_same(path, own, first, crs)
        if not np.allclose([transform.a, transform.b, transform.d, transform.e], sides, rtol=_SAME, atol=0):
            raise UsageError(
                f"--mosaic: the pixels of {path} are {transform.a:g} x {-transform.e:g}, those of {first} "
                f"{base.a:g} x {-base.e:g}. Predict all scenes with the same --gsd."
            )
        col, row = ~base * (transform.c, transform.f)
        places.append(_Placed(path, round(col), round(row), width, height))
    left, top = min(p.left for p in places), min(p.top for p in places)
    moved = [_Placed(p.path, p.left - left, p.top - top, p.width, p.height) for p in places]
    return moved, base * Affine.translation(left, top), crs


def _size(placed: Sequence[_Placed]) -> tuple[int, int]:
    return max(p.left + p.width for p in placed), max(p.top + p.height for p in placed)


def _vrt(placed: Sequence[_Placed], transform: Affine, crs: CRS | None, task: Task, folder: Path) -> str:
    width, height = _size(placed)
    root = ET.Element("VRTDataset", rasterXSize=str(width), rasterYSize=str(height))
    if crs is not None:
        ET.SubElement(root, "SRS").text = crs.to_wkt()
    ET.SubElement(root, "GeoTransform").text = ", ".join(f"{number:.17g}" for number in transform.to_gdal())
    # So that it is not taken for a scene.
    ET.SubElement(ET.SubElement(root, "Metadata"), "MDI", key=TAG).text = "mosaic"
    band = ET.SubElement(root, "VRTRasterBand", dataType="Byte", band="1")
    ET.SubElement(band, "Description").text = "class"
    tags = ET.SubElement(band, "Metadata")
    for info in task.classes:
        ET.SubElement(tags, "MDI", key=f"class_{info.value}").text = info.name
    ET.SubElement(band, "NoDataValue").text = str(NODATA)
    ET.SubElement(band, "ColorInterp").text = "Palette"
    by_value = {info.value: info for info in task.classes}
    names, table = ET.SubElement(band, "CategoryNames"), ET.SubElement(band, "ColorTable")
    for value in range(256):
        known = by_value.get(value)
        if value <= max(by_value):
            ET.SubElement(names, "Category").text = known.name if known else ""
        color = (*known.color, 255) if known else (0, 0, 0, 0 if value == NODATA else 255)
        ET.SubElement(table, "Entry", {f"c{i + 1}": str(part) for i, part in enumerate(color)})
    for place in placed:
        source = ET.SubElement(band, "ComplexSource")
        name = os.path.relpath(place.path.absolute(), folder.absolute())
        ET.SubElement(source, "SourceFilename", relativeToVRT="1").text = name
        ET.SubElement(source, "SourceBand").text = "1"
        kind = {"DataType": "Byte", "BlockXSize": "512", "BlockYSize": "512"}
        size = {"RasterXSize": str(place.width), "RasterYSize": str(place.height)}
        ET.SubElement(source, "SourceProperties", size | kind)
        size = {"xSize": str(place.width), "ySize": str(place.height)}
        ET.SubElement(source, "SrcRect", {"xOff": "0", "yOff": "0"} | size)
        ET.SubElement(source, "DstRect", {"xOff": str(place.left), "yOff": str(place.top)} | size)
        ET.SubElement(source, "NODATA").text = str(NODATA)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


def _areas(mosaic: Path, placed: Sequence[_Placed], task: Task) -> tuple[ClassArea, ...]:
    """Count the pixels and areas of the classes, window by window."""
    counts, areas = np.zeros(256, np.int64), np.zeros(256)
    with Raster(mosaic, columns=_SIDE) as raster:
        per_pixel = Grid(raster.info).pixel_areas()
        for top in range(0, raster.info.height, _SIDE):
            for left in range(0, raster.info.width, _SIDE):
                window = Window(top, left, min(_SIDE, raster.info.height - top), min(_SIDE, raster.info.width - left))
                if not any(place.touches(window) for place in placed):
                    continue
                values = raster.read_raw(window)[0]
                if per_pixel is None:
                    counts += np.bincount(values.ravel(), minlength=256)
                else:
                    pixels, area = per_pixel.totals(values, top, left)
                    counts += pixels
                    areas += area
    return ClassArea.table(task, counts, None if per_pixel is None else areas)
