"""The one reader of images, masks and scenes, over rasterio. Free of torch.

GDAL's block cache is bounded here: its default, 5 % of the memory, would grow to hold a whole scene.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.rpc import RPC
from rasterio.transform import Affine

from rsseg import gdal
from rsseg.errors import DataError

# Images without coordinates are normal here. Once for the process: a filter around a call leaks between threads.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)

_CACHE_BYTES = (16 << 20, 512 << 20)
"""Minimum and maximum size of GDAL's cache."""
_LISTED = 16
_UNNAMED = (ColorInterp.undefined, ColorInterp.gray, ColorInterp.palette, ColorInterp.alpha)


class Window(NamedTuple):
    """A rectangle of pixels: top row, left column, height and width."""

    row: int
    col: int
    height: int
    width: int

    def within(self, row: int = 0, col: int = 0) -> tuple[slice, slice]:
        """Index of these pixels in an array whose first pixel is given."""
        top, left = self.row - row, self.col - col
        return slice(top, top + self.height), slice(left, left + self.width)


@dataclass(frozen=True)
class RasterInfo:
    """Metadata of a raster. Alpha and mask bands are not counted among its bands."""

    height: int
    width: int
    count: int
    """Bands to read."""
    available: int
    """All bands, alpha included."""
    dtype: str
    """NumPy name of the type that `Raster.read` returns: float32 if scale or offset tags apply."""
    stored_dtype: str
    numbers: tuple[int, ...]
    """1-based position of each band among all bands of the files."""
    band_names: tuple[str, ...]
    """Description of each band, else its colour interpretation, else "band_1" and so on."""
    colors: tuple[str, ...]
    """GDAL's colour interpretation of each band, such as "red" or "undefined"."""
    crs: CRS | None
    transform: Affine
    gcps: tuple[GroundControlPoint, ...]
    gcps_crs: CRS | None
    rpcs: RPC | None
    area_or_point: str | None
    nodata: float | None
    """As given to `Raster`, else as declared for the first band."""
    band_nodata: tuple[float | None, ...]
    """The same per band: a VRT can declare another value for each."""
    has_alpha: bool
    has_mask: bool
    scales: tuple[float, ...]
    offsets: tuple[float, ...]
    block_shape: tuple[int, int]
    """Rows and columns of a stored block."""
    colormap: dict[int, tuple[int, int, int, int]] | None
    """Red, green, blue, alpha of each value of a palette image, or of a single band of up to 4 bits."""


class _Part(NamedTuple):
    """One open file, its image bands to read (1-based), and its order of rows and columns."""

    dataset: Any
    bands: list[int]
    alpha: int | None
    mask: bool
    mirror: gdal.Mirror = (False, False)

    def read(self, read: Callable[..., NDArray[Any]], window: Window, **options: Any) -> NDArray[Any]:
        """`read(window=..., **options)` of the window of the whole image."""
        (rows, cols), (row, col, height, width) = self.mirror, window
        row = self.dataset.height - row - height if rows else row
        col = self.dataset.width - col - width if cols else col
        pixels = read(window=((row, row + height), (col, col + width)), **options)
        return np.ascontiguousarray(pixels[..., :: -1 if rows else 1, :: -1 if cols else 1])


class Raster:
    """An image in one file, or in several files on the same grid, stacked in band order.

    Use as a context manager, from one thread at a time.
    """

    info: RasterInfo

    def __init__(
        self,
        paths: Path | str | Sequence[Path],
        *,
        bands: Sequence[int] | None = None,
        nodata: float | None = None,
        zero_collar: bool = False,
        columns: int | None = None,
        shrink: tuple[float, float] | None = None,
    ) -> None:
        """Open for reading.

        Args:
            paths: file or URL, or the files of one image in band order.
            bands: 1-based bands in the order to return, counted through all files; None reads all but alpha. An alpha
                band listed here is data.
            nodata: value without data in every band, instead of what the files declare; NaN is added to it.
            zero_collar: treat pixels that are 0 in every band as nodata.
            columns: width of the widest window to read, of which GDAL caches two rows of blocks; None: the whole width.
            shrink: see `gdal.open_dataset`.

        Raises:
            DataError: a file is missing or unreadable, the files lie on different grids, or a band does not exist.
        """
        files = [paths] if isinstance(paths, str | Path) else list(paths)
        self.name = " | ".join(str(file) for file in files)
        self._zero_collar = zero_collar
        self._options: dict[str, Any] = {"GDAL_NUM_THREADS": 1, **gdal.STRICT}
        self._stack = ExitStack()
        try:
            datasets = [self._stack.enter_context(gdal.open_dataset(file, self._options, shrink)) for file in files]
            self._parts = self._choose(datasets, bands)
            self.info = self._describe(nodata)
        except BaseException:
            self._stack.close()
            raise
        self._nodata = self._nodata_values(given=nodata is not None and not math.isnan(nodata))
        self._nan_is_nodata = any(map(gdal.is_nan, (nodata, *self.info.band_nodata)))
        rows, cols = self.info.block_shape
        blocks = min(math.ceil((columns or self.info.width) / cols) + 1, math.ceil(self.info.width / cols))
        row_of_blocks = rows * blocks * cols * self.info.count
        needed = 2 * row_of_blocks * np.dtype(self.info.stored_dtype).itemsize
        self._options["GDAL_CACHEMAX"] = self.cache_bytes = min(max(needed, _CACHE_BYTES[0]), _CACHE_BYTES[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    @property
    def files(self) -> tuple[str, ...]:
        """All files that the image consists of, side files and the sources of a VRT included."""
        return tuple(sorted({file for part in self._parts for file in part.dataset.files}))

    @property
    def value_names(self) -> dict[int, str]:
        """Names of the values of a class raster; see `gdal.value_names`."""
        return gdal.value_names(self._parts[0].dataset)

    def read(self, window: Window | None = None) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Pixels and where they have data.

        Alpha or a mask band decides alone, as in GDAL's dataset mask. Without one, the nodata value decides: in any
        band, but for unsigned pixels and for the value 0, which can be a valid dark or saturated value, in all bands.
        A nodata value that was given to `Raster` always applies, and so does NaN where it is declared.

        Returns:
            `(count, h, w)` of `info.dtype`, 0 where there is no data, and bool `(h, w)`.

        Raises:
            DataError: a damaged file, or a pixel that is NaN or infinite although NaN is not declared as nodata.
        """
        window = window or Window(0, 0, self.info.height, self.info.width)
        pixels = self.read_raw(window)
        valid = self._valid(pixels, window)
        if pixels.dtype.kind == "f":
            self._check_finite(pixels, valid, window)
        if self.info.dtype != self.info.stored_dtype:
            scale = np.array(self.info.scales, np.float32)[:, None, None]
            pixels = pixels.astype(np.float32) * scale + np.array(self.info.offsets, np.float32)[:, None, None]
        if not valid.all():
            np.copyto(pixels, 0, where=~valid)
        return pixels, valid

    def read_raw(self, window: Window | None = None) -> NDArray[Any]:
        """Stored values `(count, h, w)` of `info.stored_dtype`: no nodata, no scale. For label masks."""
        window = window or Window(0, 0, self.info.height, self.info.width)
        row, col, height, width = window
        if not (0 <= row < row + height <= self.info.height and 0 <= col < col + width <= self.info.width):
            raise ValueError(f"{window} is not inside the {self.info.height} x {self.info.width} pixels of {self.name}")
        with self._reading():
            parts = [
                part.read(part.dataset.read, window, indexes=part.bands, out_dtype=self.info.stored_dtype)
                for part in self._parts
                if part.bands
            ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)[self._order]

    def read_opacity(self, window: Window) -> NDArray[np.bool_]:
        """Bool `(h, w)`, False where alpha or the mask band is 0."""
        opaque = np.ones((window.height, window.width), np.bool_)
        for part in self._parts:
            with self._reading():
                if part.alpha is not None:
                    opaque &= part.read(part.dataset.read, window, indexes=part.alpha) > 0
                if part.mask:
                    opaque &= part.read(part.dataset.read_masks, window, indexes=1) > 0
        return opaque

    def align_to(self, reference: RasterInfo, *, what: str, of: str) -> bool:
        """Read in the pixel order of an image on the same grid; returns whether that mirrors. See `gdal.alignment`."""
        mirrors = [gdal.alignment(part.dataset, reference, what=what, of=of) for part in self._parts]
        self._parts = [part._replace(mirror=mirror) for part, mirror in zip(self._parts, mirrors, strict=True)]
        return any(map(any, mirrors))

    def _valid(self, pixels: NDArray[Any], window: Window) -> NDArray[np.bool_]:
        valid = self.read_opacity(window)
        if self._zero_collar:
            valid &= (pixels != 0).any(axis=0)
        if all(value is None for value in self._nodata):
            return valid
        missing = [gdal.is_nodata(band, value) for band, value in zip(pixels, self._nodata, strict=True)]
        if pixels.dtype.kind == "u" or all(value in (0, None) for value in self._nodata):
            valid &= ~np.logical_and.reduce(missing)
        else:
            valid &= ~np.logical_or.reduce(missing)
        return valid

    def _check_finite(self, pixels: NDArray[Any], valid: NDArray[np.bool_], window: Window) -> None:
        """Clear `valid` at NaN and infinity if NaN is declared as nodata, else raise for the first of them."""
        finite = np.isfinite(pixels) if pixels.itemsize <= 4 else np.abs(pixels) <= np.finfo(np.float32).max
        if finite.all():
            return
        if self._nan_is_nodata:
            valid &= finite.all(axis=0)
            return
        if (wrong := ~finite & valid).any():
            band, row, col = (int(i) for i in np.argwhere(wrong)[0])
            raise DataError(
                f"{self.name}: the pixel at row {window.row + row}, column {window.col + col} of band "
                f"{self.info.band_names[band]} is {pixels[band, row, col]}, and NaN is not declared as nodata. "
                "If such pixels have no data, pass nan as the nodata value (`--nodata nan`, or `nodata: .nan` in a "
                "class file): it adds to what the file declares."
            )

    def _choose(self, datasets: Sequence[Any], bands: Sequence[int] | None) -> list[_Part]:
        """Assign the bands to their files; a file of which no band is read still affects validity."""
        located = [(number, band) for number, dataset in enumerate(datasets) for band in dataset.indexes]
        alphas = {place for place in located if gdal.is_alpha(datasets[place[0]], place[1])}
        if wrong := [band for band in bands or () if not 1 <= band <= len(located)]:
            raise DataError(f"{self.name}: there is no band {wrong[0]}; the image has {len(located)}.")
        chosen = range(1, len(located) + 1) if bands is None else bands
        wanted = [located[band - 1] for band in chosen if bands or located[band - 1] not in alphas]
        if not wanted:
            raise DataError(f"{self.name}: the image has no band besides alpha.")
        self._numbers = tuple(located.index(place) + 1 for place in wanted)
        self._order = np.argsort(np.argsort([number for number, _ in wanted], kind="stable"), kind="stable")
        parts = []
        for number, dataset in enumerate(datasets):
            flags = dataset.mask_flag_enums[0]
            what, of = f"{dataset.name}: the file", "the first file of its image"
            parts.append(
                _Part(
                    dataset,
                    [band for owner, band in wanted if owner == number],
                    next((band for owner, band in sorted(alphas - set(wanted)) if owner == number), None),
                    MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags,
                    gdal.alignment(dataset, datasets[0], what=what, of=of) if number else (False, False),
                )
            )
        return parts

    def _describe(self, nodata: float | None) -> RasterInfo:
        first = self._parts[0].dataset
        bands = self._bands()
        types = [dataset.dtypes[band - 1] for dataset, band in bands]
        # GDAL has complex integers, NumPy has not.
        if wrong := [name for name in types if name.startswith("complex") or np.dtype(name).kind not in "uif"]:
            raise DataError(
                f"{self.name}: pixels of type {wrong[0]} cannot be used. Convert them to real numbers, such as "
                "amplitudes."
            )
        stored = np.result_type(*types)
        scales = tuple(float(dataset.scales[band - 1]) for dataset, band in bands)
        offsets = tuple(float(dataset.offsets[band - 1]) for dataset, band in bands)
        scaled = any(scale != 1 for scale in scales) or any(offset != 0 for offset in offsets)
        colors = tuple(dataset.colorinterp[band - 1] for dataset, band in bands)
        descriptions = [dataset.descriptions[band - 1] for dataset, band in bands]
        dataset, band = bands[0]
        declared = tuple(dataset.nodatavals[band - 1] for dataset, band in bands)
        return RasterInfo(
            height=first.height,
            width=first.width,
            count=len(bands),
            available=sum(part.dataset.count for part in self._parts),
            dtype="float32" if scaled else stored.name,
            stored_dtype=stored.name,
            numbers=self._numbers,
            band_names=tuple(
                description or (f"band_{number}" if color in _UNNAMED else color.name)
                for number, description, color in zip(self._numbers, descriptions, colors, strict=True)
            ),
            colors=tuple(color.name for color in colors),
            crs=first.crs,
            transform=first.transform,
            gcps=tuple(first.gcps[0]),
            gcps_crs=first.gcps[1],
            rpcs=first.rpcs,
            area_or_point=first.tags().get("AREA_OR_POINT"),
            nodata=declared[0] if nodata is None or (math.isnan(nodata) and declared[0] is not None) else nodata,
            band_nodata=declared if nodata is None or math.isnan(nodata) else (nodata,) * len(bands),
            has_alpha=any(part.alpha is not None for part in self._parts),
            has_mask=any(part.mask for part in self._parts),
            scales=scales,
            offsets=offsets,
            block_shape=first.block_shapes[0],
            colormap=gdal.colormap(dataset, band) if len(bands) == 1 else None,
        )

    def _nodata_values(self, *, given: bool) -> list[float | None]:
        """The nodata value of each band to read, NaN excluded; beside alpha or a mask only if given."""
        masked = [] if given else [part.dataset for part in self._parts if part.mask or part.alpha is not None]
        values = zip(self._bands(), self.info.band_nodata, strict=True)
        return [None if dataset in masked or gdal.is_nan(value) else value for (dataset, _), value in values]

    def _bands(self) -> list[tuple[Any, int]]:
        """File and 1-based number of each band to read, in order."""
        return [[(part.dataset, band) for part in self._parts for band in part.bands][i] for i in self._order]

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with rasterio.Env(**self._options):
            try:
                yield
            except RasterioError as error:
                raise DataError(
                    f"{self.name}: the file is damaged: {gdal.reason(error)}. Restore or download it again."
                ) from None


def match_bands(info: RasterInfo, wanted: Sequence[str], chosen: Sequence[str] | None = None) -> tuple[int, ...]:
    """Match the bands of a raster to the bands of a task.

    Args:
        info: the raster.
        wanted: the task's band names.
        chosen: names or 1-based numbers given by the user, one per wanted band; None matches by name, else by colour
            interpretation, else in the file's order if the counts agree.

    Returns:
        1-based band numbers in the task's order.

    Raises:
        DataError: the bands cannot be matched; the message lists those of the file.
    """
    names = [name.casefold() for name in info.band_names]
    if chosen is not None and len(chosen) != len(wanted):
        raise DataError(f"--bands names {len(chosen)} bands, but {len(wanted)} are needed: {', '.join(wanted)}.")
    if chosen is not None:
        return tuple(_band_number(name, names, info) for name in chosen)
    for known in (names, list(info.colors)):
        if all(known.count(name.casefold()) == 1 for name in wanted):
            return tuple(info.numbers[known.index(name.casefold())] for name in wanted)
    if info.count == len(wanted):
        return info.numbers
    remedy = f"Name them with --bands, such as --bands {','.join(str(i + 1) for i in range(len(wanted)))}."
    if info.colors[0] == "palette":
        remedy = "It is a palette image: expand it to red, green and blue first (`gdal_translate -expand rgb`)."
    elif info.available < len(wanted):
        remedy = "Add the missing bands (a VRT can join files), or use a model of these bands."
    have = ", ".join([*info.band_names[:_LISTED], *(["..."] if info.count > _LISTED else [])])
    raise DataError(f"the image has {info.count} band(s) ({have}), needed are {', '.join(wanted)}. {remedy}")


def _band_number(name: str, names: Sequence[str], info: RasterInfo) -> int:
    if name.isdecimal() and 1 <= int(name) <= info.available:
        return int(name)
    if names.count(name.casefold()) != 1:
        have = f"it has {', '.join(info.band_names)} (or 1 to {info.available})"
        raise DataError(f"--bands: the image has no band {name!r}; {have}.")
    return info.numbers[names.index(name.casefold())]
