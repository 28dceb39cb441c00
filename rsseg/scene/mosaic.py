"""One map of the class rasters of many scenes, and its class areas."""

import os
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.transform import Affine

from rsseg.errors import DataError, UsageError
from rsseg.files import replaced, write_text
from rsseg.raster import Raster, Window
from rsseg.scene.options import ClassArea
from rsseg.scene.source import TAG
from rsseg.task import NODATA, Task
from rsseg.vector.grid import Grid

_SIDE = 2048
"""Side of the windows that are counted, in pixels."""
_SAME = 1e-6
"""Relative tolerance of pixel sides."""


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


def check_mosaic(output: Path) -> None:
    """Raise `UsageError` if the format of a mosaic is unknown."""
    if output.suffix.lower() not in (".vrt", ".tif", ".tiff"):
        raise UsageError(f"{output}: --mosaic writes .vrt or .tif.")


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
        if own != crs:
            raise UsageError(
                f"--mosaic: {path} has the coordinate system {own}, {first} has {crs}. Make one mosaic for each."
            )
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
                counts += np.bincount(values.ravel(), minlength=256)
                if per_pixel is not None:
                    areas += per_pixel.sums(values, top, left)
    return ClassArea.table(task, counts, None if per_pixel is None else areas)
