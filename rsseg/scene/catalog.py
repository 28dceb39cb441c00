"""Catalogues: scenes listed by STAC items, and lists of what a batch made."""

import csv
import io
import json
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

import rasterio
from rasterio.errors import RasterioError
from rasterio.warp import transform_geom

from rsseg.errors import DataError, UsageError
from rsseg.files import is_file, write_text
from rsseg.scene.source import is_local
from rsseg.text import load_json, read_text

if TYPE_CHECKING:
    from rsseg.scene.batch import Outcome

_SCENE = "rsseg:scene"
"""Property of an item: the input."""
_TIMEOUT_S = 30.0
_MOST_BYTES = 1 << 28
_NOT_DATA = {"thumbnail", "overview", "metadata", "data-mask"}
"""Roles of assets that are no scenes."""
_IMAGES = ("image/tiff", "image/vnd", "image/jp2", "application/x-hdf", "image/x.geotiff")
_ENDINGS = (".tif", ".tiff", ".vrt", ".jp2", ".img")
_COLUMNS = ("scene", "output", "status", "error", "width", "height", "crs", "west", "south", "east", "north")


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
            href = str(_asset(name, item, asset).get("href"))
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
        for item in [content] if kind == "Feature" else content.get("features") or []:
            is_empty = False
            if not isinstance(item, dict) or not isinstance(item.get("assets"), dict):
                raise DataError(f"{page}: a feature without assets is no STAC item.")
            yield page, item
        links = content.get("links") or [] if kind == "FeatureCollection" else []
        following = next((link["href"] for link in links if link.get("rel") == "next" and "href" in link), None)
        page = None if following is None else urljoin(page, following)
    if is_empty:
        raise DataError(f"{name}: a collection without items.")


def _read(name: str) -> str:
    if is_local(name):
        return read_text(Path(name), DataError, limit=_MOST_BYTES)
    try:
        with urllib.request.urlopen(name, timeout=_TIMEOUT_S) as answer:
            return str(answer.read(_MOST_BYTES).decode("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: cannot be read: {error}. Check the address, or download it.") from None


def _asset(name: str, item: Mapping[str, Any], wanted: str | None) -> Mapping[str, Any]:
    assets = item["assets"]
    images = {
        key: asset
        for key, asset in assets.items()
        if isinstance(asset, dict)
        and "href" in asset
        and not _NOT_DATA & set(asset.get("roles") or ())
        and (str(asset.get("type", "")).startswith(_IMAGES) or str(asset["href"]).lower().endswith(_ENDINGS))
    }
    found = assets if wanted is not None else images
    key = wanted if wanted is not None else next(iter(images), None)
    if key not in found or (wanted is None and len(images) > 1):
        have = ", ".join(images) or "no image"
        raise UsageError(f"{name}: item {item.get('id')} has {have}. Name the asset to use with --asset.")
    chosen: Mapping[str, Any] = found[key]
    return chosen


def write_catalog(outcomes: Sequence["Outcome"], output: Path) -> None:
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


def _row(outcome: "Outcome") -> dict[str, Any]:
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
