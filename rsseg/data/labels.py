"""Stored mask values or colours -> class indices."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsseg.data.index import LabelMap
from rsseg.errors import DataError
from rsseg.task import IGNORE_INDEX

Palette = Mapping[int, tuple[int, int, int, int]]


class LabelTable:
    """Translates masks; a value that is not declared is an error."""

    def __init__(self, label_map: LabelMap, num_classes: int) -> None:
        """Check the map; raises `DataError` if it is empty, has both tables, or names a class that does not exist."""
        if bool(label_map.values) == bool(label_map.colors):
            raise DataError("the label map needs either values or colors. Prepare the dataset again.")
        by_key = dict(label_map.values) or {_color_key(color): index for color, index in label_map.colors}
        wrong = [index for index in by_key.values() if index >= num_classes and index != IGNORE_INDEX]
        if wrong:
            raise DataError(f"the label map leads to class {wrong[0]}, but the task has {num_classes} classes.")
        self._colors = bool(label_map.colors)
        self._keys = np.array(sorted(by_key), np.int64)
        self._indices = np.array([by_key[key] for key in sorted(by_key)], np.uint8)

    def indices(self, stored: NDArray[Any], palette: Palette | None, *, name: str) -> NDArray[np.uint8]:
        """Class index, or 255 to ignore, of each pixel.

        Args:
            stored: `(bands, h, w)` as the file holds them: one band for values (or equal ones), red, green, blue for
                colours.
            palette: colours of a palette image, used if the map lists colours.
            name: file, for the message.

        Returns:
            uint8 `(h, w)`.

        Raises:
            DataError: undeclared values (named with their pixel counts), or a wrong number of bands.
        """
        keys = self._pixel_keys(stored, palette, name)
        if keys.dtype == np.uint8:
            return self._by_table(keys, name)
        position = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        unknown = self._keys[position] != keys
        if unknown.any():
            self._complain(keys[unknown], name)
        return self._indices[position]

    def _by_table(self, keys: NDArray[Any], name: str) -> NDArray[np.uint8]:
        table, declared = np.zeros(256, np.uint8), np.zeros(256, np.bool_)
        fits = (self._keys >= 0) & (self._keys <= 255)
        table[self._keys[fits]], declared[self._keys[fits]] = self._indices[fits], True
        unknown = ~declared[keys]
        if unknown.any():
            self._complain(keys[unknown], name)
        indices: NDArray[np.uint8] = table[keys]
        return indices

    def _pixel_keys(self, stored: NDArray[Any], palette: Palette | None, name: str) -> NDArray[Any]:
        """What is looked up: the value, or the colour as one number."""
        keys: NDArray[Any] = stored[0]
        if not self._colors:
            if (stored[1:] != keys).any():
                raise DataError(f"{name}: the mask has {len(stored)} different bands, expected one of class values.")
        elif len(stored) == 1 and palette is not None:
            colors = np.zeros(max(256, *palette) + 1, np.int64)
            colors[list(palette)] = [_color_key(color[:3]) for color in palette.values()]
            keys = colors[keys]
        elif len(stored) == 3:
            red, green, blue = stored.astype(np.int64)
            keys = (red << 16) | (green << 8) | blue
        else:
            raise DataError(f"{name}: the mask has {len(stored)} bands, expected red, green and blue.")
        return keys

    def _complain(self, keys: NDArray[Any], name: str) -> None:
        values, counts = np.unique(keys, return_counts=True)
        shown = ", ".join(f"{self._text(v)} ({n} pixels)" for v, n in zip(values[:5], counts[:5], strict=True))
        declared = ", ".join(self._text(key) for key in self._keys[:20])
        raise DataError(
            f"{name}: {len(values)} undeclared mask value(s): {shown}; declared are {declared}. "
            "Add them to the class file, as a class or under `ignore`, and prepare the dataset again."
        )

    def _text(self, key: Any) -> str:
        if not self._colors:
            return f"{key:g}"
        return f"({int(key) >> 16}, {int(key) >> 8 & 255}, {int(key) & 255})"


def _color_key(color: tuple[int, int, int]) -> int:
    return (color[0] << 16) | (color[1] << 8) | color[2]
