"""The one reader of images, masks and scenes, over rasterio. Free of torch.

GDAL's block cache is bounded here: its default of 5 % of the memory would slowly hold a whole scene.
"""

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
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

from rsseg.errors import DataError

# Images without coordinates are normal here. Once for the process: a filter around a call leaks between threads.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)

_CACHE_BYTES = (16 << 20, 512 << 20)
"""Least and most that GDAL may cache."""
_STRICT = {"GDAL_ERROR_ON_LIBJPEG_WARNING": True, "GDAL_PNG_WHOLE_IMAGE_OPTIM": False}
"""Without these, GDAL returns truncated JPEG and PNG files as if they were whole."""
_UNNAMED = (ColorInterp.undefined, ColorInterp.gray, ColorInterp.palette, ColorInterp.alpha)


class Window(NamedTuple):
    """A rectangle of pixels: top row, left column, height and width."""

    row: int
    col: int
    height: int
    width: int


@dataclass(frozen=True)
class RasterInfo:
    """What a raster says about itself. Alpha and mask bands are not counted among its bands."""

    height: int
    width: int
    count: int
    """Bands that are read."""
    available: int
    """Bands that the files have, alpha included."""
    dtype: str
    """NumPy name of the pixels that `Raster.read` returns: float32 if scale or offset tags are applied."""
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
    has_alpha: bool
    has_mask: bool
    scales: tuple[float, ...]
    offsets: tuple[float, ...]
    block_shape: tuple[int, int]
    """Rows and columns of a stored block."""
    colormap: dict[int, tuple[int, int, int, int]] | None
    """Red, green, blue, alpha of each value of a palette image."""


class _Part(NamedTuple):
    """One open file and its image bands that are read, 1-based."""

    dataset: Any
    bands: list[int]
    alpha: int | None
    mask: bool


class Raster:
    """An image in one file, or in several files of the same size whose bands follow one another.

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
        threads: int = 1,
        columns: int | None = None,
    ) -> None:
        """Open for reading.

        Args:
            paths: file or URL, or the files of one image in band order.
            bands: 1-based bands in the order wanted, counted through all files; None takes all but alpha. An alpha band
                that is named here is data.
            nodata: value without data in every band, instead of what the files declare; NaN declares NaN.
            zero_collar: pixels that are 0 in every band have no data.
            threads: threads that GDAL may decompress with.
            columns: widest window that will be read; for it, GDAL keeps two rows of blocks. None: the whole width.

        Raises:
            DataError: a file is missing or unreadable, sizes differ, or a band does not exist.
        """
        files = [paths] if isinstance(paths, str | Path) else list(paths)
        self.name = " | ".join(str(file) for file in files)
        self._zero_collar = zero_collar
        self._options: dict[str, Any] = {"GDAL_NUM_THREADS": threads, **_STRICT}
        self._stack = ExitStack()
        try:
            datasets = [self._stack.enter_context(_open(file, self._options)) for file in files]
            self._parts = self._choose(datasets, bands)
            self.info = self._describe(nodata)
        except BaseException:
            self._stack.close()
            raise
        self._nodata = self._nodata_values(nodata)
        rows, cols = self.info.block_shape
        blocks = min(math.ceil((columns or self.info.width) / cols) + 1, math.ceil(self.info.width / cols))
        row_of_blocks = rows * blocks * cols * self.info.count
        needed = 2 * row_of_blocks * np.dtype(self.info.stored_dtype).itemsize
        self._options["GDAL_CACHEMAX"] = min(max(needed, _CACHE_BYTES[0]), _CACHE_BYTES[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    @property
    def files(self) -> tuple[str, ...]:
        """All files that the image consists of, side files and the sources of a VRT included."""
        return tuple(sorted({file for part in self._parts for file in part.dataset.files}))

    def read(self, window: Window | None = None) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Pixels and where they have data.

        Returns:
            `(count, h, w)` of `info.dtype`, 0 where there is no data, and bool `(h, w)`. There is no data where alpha
            or the mask band is 0, and where the nodata value is: in any band, or for unsigned pixels and the value 0,
            which can be a legal dark or saturated value of one band, in all of them.

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
        inside = 0 <= row < row + height <= self.info.height and 0 <= col < col + width <= self.info.width
        if not inside:
            raise ValueError(f"{window} is not inside the {self.info.height} x {self.info.width} pixels of {self.name}")
        with self._reading():
            parts = [
                part.dataset.read(part.bands, window=_slices(window), out_dtype=self.info.stored_dtype)
                for part in self._parts
                if part.bands
            ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)[self._order]

    def _valid(self, pixels: NDArray[Any], window: Window) -> NDArray[np.bool_]:
        valid = np.ones(pixels.shape[1:], np.bool_)
        for part in self._parts:
            with self._reading():
                if part.alpha is not None:
                    valid &= part.dataset.read(part.alpha, window=_slices(window)) > 0
                if part.mask:
                    valid &= part.dataset.read_masks(1, window=_slices(window)) > 0
        if self._zero_collar:
            valid &= (pixels != 0).any(axis=0)
        if all(value is None for value in self._nodata):
            return valid
        missing = [_equals(band, value) for band, value in zip(pixels, self._nodata, strict=True)]
        if pixels.dtype.kind == "u" or all(value in (0, None) for value in self._nodata):
            valid &= ~np.logical_and.reduce(missing)
        else:
            valid &= ~np.logical_or.reduce(missing)
        return valid

    def _check_finite(self, pixels: NDArray[Any], valid: NDArray[np.bool_], window: Window) -> None:
        """Take undefined pixels out of `valid` where NaN is declared, else complain about the first one."""
        finite = np.isfinite(pixels)
        if finite.all():
            return
        if any(value is not None and math.isnan(value) for value in self._nodata):
            valid &= finite.all(axis=0)
            return
        if (wrong := ~finite & valid).any():
            band, row, col = (int(i) for i in np.argwhere(wrong)[0])
            raise DataError(
                f"{self.name}: the pixel at row {window.row + row}, column {window.col + col} of band "
                f"{self.info.band_names[band]} is {pixels[band, row, col]}, and NaN is not declared as nodata. "
                "Declare it in the file or pass nan as the nodata value."
            )

    def _choose(self, datasets: Sequence[Any], bands: Sequence[int] | None) -> list[_Part]:
        """Distribute the wanted bands over the files; a file without wanted bands still counts for validity."""
        if len(sizes := {dataset.shape for dataset in datasets}) > 1:
            raise DataError(f"{self.name}: the files of one image differ in size: {sorted(sizes)} (rows, columns).")
        located = [(number, band) for number, dataset in enumerate(datasets) for band in dataset.indexes]
        alphas = {place for place in located if _is_alpha(datasets[place[0]], place[1])}
        if wrong := [band for band in bands or () if not 1 <= band <= len(located)]:
            raise DataError(f"{self.name}: there is no band {wrong[0]}; the image has {len(located)}.")
        chosen = range(1, len(located) + 1) if bands is None else bands
        wanted = [located[band - 1] for band in chosen if bands or located[band - 1] not in alphas]
        if not wanted:
            raise DataError(f"{self.name}: the image has no band beside its alpha.")
        self._numbers = tuple(located.index(place) + 1 for place in wanted)
        self._order = np.argsort(np.argsort([number for number, _ in wanted], kind="stable"), kind="stable")
        parts = []
        for number, dataset in enumerate(datasets):
            flags = dataset.mask_flag_enums[0]
            parts.append(
                _Part(
                    dataset,
                    [band for owner, band in wanted if owner == number],
                    next((band for owner, band in sorted(alphas - set(wanted)) if owner == number), None),
                    MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags,
                )
            )
        return parts

    def _describe(self, nodata: float | None) -> RasterInfo:
        first = self._parts[0].dataset
        bands = self._bands()
        stored = np.result_type(*(dataset.dtypes[band - 1] for dataset, band in bands))
        if stored.kind not in "uif":
            raise DataError(f"{self.name}: pixels of type {stored} cannot be used; convert them to real numbers.")
        scales = tuple(float(dataset.scales[band - 1]) for dataset, band in bands)
        offsets = tuple(float(dataset.offsets[band - 1]) for dataset, band in bands)
        scaled = any(scale != 1 for scale in scales) or any(offset != 0 for offset in offsets)
        colors = tuple(dataset.colorinterp[band - 1] for dataset, band in bands)
        descriptions = [dataset.descriptions[band - 1] for dataset, band in bands]
        dataset, band = bands[0]
        has_palette = colors[0] == ColorInterp.palette
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
            nodata=dataset.nodatavals[band - 1] if nodata is None else nodata,
            has_alpha=any(part.alpha is not None for part in self._parts),
            has_mask=any(part.mask for part in self._parts),
            scales=scales,
            offsets=offsets,
            block_shape=first.block_shapes[0],
            colormap=dataset.colormap(band) if has_palette else None,
        )

    def _nodata_values(self, nodata: float | None) -> list[float | None]:
        """Per band that is read."""
        if nodata is not None:
            return [nodata] * self.info.count
        return [dataset.nodatavals[band - 1] for dataset, band in self._bands()]

    def _bands(self) -> list[tuple[Any, int]]:
        """File and 1-based number of each band that is read, in the order wanted."""
        by_file = [(part.dataset, band) for part in self._parts for band in part.bands]
        return [by_file[i] for i in self._order]

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with rasterio.Env(**self._options):
            try:
                yield
            except RasterioError as error:
                raise DataError(f"{self.name}: the file is damaged: {_reason(error)}. Get it again.") from None


def match_bands(info: RasterInfo, wanted: Sequence[str], chosen: Sequence[str] | None = None) -> tuple[int, ...]:
    """Which bands of a raster are the bands of a task.

    Args:
        info: the raster.
        wanted: the task's band names.
        chosen: names or 1-based numbers given by the user, one per wanted band; None finds them by name, else by colour
            interpretation, else takes the file's order if the counts agree.

    Returns:
        1-based band numbers in the task's order.

    Raises:
        DataError: the bands cannot be told; the message lists what the file has.
    """
    names = [name.casefold() for name in info.band_names]
    if chosen is not None:
        if len(chosen) != len(wanted):
            raise DataError(f"--bands names {len(chosen)} bands, but {len(wanted)} are needed: {', '.join(wanted)}.")
        return tuple(_band_number(name, names, info) for name in chosen)
    for known in (names, list(info.colors)):
        if all(known.count(name.casefold()) == 1 for name in wanted):
            return tuple(info.numbers[known.index(name.casefold())] for name in wanted)
    if info.count == len(wanted):
        return info.numbers
    raise DataError(
        f"the image has {info.count} band(s) ({', '.join(info.band_names)}), needed are {', '.join(wanted)}. "
        f"Say which is which with --bands, such as --bands {','.join(str(i + 1) for i in range(len(wanted)))}."
    )


def _band_number(name: str, names: Sequence[str], info: RasterInfo) -> int:
    if name.isdecimal() and 1 <= int(name) <= info.available:
        return int(name)
    if names.count(name.casefold()) != 1:
        have = f"it has {', '.join(info.band_names)} (or 1 to {info.available})"
        raise DataError(f"--bands: the image has no band {name!r}; {have}.")
    return info.numbers[names.index(name.casefold())]


def _open(file: Path | str, options: dict[str, Any]) -> Any:
    try:
        with rasterio.Env(**options):
            return rasterio.open(os.fspath(file))
    except RasterioError as error:
        if "://" not in str(file) and not str(file).startswith("/vsi") and not Path(file).exists():
            raise DataError(f"{file}: there is no such file.") from None
        raise DataError(f"{file}: not an image that can be read: {_reason(error)}.") from None


def _is_alpha(dataset: Any, band: int) -> bool:
    """GDAL calls the fourth band of an 8-bit file alpha unless told otherwise; a name such as "nir" says what it is."""
    description = dataset.descriptions[band - 1]
    return dataset.colorinterp[band - 1] == ColorInterp.alpha and (not description or "alpha" in description.lower())


def _reason(error: BaseException) -> str:
    """GDAL's own words; rasterio hides them in the cause."""
    return str(error.__cause__ or error).strip().rstrip(".")


def _slices(window: Window) -> tuple[tuple[int, int], tuple[int, int]]:
    return (window.row, window.row + window.height), (window.col, window.col + window.width)


def _equals(band: NDArray[Any], value: float | None) -> NDArray[np.bool_]:
    """Where a band holds the nodata value; nowhere if its type cannot hold it."""
    same = np.zeros(band.shape, np.bool_)
    if value is None:
        return same
    if math.isnan(value):
        return np.asarray(np.isnan(band))
    if band.dtype.kind in "ui":
        limits = np.iinfo(band.dtype)
        if not float(value).is_integer() or not limits.min <= value <= limits.max:
            return same
    np.equal(band, band.dtype.type(value), out=same)
    return same
