"""Pictures as coloured half blocks in a terminal: two pixels per character."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rich.color import Color
from rich.style import Style
from rich.text import Text

from rsseg.commands.console import stdout

_GAP = 2


def print_picture(pictures: Sequence[NDArray[np.uint8]], legend: Sequence[tuple[tuple[int, int, int], str]]) -> None:
    """Print pictures `(h, w, 3)` side by side, as wide as the terminal allows, and a legend below."""
    console = stdout()
    columns = max((min(console.width, 120) - _GAP * (len(pictures) - 1)) // len(pictures), 4)
    step = max(-(-pictures[0].shape[1] // columns), 1)
    small = [picture[::step, ::step] for picture in pictures]
    for row in range(0, small[0].shape[0], 2):
        line = Text()
        for number, picture in enumerate(small):
            line.append(" " * _GAP if number else "")
            below = picture[min(row + 1, len(picture) - 1)]
            for upper, lower in zip(picture[row], below, strict=True):
                line.append("\u2580", Style(color=_color(upper), bgcolor=_color(lower)))
        console.print(line, no_wrap=True, crop=True)
    for color, text in legend:
        console.print(Text("\u2588\u2588 ", Style(color=Color.from_rgb(*color))) + Text(text))


def _color(pixel: NDArray[np.uint8]) -> Color:
    return Color.from_rgb(*(int(value) for value in pixel))
