"""Properties of a file as reported by GDAL: errors, alpha bands, palettes, nodata values, location."""

import math
import os
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import RasterioError
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform as warp_points

from rsseg.errors import DataError

STRICT = {"GDAL_ERROR_ON_LIBJPEG_WARNING": True, "GDAL_PNG_WHOLE_IMAGE_OPTIM": False}
"""Without these, GDAL returns truncated JPEG and PNG files without an error."""
_MOST_SHIFT = 0.51
"""Tolerance in pixels for rounded coordinates of the same grid."""

_EXACT = 1e-4
"""Error of a resampled position in pixels; GDAL fails with 0."""

Mirror = tuple[bool, bool]
"""Whether rows and whether columns are in reverse order."""


class _Located(Protocol):
    """Size and location of a raster: a `RasterInfo`, or a dataset of rasterio."""

    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def crs(self) -> CRS | None: ...
    @property
    def transform(self) -> Affine: ...


class _Resampled(WarpedVRT):  # type: ignore[misc]
    """A warped raster with the names, scales and offsets of its bands, which GDAL drops."""

    @property
    def descriptions(self) -> tuple[str | None, ...]:
        return (*self.src_dataset.descriptions, *[None] * (self.count - self.src_dataset.count))

    @property
    def scales(self) -> tuple[float, ...]:
        return (*self.src_dataset.scales, *[1.0] * (self.count - self.src_dataset.count))

    @property
    def offsets(self) -> tuple[float, ...]:
        return (*self.src_dataset.offsets, *[0.0] * (self.count - self.src_dataset.count))


def open_dataset(file: Path | str, options: dict[str, Any], shrink: tuple[float, float] | None = None) -> Any:
    """Open a file with rasterio under GDAL options; raises `DataError`.

    `shrink` makes the pixels larger by these factors along columns and rows: the mean of the pixels that a larger one
    covers, or bilinear between them for smaller ones.
    """
    try:
        with rasterio.Env(**options):
            dataset = rasterio.open(os.fspath(file))
            if shrink is None:
                return dataset
            width, height = max(1, round(dataset.width / shrink[0])), max(1, round(dataset.height / shrink[1]))
            flags = dataset.mask_flag_enums[0]
            return _Resampled(
                dataset,
                crs=dataset.crs,
                transform=dataset.transform * Affine.scale(dataset.width / width, dataset.height / height),
                width=width,
                height=height,
                resampling=Resampling.average if max(shrink) > 1 else Resampling.bilinear,
                tolerance=_EXACT,
                add_alpha=MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags,
            )
    except RasterioError as error:
        if "://" not in str(file) and not str(file).startswith("/vsi") and not Path(file).exists():
            raise DataError(f"{file}: there is no such file.") from None
        raise DataError(f"{file}: not an image that can be read: {reason(error)}.") from None


def reason(error: BaseException) -> str:
    """GDAL's message, which rasterio keeps as the cause."""
    return str(error.__cause__ or error).strip().rstrip(".")


def is_alpha(dataset: Any, band: int) -> bool:
    """GDAL marks the fourth band of an 8-bit file as alpha by default; a description such as "nir" shows otherwise."""
    description = dataset.descriptions[band - 1]
    return dataset.colorinterp[band - 1] == ColorInterp.alpha and (not description or "alpha" in description.lower())


def colormap(dataset: Any, band: int) -> dict[int, tuple[int, int, int, int]] | None:
    """Red, green, blue, alpha of the values of a palette band, or of one of 1 to 4 bits; None if there is no table."""
    try:
        return dict(dataset.colormap(band))
    except ValueError:
        levels = 2 ** int(dataset.tags(band, ns="IMAGE_STRUCTURE").get("NBITS", 8))
    if levels > 16 or dataset.colorinterp[band - 1] == ColorInterp.palette:
        return None
    # GDAL reads 0 and 1 where a viewer shows 0 and 255.
    grays = [value * 255 // (levels - 1) for value in range(levels)]
    return {value: (gray, gray, gray, 255) for value, gray in enumerate(grays)}


def value_names(dataset: Any) -> dict[int, str]:
    """Value -> class name of the first band: tags `class_VALUE`, as `rsseg predict` writes, else category names."""
    tags = {key.removeprefix("class_"): name for key, name in dataset.tags(1).items() if key.startswith("class_")}
    main, *_ = dataset.files or [""]
    named = {int(value): name for value, name in sorted(tags.items()) if value.isdecimal()}
    return named or category_names(main) or category_names(f"{main}.aux.xml")


def category_names(file: str) -> dict[int, str]:
    """GDAL's category names in a VRT or a side file, which rasterio does not give; empty without them."""
    if not file.lower().endswith((".vrt", ".xml")) or not os.path.isfile(file):  # noqa: PTH113 - Path.is_file raises
        return {}
    try:
        found = ET.parse(file).getroot().findall("./*[@band='1']/CategoryNames/Category")
    except (OSError, ET.ParseError):
        return {}
    return {value: name.text for value, name in enumerate(found) if name.text}


def is_nan(value: float | None) -> bool:
    """Whether a nodata value is NaN."""
    return value is not None and math.isnan(value)


def is_nodata(band: NDArray[Any], value: float | None) -> NDArray[np.bool_]:
    """Where a band holds the nodata value, compared as GDAL does; nowhere if its type cannot hold it.

    Integers are compared with the truncated value. Floats may differ by four units in the last place of a float32, and
    those near the largest float are equal if their sum overflows: nodata values are often written with fewer digits
    than the pixels have.
    """
    if value is None:
        return np.zeros(band.shape, np.bool_)
    if band.dtype.kind in "ui":
        limits = np.iinfo(band.dtype)
        if not limits.min <= value <= limits.max:
            return np.zeros(band.shape, np.bool_)
        return np.asarray(band == band.dtype.type(int(value)))
    if math.isnan(value):
        return np.asarray(np.isnan(band))
    largest, tolerance = float(np.finfo(band.dtype).max), 4 * float(np.finfo(np.float32).eps)
    if abs(value) > largest:
        return np.asarray(band == math.copysign(math.inf, value))
    size = abs(value)
    near, far = size * (1 - tolerance), size * (1 + tolerance)
    if 2 * near > largest:
        near, far = min(near, max(largest - size, largest * 2.0**-24)), math.inf
    low, high = (near, far) if value >= 0 else (-far, -near)
    return np.asarray((band >= band.dtype.type(low)) & (band <= band.dtype.type(high)))


def alignment(own: _Located, reference: _Located, *, what: str, of: str) -> Mirror:
    """How a raster must be mirrored to match another pixel by pixel.

    A raster without a location is assumed to match. A raster stored south-up is flipped relative to one stored
    north-up.

    Args:
        own: the raster.
        reference: the other one.
        what: its name, for the message.
        of: name of the other one.

    Raises:
        DataError: sizes differ, or corners lie half a pixel or more apart on the ground.
    """
    size, expected = (own.height, own.width), (reference.height, reference.width)
    if size != expected:
        raise DataError(
            f"{what} has {size[0]} x {size[1]} pixels (rows x columns), {of} {expected[0]} x {expected[1]}. "
            "They must agree."
        )
    if not _is_located(own) or not _is_located(reference):
        return False, False
    corners = [(0, 0), (own.width, 0), (own.width, own.height), (0, own.height)]
    x, y = zip(*(own.transform * corner for corner in corners), strict=True)
    if own.crs and reference.crs and own.crs != reference.crs:
        try:
            x, y = warp_points(own.crs, reference.crs, x, y)
        except RasterioError:
            x, y = (math.nan,) * 4, (math.nan,) * 4
    if reference.crs and reference.crs.is_geographic:
        # Longitudes can differ by multiples of 360 degrees.
        middle, _ = reference.transform * (reference.width / 2, reference.height / 2)
        turns = np.rint((middle - (x[0] + x[2]) / 2) / 360)
        x = tuple(value + 360 * turns for value in x)
    seen = np.array([~reference.transform * point for point in zip(x, y, strict=True)])
    for rows, cols in ((False, False), (True, False), (False, True), (True, True)):
        mirrored = [(own.width - col if cols else col, own.height - row if rows else row) for col, row in corners]
        if np.abs(seen - mirrored).max() <= _MOST_SHIFT:
            return rows, cols
    raise DataError(
        f"{what} lies elsewhere than {of}: {_place(own)}, not {_place(reference)}. "
        "Warp it onto the grid of the other one (`rio warp --like`), or remove its coordinates if they are wrong."
    )


def _is_located(raster: _Located) -> bool:
    """Whether the raster has ground coordinates rather than only pixels."""
    t = raster.transform
    plain = raster.crs is None and (abs(t.a), abs(t.e), t.b, t.d) == (1, 1, 0, 0)
    return bool(t.determinant) and not t.is_identity and not plain


def _place(raster: _Located) -> str:
    crs = "no coordinate system" if raster.crs is None else raster.crs.to_string()
    t = raster.transform
    return f"upper left ({t.c:.9g}, {t.f:.9g}), pixel ({t.a:.6g}, {t.e:.6g}), {crs if len(crs) < 60 else 'own CRS'}"
