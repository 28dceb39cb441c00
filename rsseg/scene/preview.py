"""A picture of a prediction: the scene, its classes and a legend, side by side."""

from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import RasterioError

from rsseg.data.picture import draw_sheet, stretched
from rsseg.errors import DataError
from rsseg.files import replaced
from rsseg.scene.source import TAG
from rsseg.task import Task

SIDE = 900
"""Longest side of each of the two pictures in pixels."""


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
    pixels, valid = _read(scene)
    valid &= np.isfinite(pixels).all(axis=0)
    picture = np.dstack([stretched(pixels, valid), np.where(valid, np.uint8(255), np.uint8(0))])
    palette = np.zeros((256, 4), np.uint8)
    for info in task.classes:
        palette[info.value] = (*info.color, 255)
    painted = palette[_read(classes, picture.shape[:2])[0][0].astype(np.uint8)]
    legend = [(info.color, info.name) for info in task.classes]
    sheet = draw_sheet([Image.fromarray(picture), Image.fromarray(painted)], legend)
    about = PngInfo()
    about.add_text(TAG, "preview")  # so that it is not mistaken for a scene
    with replaced(output, ending=".png") as temporary:
        output.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(temporary, pnginfo=about)
    return output


def _read(path: Path | str, size: tuple[int, ...] | None = None) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Three bands or one at reduced size, float32 (bands, h, w), and where they have data; classes at `size`."""
    try:
        with rasterio.open(path) as file:
            factor = min(1.0, SIDE / max(file.width, file.height))
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
