"""Pictures for people: bands stretched to 8 bits, and sheets of pictures with a legend."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from rsseg.task import Color

_RGB = ("red", "green", "blue")
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
