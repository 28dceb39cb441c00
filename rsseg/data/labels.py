"""Convert stored mask values or colours to class indices."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import cv2
import numpy as np
from numpy.typing import NDArray

from rsseg import gdal
from rsseg.data.index import LabelMap
from rsseg.errors import DataError
from rsseg.raster import Raster, Window
from rsseg.task import IGNORE_INDEX

Palette = Mapping[int, tuple[int, int, int, int]]
Edit = Callable[[NDArray[Any]], NDArray[Any]]


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

    def read(self, raster: Raster, window: Window | None = None, *, edit: Edit | None = None) -> NDArray[np.uint8]:
        """Class index, or 255 to ignore, of each pixel of a mask; uint8 `(h, w)`.

        A pixel has no label where alpha or a mask band of the mask is 0, and where it holds the mask's nodata value,
        unless the label map declares that value.

        Args:
            raster: open mask.
            window: None reads all.
            edit: applied to the stored values `(bands, h, w)` first.

        Raises:
            DataError: see `indices`.
        """
        info = raster.info
        window = window or Window(0, 0, info.height, info.width)
        stored = raster.read_raw(window)
        hidden = ~raster.read_opacity(window) if info.has_alpha or info.has_mask else None
        return self.indices(
            stored if edit is None else edit(stored),
            info.colormap,
            name=raster.name,
            origin=(window.row, window.col),
            nodata=info.nodata if info.count == 1 else None,
            hidden=hidden,
        )

    def indices(
        self,
        stored: NDArray[Any],
        palette: Palette | None,
        *,
        name: str,
        origin: tuple[int, int] = (0, 0),
        nodata: float | None = None,
        hidden: NDArray[np.bool_] | None = None,
    ) -> NDArray[np.uint8]:
        """Class index, or 255 to ignore, of each pixel.

        Args:
            stored: `(bands, h, w)` as in the file: one band for values (or equal ones), red, green, blue for colours.
            palette: colours of a palette image.
            name: file, for the message.
            origin: row and column of the first pixel, for the message.
            nodata: value to ignore unless it is declared.
            hidden: bool `(h, w)`, True where the pixel has no label regardless of its value.

        Returns:
            uint8 `(h, w)`.

        Raises:
            DataError: undeclared values (named with count and first position), a wrong number of bands, or a palette
                whose positions and colours mean different classes.
        """
        keys = self._pixel_keys(stored, palette, name)
        if keys.dtype == np.uint8:
            indices: NDArray[np.uint8] = cv2.LUT(keys, self._table) if keys.size else self._table[keys]
            if self._declared[histogram(keys) > 0].all():
                return indices if hidden is None else np.where(hidden, np.uint8(IGNORE_INDEX), indices)
            unknown = ~self._declared[keys]
        else:
            position = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
            unknown, indices = self._keys[position] != keys, self._indices[position]
        ignored = unknown & gdal.is_nodata(stored[0], nodata)
        if hidden is not None:
            ignored |= hidden
        unknown &= ~ignored
        if self._unknown is not None:
            indices = np.where(unknown, np.uint8(self._unknown), indices)
        elif unknown.any():
            self._refuse(keys, unknown, name, origin)
        return np.where(ignored, np.uint8(IGNORE_INDEX), indices)

    def _pixel_keys(self, stored: NDArray[Any], palette: Palette | None, name: str) -> NDArray[Any]:
        """Key of each pixel: its value, or its colour as one integer."""
        keys: NDArray[Any] = stored[0]
        if not self._colors:
            if len(stored) == 1 and palette is not None:
                return self._viewed(keys, palette, name)
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

    def _viewed(self, keys: NDArray[Any], palette: Palette, name: str) -> NDArray[Any]:
        """Values of a palette mask: its positions, or the grey levels that a viewer shows for them.

        Writers of GIF and indexed PNG keep only the grey levels that occur, in files of grey levels: position 3 can
        show 4. A palette of colours, or of grey levels that are not class values, is only for display.
        """
        last = max((position for position, color in palette.items() if any(color[:3])), default=0)
        grays = {position: color[0] for position, color in palette.items() if position <= last}
        if 0 not in grays.values() and last + 1 in palette:
            grays[last + 1] = 0  # black comes last; what follows fills the table up
        known = set(self._keys.tolist())
        moved = {gray for position, gray in grays.items() if gray != position}
        if grays in ({0: 0, 1: 255}, {0: 255, 1: 0}) and {0, 1} <= known:
            return keys  # one bit
        if not moved & known or any(len(set(color[:3])) > 1 for color in palette.values()):
            return keys
        if set(grays.values()) <= known and not set(grays) <= known:
            shown = [grays.get(position, position) for position in range(256)]
            return np.asarray(np.array(shown, np.uint8)[keys])
        wrong = next(position for position, gray in grays.items() if gray != position and gray in known)
        raise DataError(
            f"{name}: positions in the palette and the grey levels that it shows are both class values, but differ "
            f"(position {wrong} shows {grays[wrong]}). Save the mask "
            "without a palette, or list the grey levels as colours (`labels: colors`) in the class file."
        )

    def _refuse(self, keys: NDArray[Any], unknown: NDArray[np.bool_], name: str, origin: tuple[int, int]) -> NoReturn:
        values, counts = np.unique(keys[unknown], return_counts=True)
        row, col = (int(i) for i in np.unravel_index(int(unknown.argmax()), unknown.shape))
        shown = ", ".join(f"{self._text(v)} ({n} pixels)" for v, n in zip(values[:5], counts[:5], strict=True))
        declared = ", ".join(self._text(key) for key in self._keys[:20])
        if values.dtype.kind == "f" and (values != np.rint(values)).any():
            advice = (
                "Class values are whole numbers: round or threshold the mask, and resample it by nearest neighbour. "
                "NaN is ignored where the file declares it as nodata."
            )
        else:
            keyed = [f"#{int(v):06x}" if self._colors else f"{v:g}" for v in values[:5]]
            line = f"ignore_colors: {json.dumps(keyed)}" if self._colors else f"ignore: [{', '.join(keyed)}]"
            option = " ".join(f"--ignore '{key}'" if self._colors else f"--ignore {key}" for key in keyed)
            advice = (
                f"Add a class to the class file, or ignore them: `{line}` in the class file, or {option}; then prepare "
                "the dataset again."
            )
        raise DataError(
            f"{name}: {len(values)} undeclared mask value(s): {shown}, first at row {origin[0] + row}, column "
            f"{origin[1] + col}; declared are {declared}. {advice}"
        )

    def _text(self, key: Any) -> str:
        if not self._colors:
            return f"{key:g}"
        return f"({int(key) >> 16}, {int(key) >> 8 & 255}, {int(key) & 255})"


def _color_key(color: tuple[int, int, int]) -> int:
    return (color[0] << 16) | (color[1] << 8) | color[2]


def histogram(values: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Pixels per value of a uint8 array, int64 `(256,)`."""
    if values.size == 0 or values.size >= 1 << 24:
        # OpenCV counts in float32, exact below 2**24.
        return np.bincount(values.ravel(), minlength=256)
    counts = cv2.calcHist([np.ascontiguousarray(values)], [0], None, [256], [0, 256])
    return np.asarray(counts, np.float32).ravel().astype(np.int64)
