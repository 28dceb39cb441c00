"""Convert stored mask values or colours to class indices."""

from collections.abc import Mapping
from typing import Any, NoReturn

import cv2
import numpy as np
from numpy.typing import NDArray

from rsseg.data.index import LabelMap
from rsseg.errors import DataError
from rsseg.task import IGNORE_INDEX

Palette = Mapping[int, tuple[int, int, int, int]]


class LabelTable:
    """Lookup table from mask values or colours to class indices; an undeclared value is an error."""

    def __init__(self, label_map: LabelMap, num_classes: int, *, unknown: int | None = None) -> None:
        """Build the table; raises `DataError` if the map is empty, has both tables, or refers to a missing class.

        Args:
            label_map: values or colours -> class indices.
            num_classes: K; indices are below it, or 255.
            unknown: class index of undeclared values; None makes them an error.
        """
        if bool(label_map.values) == bool(label_map.colors):
            raise DataError("the label map needs either values or colors. Prepare the dataset again.")
        by_key = dict(label_map.values) or {_color_key(color): index for color, index in label_map.colors}
        wrong = [index for index in by_key.values() if index >= num_classes and index != IGNORE_INDEX]
        if wrong:
            raise DataError(f"the label map refers to class {wrong[0]}, but the task has {num_classes} classes.")
        self._colors = bool(label_map.colors)
        self._unknown = unknown
        self._keys = np.array(sorted(by_key), np.int64)
        self._indices = np.array([by_key[key] for key in sorted(by_key)], np.uint8)
        fits = (self._keys >= 0) & (self._keys <= 255)
        self._table = np.full(256, IGNORE_INDEX if unknown is None else unknown, np.uint8)
        self._table[self._keys[fits]] = self._indices[fits]
        self._declared = np.full(256, unknown is not None)
        self._declared[self._keys[fits]] = True

    def indices(
        self, stored: NDArray[Any], palette: Palette | None, *, name: str, origin: tuple[int, int] = (0, 0)
    ) -> NDArray[np.uint8]:
        """Class index, or 255 to ignore, of each pixel.

        Args:
            stored: `(bands, h, w)` as the file holds them: one band for values (or equal ones), red, green, blue for
                colours.
            palette: colours of a palette image, used if the map lists colours.
            name: file, for the message.
            origin: row and column of the first pixel, for the message.

        Returns:
            uint8 `(h, w)`.

        Raises:
            DataError: undeclared values (named with count and first position), or a wrong number of bands.
        """
        keys = self._pixel_keys(stored, palette, name)
        if keys.dtype == np.uint8:
            if not self._declared[_histogram(keys) > 0].all():
                self._refuse(keys, ~self._declared[keys], name, origin)
            indices: NDArray[np.uint8] = cv2.LUT(keys, self._table) if keys.size else self._table[keys]
            return indices
        position = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        unknown = self._keys[position] != keys
        found = self._indices[position]
        if not unknown.any():
            return found
        if self._unknown is None:
            self._refuse(keys, unknown, name, origin)
        return np.where(unknown, np.uint8(self._unknown or 0), found)

    def counts(
        self, stored: NDArray[Any], palette: Palette | None, *, name: str, origin: tuple[int, int] = (0, 0)
    ) -> NDArray[np.int64]:
        """Pixels per class index, int64 `(256,)`; arguments and errors as for `indices`."""
        if len(stored) == 1 and not self._colors and stored.dtype == np.uint8:
            # One pass over the pixels instead of three.
            found = _histogram(stored[0])
            if self._declared[found > 0].all():
                return np.bincount(self._table, weights=found, minlength=256).astype(np.int64)
        indices = self.indices(stored, palette, name=name, origin=origin)
        return _histogram(indices)

    def _pixel_keys(self, stored: NDArray[Any], palette: Palette | None, name: str) -> NDArray[Any]:
        """Key of each pixel: its value, or its colour as one integer."""
        keys: NDArray[Any] = stored[0]
        if not self._colors:
            if (stored[1:] != keys).any():
                raise DataError(
                    f"{name}: the mask has {len(stored)} different bands, expected one of class values. If it shows "
                    "classes as colours, list these in the class file (`labels: colors`); a palette image that was "
                    "saved as red, green and blue has lost its values."
                )
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

    def _refuse(self, keys: NDArray[Any], unknown: NDArray[np.bool_], name: str, origin: tuple[int, int]) -> NoReturn:
        values, counts = np.unique(keys[unknown], return_counts=True)
        row, col = (int(i) for i in np.unravel_index(int(unknown.argmax()), unknown.shape))
        shown = ", ".join(f"{self._text(v)} ({n} pixels)" for v, n in zip(values[:5], counts[:5], strict=True))
        declared = ", ".join(self._text(key) for key in self._keys[:20])
        colors = ", ".join(f'"#{int(v):06x}"' for v in values[:5])
        line = f"ignore_colors: [{colors}]" if self._colors else f"ignore: [{', '.join(map(self._text, values[:5]))}]"
        option = " ".join(f"--ignore '#{int(v):06x}'" if self._colors else f"--ignore {v:g}" for v in values[:5])
        raise DataError(
            f"{name}: {len(values)} undeclared mask value(s): {shown}, first at row {origin[0] + row}, column "
            f"{origin[1] + col}; declared are {declared}. Add a class to the class file, or ignore them: `{line}` in "
            f"the class file, or {option}; then prepare the dataset again."
        )

    def _text(self, key: Any) -> str:
        if not self._colors:
            return f"{key:g}"
        return f"({int(key) >> 16}, {int(key) >> 8 & 255}, {int(key) & 255})"


def _color_key(color: tuple[int, int, int]) -> int:
    return (color[0] << 16) | (color[1] << 8) | color[2]


def _histogram(values: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Pixels per value, int64 `(256,)`."""
    if values.size == 0 or values.size >= 1 << 24:
        # OpenCV counts in float32, exact below 2**24.
        return np.bincount(values.ravel(), minlength=256)
    counts = cv2.calcHist([np.ascontiguousarray(values)], [0], None, [256], [0, 256])
    return np.asarray(counts, np.float32).ravel().astype(np.int64)
