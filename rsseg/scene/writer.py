"""The output rasters of a prediction, written in whole rows of blocks, and the picture of it.

A raster is written under a temporary name beside its final one, read back, and then renamed. A failure removes the
temporary files; those of a killed process are removed by the next prediction into the same folder."""

import glob
import os
import shutil
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import rasterio
import rasterio.shutil
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import RasterioError

import rsseg
from rsseg.data.picture import draw_sheet, stretched
from rsseg.errors import DataError, MachineError
from rsseg.files import remove_leftovers, replaced, temporary_path, writing
from rsseg.inference.blend import FULL
from rsseg.inference.machine import thread_count
from rsseg.raster import RasterInfo
from rsseg.scene.source import TAG
from rsseg.task import NODATA, Task

_BLOCK = 512
"""Side of a block of the output in pixels."""
_CACHE_BYTES = 32 << 20
"""GDAL's cache while the file is finished."""
_CREATION = {"compress": "deflate", "bigtiff": "IF_SAFER"}
_PICTURE_SIDE = 900
"""Longest side in pixels of each of the two pictures of a preview."""


@dataclass(frozen=True)
class Product:
    """The bands of one output raster.

    dtype: NumPy name of the pixel type
    resampling: of the overviews
    band_names: one per band
    half: stored as float16, which is not a pixel type of GDAL before 3.11
    scale: physical value of a stored 1
    colors: red, green, blue of pixel values; None for measured values
    value_names: names of pixel values
    """

    dtype: Literal["uint8", "float32"]
    nodata: float
    resampling: Literal["mode", "average"]
    band_names: tuple[str, ...]
    half: bool = False
    scale: float = 1.0
    colors: Mapping[int, tuple[int, int, int]] | None = None
    value_names: Mapping[int, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of bands."""
        return len(self.band_names)

    @property
    def pixel_bytes(self) -> int:
        """Bytes of a pixel over all bands, in memory."""
        return self.count * (1 if self.dtype == "uint8" else 4)


def class_product(task: Task) -> Product:
    """One band with the `value` of each class."""
    return Product(
        dtype="uint8",
        nodata=NODATA,
        resampling="mode",
        band_names=("class",),
        colors={c.value: c.color for c in task.classes},
        value_names={c.value: c.name for c in task.classes},
    )


def confidence_product(name: str = "confidence") -> Product:
    """One band with a measured value in 0..1, such as the probability of the class."""
    return Product("uint8", NODATA, "average", (name,), scale=1 / FULL)


def probability_product(task: Task, kind: Literal["uint8", "float16"]) -> Product:
    """A band per class with its probability."""
    if kind == "uint8":
        return Product("uint8", NODATA, "average", task.class_names, scale=1 / FULL)
    return Product("float32", -1.0, "average", task.class_names, half=True)


class SceneWriter:
    """Write one product on the grid of a scene, in panels of columns from left to right, each from top to bottom.

    A context manager: the file appears on exit without an exception; otherwise nothing is left behind.
    """

    def __init__(
        self, output: Path, info: RasterInfo, product: Product, *, cloud_optimized: bool, tags: Mapping[str, str]
    ) -> None:
        """Open a temporary file beside `output`.

        Args:
            output: final name; replaced if it exists.
            info: grid of the scene, which becomes the grid of the output.
            product: bands, colours and names.
            cloud_optimized: with internal overviews in the layout of a COG.
            tags: further metadata of the file.

        Raises:
            MachineError: the file cannot be created.
        """
        self._output, self._product, self._cloud_optimized = output, product, cloud_optimized
        self._height = info.height
        self._file = temporary_path(output, ".tif")
        self._panels: list[_Written] = []
        remove_leftovers(output.parent)
        try:
            with writing(output, RasterioError):
                output.parent.mkdir(parents=True, exist_ok=True)
                self._dataset = _create(self._file, info, product, tags)
        except BaseException:
            self._remove()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
            else:
                with suppress(RasterioError):
                    self._dataset.close()
        finally:
            self._remove()

    def write(self, rows: NDArray[Any], left: int = 0) -> None:
        """Append rows (count, n, width) to the panel that begins in column `left`.

        Raises:
            MachineError: the disk is full.
        """
        if not self._panels or self._panels[-1].left != left:
            self._flush()
            self._panels.append(_Written(left, rows.shape[2]))
            self._held = np.empty((self._product.count, 0, rows.shape[2]), rows.dtype)
        panel = self._panels[-1]
        # Only whole rows of blocks are written: partial ones would be compressed twice.
        while panel.rows + self._held.shape[1] + rows.shape[1] >= (end := (panel.rows // _BLOCK + 1) * _BLOCK):
            missing = end - panel.rows - self._held.shape[1]
            self._held = np.concatenate([self._held, rows[:, :missing]], axis=1)
            rows = rows[:, missing:]
            self._flush()
        self._held = np.concatenate([self._held, rows], axis=1)

    def _flush(self) -> None:
        if not self._panels or not self._held.shape[1]:
            return
        panel, height = self._panels[-1], self._held.shape[1]
        panel.checksum = zlib.crc32(self._stored(self._held), panel.checksum)
        with writing(self._output, RasterioError):
            window = ((panel.rows, panel.rows + height), (panel.left, panel.left + panel.width))
            self._dataset.write(self._held, window=window)
        panel.rows += height
        self._held = self._held[:, :0]

    def _stored(self, pixels: NDArray[Any]) -> memoryview:
        """The values as they are read back, for the checksum."""
        return np.ascontiguousarray(pixels.astype(np.float16) if self._product.half else pixels).data

    def _finish(self) -> None:
        self._flush()
        with rasterio.Env(GDAL_CACHEMAX=_CACHE_BYTES), writing(self._output, RasterioError):
            self._dataset.close()
            if self._cloud_optimized:
                self._file = self._to_cog(self._file)
            self._check()
            with self._file.open("rb") as file:
                os.fsync(file.fileno())
            # GDAL's side file holds what GeoTIFF keys cannot, such as some coordinate systems.
            side = _side_file(self._file)
            if self._product.value_names:
                _add_category_names(side, self._product.value_names)
            if self._output.exists():
                for ending in (".aux.xml", ".ovr", ".msk"):
                    self._output.with_name(self._output.name + ending).unlink(missing_ok=True)
            # Renamed before the raster: a raster under its final name is complete.
            if side.exists():
                side.replace(_side_file(self._output))
            self._file.replace(self._output)

    def _to_cog(self, source: Path) -> Path:
        """Copy to a second file: the layout of a COG needs sizes that are only known at the end."""
        # GDAL may crash on a full disk; overviews, one of them temporary, add at most two thirds.
        needed = 2 * source.stat().st_size + (1 << 20)
        if shutil.disk_usage(source.parent).free < needed:
            raise MachineError(
                f"{self._output}: {needed / 2**20:.0f} MB are needed to finish it, and the disk has less. Free some "
                "space, or write without overviews (--format gtiff)."
            )
        target = source.with_suffix(".cog.tif")
        rasterio.shutil.copy(
            source,
            target,
            driver="COG",
            blocksize=_BLOCK,
            resampling=self._product.resampling,
            num_threads=thread_count(),
            **_CREATION,
            **_bits(self._product),
        )
        source.unlink()
        return target

    def _check(self) -> None:
        """Read everything back: GDAL does not report every write that fails."""
        with rasterio.open(self._file) as dataset:
            for panel in self._panels:
                checksum = 0
                for row in range(0, self._height, _BLOCK):
                    rows = row, min(row + _BLOCK, self._height)
                    pixels = dataset.read(window=(rows, (panel.left, panel.left + panel.width)))
                    checksum = zlib.crc32(self._stored(pixels), checksum)
                if checksum != panel.checksum:
                    raise MachineError(
                        f"{self._output}: the pixels read back differ from those written. Check the disk."
                    )

    def _remove(self) -> None:
        for file in self._output.parent.glob(f"{glob.escape(temporary_path(self._output).name)}*"):
            file.unlink(missing_ok=True)


@dataclass
class _Written:
    """The part of a panel that is in the file."""

    left: int
    width: int
    rows: int = 0
    checksum: int = 0


def _create(file: Path, info: RasterInfo, product: Product, tags: Mapping[str, str]) -> Any:
    """An empty raster of the scene's grid, with nodata, colours and names."""
    georeferenced = info.crs is not None or not info.transform.is_identity
    dataset = rasterio.open(
        file,
        "w",
        driver="GTiff",
        height=info.height,
        width=info.width,
        count=product.count,
        dtype=product.dtype,
        nodata=product.nodata,
        crs=info.crs,
        transform=info.transform if georeferenced and not info.gcps else None,
        tiled=True,
        blockxsize=_BLOCK,
        blockysize=_BLOCK,
        interleave="band",
        num_threads=thread_count(),
        **_CREATION,
        **_bits(product),
    )
    if info.gcps:
        dataset.gcps = (list(info.gcps), info.gcps_crs)
    if info.rpcs is not None:
        dataset.rpcs = info.rpcs
    if info.area_or_point is not None:
        dataset.update_tags(AREA_OR_POINT=info.area_or_point)
    dataset.update_tags(TIFFTAG_SOFTWARE=f"rsseg {rsseg.__version__}", **tags)
    if product.value_names:
        dataset.update_tags(1, **{f"class_{value}": name for value, name in product.value_names.items()})
    if product.scale != 1:
        dataset.scales = (product.scale,) * product.count
    for band, name in enumerate(product.band_names, start=1):
        dataset.set_band_description(band, name)
    if product.colors is not None:
        colors = {value: (*color, 255) for value, color in product.colors.items()}
        dataset.write_colormap(1, colors | {int(product.nodata): (0, 0, 0, 0)})
    return dataset


def _bits(product: Product) -> dict[str, int]:
    return {"nbits": 16} if product.half else {}


def _add_category_names(side: Path, value_names: Mapping[int, str]) -> None:
    """Add the name of each pixel value, which GIS programs show in the legend, to GDAL's side file."""
    root = ET.parse(side).getroot() if side.exists() else ET.Element("PAMDataset")
    band = root.find("PAMRasterBand[@band='1']")
    if band is None:
        band = ET.SubElement(root, "PAMRasterBand", band="1")
    categories = ET.SubElement(band, "CategoryNames")
    for value in range(max(value_names) + 1):
        ET.SubElement(categories, "Category").text = value_names.get(value, "")
    ET.indent(root)
    ET.ElementTree(root).write(side, encoding="utf-8")


def _side_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.aux.xml")


def draw_preview(scene: Path | str, classes: Path, task: Task, output: Path) -> Path:
    """Write a PNG with the scene (bands stretched between percentiles 2 and 98), its classes and a legend.

    The picture is transparent where there is no data.

    Args:
        scene: the input raster; its red, green and blue bands are shown, else the first three or the only one.
        classes: the class raster that was predicted from it.
        task: names and colours.
        output: PNG to write; an existing one is replaced.

    Raises:
        DataError: a raster cannot be read.
        MachineError: the PNG cannot be written.
    """
    legend = [(info.color, info.name) for info in task.classes]
    sheet = draw_sheet(preview_pictures(scene, classes, task), legend)
    about = PngInfo()
    about.add_text(TAG, "preview")  # so that it is not mistaken for a scene
    with replaced(output, ending=".png") as temporary:
        output.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(temporary, pnginfo=about)
    return output


def preview_pictures(scene: Path | str, classes: Path, task: Task) -> tuple[Image.Image, Image.Image]:
    """The scene and its classes, RGBA of one size, at most 900 pixels a side; see `draw_preview`."""
    pixels, valid = _read_shown(scene)
    valid &= np.isfinite(pixels).all(axis=0)
    picture = np.dstack([stretched(pixels, valid), np.where(valid, np.uint8(255), np.uint8(0))])
    palette = np.zeros((256, 4), np.uint8)
    for info in task.classes:
        palette[info.value] = (*info.color, 255)
    painted = palette[_read_shown(classes, picture.shape[:2])[0][0].astype(np.uint8)]
    return Image.fromarray(picture), Image.fromarray(painted)


def _read_shown(path: Path | str, size: tuple[int, ...] | None = None) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Three bands or one at reduced size, float32 (bands, h, w), and where they have data; classes at `size`."""
    try:
        with rasterio.open(path) as file:
            factor = min(1.0, _PICTURE_SIDE / max(file.width, file.height))
            resampling = Resampling.average if size is None else Resampling.nearest
            size = size or (max(1, round(file.height * factor)), max(1, round(file.width * factor)))
            bands = _shown_bands(list(file.colorinterp))
            pixels = file.read(bands, out_shape=(len(bands), *size), resampling=resampling, out_dtype=np.float32)
            return pixels, file.dataset_mask(out_shape=size) > 0
    except RasterioError as error:
        raise DataError(f"{path}: cannot be drawn: {error}.") from None


def _shown_bands(colors: list[ColorInterp]) -> list[int]:
    wanted = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
    if all(color in colors for color in wanted):
        return [colors.index(color) + 1 for color in wanted]
    return [1, 2, 3] if len(colors) >= 3 else [1]
