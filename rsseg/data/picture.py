"""Pictures for people: stretched bands, samples with their masks in class colours, sheets with a legend."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from rsseg.data.dataset import SampleReader
from rsseg.data.index import IndexItem, SegmentationIndex
from rsseg.errors import DataError, UsageError
from rsseg.files import output_errors, replaced
from rsseg.task import IGNORE_INDEX, Color

_RGB = ("red", "green", "blue")
_IGNORED = (200, 200, 200)
_SMALL_SIDE = 288
"""Longest side of a picture in pixels."""
_MARGIN = 12
_ROW = 30
"""Height of a line of the legend in pixels."""


def shown_bands(bands: Sequence[str]) -> tuple[str, ...]:
    """Red, green and blue; without them the first three bands, or the first one."""
    if set(_RGB) <= set(bands):
        return _RGB
    return tuple(bands[:3] if len(bands) > 2 else bands[:1])


def stretched(pixels: NDArray[np.generic], valid: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """One or three bands `(bands, h, w)` between percentiles 2 and 98: uint8 `(h, w, 3)`, 0 where not valid."""
    values = np.nan_to_num(pixels.astype(np.float32))
    if valid.any():
        low, high = np.percentile(values[:, valid], (2, 98), axis=1)[..., None, None]
        values = (values - low) / np.maximum(high - low, 1e-6)
    shown = np.where(valid, values.clip(0, 1) * 255, 0).astype(np.uint8)
    return np.broadcast_to(shown, (3, *valid.shape)).transpose(1, 2, 0)


def reduced_size(width: int, height: int) -> tuple[int, int]:
    """Width and height of the small picture of an image."""
    factor = min(1.0, _SMALL_SIDE / max(width, height))
    return max(1, round(width * factor)), max(1, round(height * factor))


def small_picture(pixels: NDArray[np.generic], valid: NDArray[np.bool_], bands: Sequence[str]) -> Image.Image:
    """The bands to show, reduced and stretched; white where there is no data."""
    size = reduced_size(pixels.shape[2], pixels.shape[1])
    mask = np.asarray(Image.fromarray(valid).resize(size, Image.Resampling.NEAREST))
    layers = [Image.fromarray(pixels[bands.index(band)].astype(np.float32)) for band in shown_bands(bands)]
    small = np.stack([np.asarray(layer.resize(size, Image.Resampling.BOX)) for layer in layers])
    return Image.fromarray(np.where(mask[..., None], stretched(small, mask), np.uint8(255)))


def draw_sheet(pictures: Sequence[Image.Image], legend: Sequence[tuple[Color, str]]) -> Image.Image:
    """Pictures of one size side by side, and a legend on white; transparent elsewhere."""
    font = ImageFont.load_default(size=18)
    width, height = pictures[0].size
    left = len(pictures) * (width + _MARGIN) + _MARGIN
    right = left + 34 + max(int(font.getlength(text)) for _, text in legend) + _MARGIN
    bottom = max(height, _ROW * len(legend)) + 2 * _MARGIN
    sheet = Image.new("RGBA", (right, bottom), (0, 0, 0, 0))
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number * (width + _MARGIN) + _MARGIN, _MARGIN))
    draw = ImageDraw.Draw(sheet)
    # Opaque white behind the letters: they would be unreadable on a dark page otherwise.
    draw.rectangle((left - _MARGIN // 2, 0, right, bottom), fill="white")
    for row, (color, text) in enumerate(legend):
        top = _MARGIN + _ROW * row
        draw.rectangle((left, top, left + 24, top + 20), fill=color, outline="black")
        draw.text((left + 34, top), text, fill="black", font=font)
    return sheet


def find_sample(index: SegmentationIndex, which: str | None) -> IndexItem:
    """Image by name, part of a name or number, by default the first labeled one; raises `DataError`."""
    if which is None:
        return next((item for item in index.items if item.mask is not None), index.items[0])
    if which.isdecimal() and len(which) < 10 and int(which) < len(index.items):
        return index.items[int(which)]
    found = [item for item in index.items if which == item.image] or [i for i in index.items if which in i.image]
    if not found:
        raise DataError(f"{index.root}: no image is named {which!r}; names are such as {index.items[0].image}.")
    return found[0]


def sample_colors(index: SegmentationIndex, item: IndexItem, side: int) -> tuple[NDArray[np.uint8], ...]:
    """Image and mask (if any) in red, green, blue: uint8 `(h, w, 3)`, sides of at most `side` pixels.

    The image is stretched between percentiles 2 and 98 per band; without red, green and blue its first bands are shown.
    """
    reader = SampleReader(index, shown_bands(index.task.bands), cache=False)
    pixels, valid = reader.image(item)
    image = np.where(valid[..., None], stretched(pixels, valid), np.uint8(255))
    step = max(-(-max(valid.shape) // side), 1)
    pictures = [np.ascontiguousarray(image[::step, ::step])]
    if item.mask is not None:
        palette = np.full((IGNORE_INDEX + 1, 3), _IGNORED, np.uint8)
        for number, info in enumerate(index.task.classes):
            palette[number] = info.color
        pictures.append(palette[reader.mask(item)[::step, ::step]])
    return tuple(pictures)


def draw_sample(index: SegmentationIndex, item: IndexItem, side: int = 700) -> Image.Image:
    """Picture of image, mask and legend side by side."""
    pictures = [Image.fromarray(colors) for colors in sample_colors(index, item, side)]
    factor = max(side // max(pictures[0].size), 1)
    pictures = [p.resize((p.width * factor, p.height * factor), Image.Resampling.NEAREST) for p in pictures]
    return draw_sheet(pictures, legend(index, item))


def save_sample(index: SegmentationIndex, item: IndexItem, out: Path, *, overwrite: bool) -> None:
    """Write `draw_sample` as PNG.

    Raises:
        UsageError: `out` is not a .png name, lies in the dataset, or exists and `overwrite` is False.
        MachineError: the file cannot be written.
    """
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out}: the picture is a PNG file. Give it a name that ends with .png.")
    with output_errors(out):
        if index.root.resolve() in out.resolve().parents:
            raise UsageError(f"--out {out} lies in the dataset. Pass another --out.")
        if out.is_dir() or ((out.exists() or out.is_symlink()) and not overwrite):
            raise UsageError(f"{out} exists already. Pass --overwrite to replace a file, or another --out.")
        out.parent.mkdir(parents=True, exist_ok=True)
        with replaced(out) as partial:
            draw_sample(index, item).save(partial, "PNG")


def legend(index: SegmentationIndex, item: IndexItem) -> Sequence[tuple[tuple[int, int, int], str]]:
    """Colour and text of each class, with its share of the labeled pixels if counted."""
    total = sum(item.classes or ())
    shares = [f"  {count / total:.1%}" if total else "" for count in item.classes or (0,) * index.task.num_classes]
    classes = [(info.color, f"{info.name}{share}") for info, share in zip(index.task.classes, shares, strict=True)]
    return [*classes, (_IGNORED, "ignored")]
