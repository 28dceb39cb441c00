"""A picture of a prediction: the scene, its classes and a legend, side by side."""

from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import RasterioError

from rsseg.errors import DataError
from rsseg.files import replaced
from rsseg.scene.source import TAG
from rsseg.task import Task

SIDE = 900
"""Longest side of each of the two pictures in pixels."""
MARGIN = 12
_CLEAR = (0, 0, 0, 0)


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
    picture = Image.fromarray(_scene_colors(_read(scene)))
    values = _read(classes, nearest=True)[0][0]
    palette = np.zeros((256, 4), np.uint8)
    for info in task.classes:
        palette[info.value] = (*info.color, 255)
    painted = Image.fromarray(palette[values.astype(np.uint8)])
    font = ImageFont.load_default(size=18)
    legend_width = 60 + max(int(font.getlength(name)) for name in task.class_names)
    height = max(picture.height, 30 * task.num_classes)
    sheet = Image.new("RGBA", (2 * picture.width + legend_width + 4 * MARGIN, height + 2 * MARGIN), _CLEAR)
    sheet.paste(picture, (MARGIN, MARGIN))
    sheet.paste(painted, (picture.width + 2 * MARGIN, MARGIN))
    draw = ImageDraw.Draw(sheet)
    left = 2 * picture.width + 3 * MARGIN
    # Opaque white behind the letters: they would be unreadable on a dark page otherwise.
    draw.rectangle((left - MARGIN // 2, 0, sheet.width, sheet.height), fill="white")
    for row, info in enumerate(task.classes):
        top = MARGIN + 30 * row
        draw.rectangle((left, top, left + 24, top + 20), fill=info.color, outline="black")
        draw.text((left + 34, top), info.name, fill="black", font=font)
    about = PngInfo()
    about.add_text(TAG, "preview")  # so that it is not mistaken for a scene
    with replaced(output, ending=".png") as temporary:
        output.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(temporary, pnginfo=about)
    return output


def _read(path: Path | str, *, nearest: bool = False) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Three bands or one at reduced size, float32 (bands, h, w), and where they have data."""
    try:
        with rasterio.open(path) as file:
            factor = min(1.0, SIDE / max(file.width, file.height))
            size = max(1, round(file.height * factor)), max(1, round(file.width * factor))
            bands = _shown_bands(list(file.colorinterp))
            resampling = Resampling.nearest if nearest else Resampling.average
            pixels = file.read(bands, out_shape=(len(bands), *size), resampling=resampling, out_dtype=np.float32)
            return pixels, file.dataset_mask(out_shape=size) > 0
    except RasterioError as error:
        raise DataError(f"{path}: cannot be drawn: {error}.") from None


def _shown_bands(colors: list[ColorInterp]) -> list[int]:
    wanted = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
    if all(color in colors for color in wanted):
        return [colors.index(color) + 1 for color in wanted]
    return [1, 2, 3] if len(colors) >= 3 else [1]


def _scene_colors(read: tuple[NDArray[np.float32], NDArray[np.bool_]]) -> NDArray[np.uint8]:
    pixels, valid = read
    valid = valid & np.isfinite(pixels).all(axis=0)
    stretched = np.zeros((*valid.shape, 4), np.uint8)
    stretched[..., 3] = np.where(valid, 255, 0)
    for channel in range(3):
        band = pixels[min(channel, len(pixels) - 1)]
        low, high = np.percentile(band[valid], (2, 98)) if valid.any() else (0.0, 1.0)
        scaled = np.clip((np.nan_to_num(band) - low) / max(high - low, 1e-6), 0, 1)
        stretched[..., channel] = np.where(valid, 255 * scaled, 0)
    return stretched
