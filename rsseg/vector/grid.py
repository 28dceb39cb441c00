"""Convert between pixels of a raster and coordinates on the ground."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError  # what a failed transformation raises; it has no public name
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.transform import GCPTransformer, RPCTransformer
from rasterio.warp import transform as warp_points

from rsseg.errors import DataError
from rsseg.raster import RasterInfo

Points = NDArray[np.float64]
"""(n, 2): column and row counted from the outer corner of the first pixel, or x (longitude) and y (latitude)."""
LONGITUDE_LATITUDE = CRS.from_epsg(4326)
_CELLS = 128
"""Maximum number of cells along a raster; pixels of a cell are assumed to have the same area."""
_COUNTED = 1 << 20
"""Pixels counted per call."""


@dataclass(frozen=True)
class Grid:
    """Location of the pixels of a raster: by its transform, else its ground control points, else its RPCs."""

    info: RasterInfo

    @property
    def is_located(self) -> bool:
        """False for an image without georeference."""
        return bool(not self.info.transform.is_identity or self.info.gcps or self.info.rpcs)

    @property
    def crs(self) -> CRS | None:
        """Coordinate system of the ground coordinates; None if unknown."""
        if self._has_transform:
            return self.info.crs
        if self.info.gcps:
            return self.info.gcps_crs
        return LONGITUDE_LATITUDE if self.info.rpcs else self.info.crs

    @property
    def middle(self) -> Points:
        """Ground coordinates (2,) of the centre of the raster."""
        return np.asarray(self.to_ground(np.array([[self.info.width / 2, self.info.height / 2]]))[0])

    def lattice(self, count: int) -> Points:
        """count x count points in pixels, from corner to corner."""
        cols, rows = (np.linspace(0, length, count) for length in (self.info.width, self.info.height))
        return np.stack(np.meshgrid(cols, rows), axis=-1).reshape(-1, 2)

    def pixel_areas(self) -> "PixelAreas | None":
        """Areas on the ellipsoid; None without a known ellipsoid, and for RPCs, which need heights."""
        if self.crs is None or not (self._has_transform or self.info.gcps):
            return None
        rows, cols = (
            np.linspace(0, length, min(length, _CELLS) + 1).astype(np.int64)
            for length in (self.info.height, self.info.width)
        )
        # The area at the middle of each cell, from the diagonals of a small quadrangle.
        half_rows, half_cols = np.diff(rows) / 16, np.diff(cols) / 16
        x, y = (edges[:-1] + np.diff(edges) / 2 for edges in (cols, rows))
        corners = [
            np.stack(np.meshgrid(x + dx * half_cols, y + dy * half_rows), axis=-1)
            for dx, dy in ((-1, -1), (1, -1), (1, 1), (-1, 1))
        ]
        ground = self.to_ground(np.concatenate(corners).reshape(-1, 2))
        if (places := _geocentric(ground, self.crs)) is None:
            return None
        a, b, c, d = places.reshape(4, len(y), len(x), 3)
        quadrangles = np.linalg.norm(np.cross(c - a, d - b), axis=-1) / 2
        density = quadrangles / (4 * half_rows[:, None] * half_cols)
        if not np.isfinite(density).any():
            return None
        return PixelAreas(rows, cols, np.nan_to_num(density, posinf=0, neginf=0))

    def pixel_sizes(self, points: Points) -> NDArray[np.float64] | None:
        """Metres on the ground per column and per row at positions in pixels, float64 (n, 2); see `pixel_areas`."""
        if self.crs is None or not (self._has_transform or self.info.gcps):
            return None
        steps = np.array([(-0.5, 0), (0.5, 0), (0, -0.5), (0, 0.5)])
        around = self.to_ground((points + steps[:, None]).reshape(-1, 2))
        if (places := _geocentric(around, self.crs)) is None:
            return None
        left, right, above, below = places.reshape(4, len(points), 3)
        return np.asarray(np.linalg.norm(np.stack([right - left, below - above], axis=1), axis=2))

    def ground_sides(self) -> tuple[float, float] | None:
        """Width and height in metres of a pixel in the middle; None without known coordinates."""
        sizes = self.pixel_sizes(np.array([[self.info.width / 2, self.info.height / 2]]))
        if sizes is None or not (np.isfinite(sizes).all() and sizes.min() > 0):
            return None
        return float(sizes[0, 0]), float(sizes[0, 1])

    @property
    def _has_transform(self) -> bool:
        return not self.info.transform.is_identity and not self.info.gcps

    def to_ground(self, points: Points) -> Points:
        """Convert pixels to ground coordinates."""
        cols, rows = points[:, 0], points[:, 1]
        if self._has_transform or not self.is_located:
            return np.stack(self.info.transform * (cols, rows), axis=1)
        with self._transformer() as transformer:
            return np.stack(transformer.xy(rows, cols, self._heights(len(points)), offset="ul"), axis=1)

    def to_pixels(self, points: Points) -> Points:
        """Convert ground coordinates to pixels, not rounded."""
        x, y = points[:, 0], points[:, 1]
        if self._has_transform or not self.is_located:
            return np.stack(~self.info.transform * (x, y), axis=1)
        with self._transformer() as transformer:
            rows, cols = transformer.rowcol(x, y, self._heights(len(points)), op=np.asarray)
        return np.stack([cols, rows], axis=1).astype(np.float64)

    def _transformer(self) -> GCPTransformer | RPCTransformer:
        return GCPTransformer(list(self.info.gcps)) if self.info.gcps else RPCTransformer(self.info.rpcs)

    def _heights(self, count: int) -> list[float] | None:
        return None if self.info.rpcs is None or self.info.gcps else [float(self.info.rpcs.height_off)] * count


@dataclass(frozen=True)
class PixelAreas:
    """Area on the ground of each pixel of a raster, constant within the cells of a lattice.

    rows, cols: int64 (m + 1,) and (n + 1,), first rows and columns of the cells and the end of the raster
    square_meters: float64 (m, n), of a pixel in each cell; 0 off the globe
    """

    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    square_meters: NDArray[np.float64]

    def at(self, rows: NDArray[np.int64], cols: NDArray[np.int64]) -> NDArray[np.float64]:
        """Square metres of single pixels, float64 (n,)."""
        cells = (np.searchsorted(edges, where, "right") - 1 for edges, where in ((self.rows, rows), (self.cols, cols)))
        return np.asarray(self.square_meters[tuple(cells)])

    def of_ring(self, ring: NDArray[np.int64]) -> float:
        """Signed area of a closed ring (n, 2) along the sides of pixels, positive for outer rings."""
        vertical = ring[:-1, 0] == ring[1:, 0]
        x, y = ring[:-1, 0][vertical], np.stack([ring[1:, 1], ring[:-1, 1]])[:, vertical]
        below, above = self._above_left(x, y)
        return float((below - above).sum())

    def totals(self, values: NDArray[np.uint8], top: int, left: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """int64 and float64 (256,): pixels and area of each value of some rows and columns (h, w) whose first pixel is
        given.
        """
        height, width = values.shape
        cell_of_col = self._cell_of_col[left : left + width] * 256
        pixels, area = np.zeros(256, np.int64), np.zeros(256)
        row = 0
        while row < height:
            cell = int(self._cell_of_row[top + row])
            stop = min(int(self.rows[cell + 1]) - top, height, row + max(_COUNTED // width, 1))
            counts = np.bincount((values[row:stop] + cell_of_col).ravel(), minlength=256 * self.square_meters.shape[1])
            by_cell = counts.reshape(-1, 256)
            pixels += by_cell.sum(0)
            area += self.square_meters[cell] @ by_cell
            row = stop
        return pixels, area

    def _above_left(self, x: NDArray[np.int64], y: NDArray[np.int64]) -> NDArray[np.float64]:
        """Area of all pixels above row y and left of column x."""
        row, col = self._cell_of_row[y], self._cell_of_col[x]
        down, right = y - self.rows[row], x - self.cols[col]
        whole, in_rows, in_cols = self._cumulative
        return np.asarray(
            whole[row, col]
            + down * in_cols[row, col]
            + right * in_rows[row, col]
            + down * right * self.square_meters[row, col]
        )

    @cached_property
    def _cell_of_row(self) -> NDArray[np.int64]:
        return _cells(self.rows)

    @cached_property
    def _cell_of_col(self) -> NDArray[np.int64]:
        return _cells(self.cols)

    @cached_property
    def _cumulative(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Sums over the cells above and to the left, above, and to the left; the last two per column and row."""
        per_col = self.square_meters * np.diff(self.rows)[:, None]
        per_row = self.square_meters * np.diff(self.cols)
        whole = per_col * np.diff(self.cols)
        above, before = ((1, 0), (0, 0)), ((0, 0), (1, 0))
        return (
            np.pad(whole.cumsum(0).cumsum(1), (above[0], before[1]))[:-1, :-1],
            np.pad(per_col.cumsum(0), above)[:-1],
            np.pad(per_row.cumsum(1), before)[:, :-1],
        )


def _cells(edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Cell of each position from 0 to the end, which belongs to the last one."""
    return np.minimum(np.searchsorted(edges, np.arange(edges[-1] + 1), "right") - 1, len(edges) - 2)


def _geocentric(points: Points, crs: CRS) -> NDArray[np.float64] | None:
    """float64 (n, 3) metres from the centre of the ellipsoid of `crs`, not finite off it; None if it has none."""
    try:
        ellipsoid = _find(crs.to_dict(projjson=True), "ellipsoid")
        if ellipsoid is None:
            return None
        if "radius" in ellipsoid:
            major = minor = _meters(ellipsoid["radius"])
        else:
            major = _meters(ellipsoid["semi_major_axis"])
            flattening = ellipsoid.get("inverse_flattening")
            minor = _meters(ellipsoid["semi_minor_axis"]) if flattening is None else major * (1 - 1 / flattening)
        plain = CRS.from_string(f"+proj=longlat +a={major!r} +b={minor!r} +no_defs")
        degrees = transformed(points, crs, plain, "")
    except (RasterioError, CPLE_BaseError, DataError, KeyError, TypeError):
        return None
    degrees[~(np.abs(degrees[:, 1]) <= 90)] = np.inf
    lon, lat = np.radians(degrees).T
    with np.errstate(invalid="ignore"):
        normal = major**2 / np.hypot(major * np.cos(lat), minor * np.sin(lat))
        flat = normal * np.cos(lat)
        return np.stack([flat * np.cos(lon), flat * np.sin(lon), (minor / major) ** 2 * normal * np.sin(lat)], axis=1)


def _find(item: Any, key: str) -> Any:
    """The first value of a key anywhere in nested dictionaries and lists."""
    if isinstance(item, dict):
        return item[key] if key in item else next((f for v in item.values() if (f := _find(v, key))), None)
    return next((f for v in item if (f := _find(v, key))), None) if isinstance(item, list) else None


def _meters(length: Any) -> float:
    """A PROJJSON length: a number, or one with its unit."""
    if isinstance(length, dict):
        unit = length["unit"]
        return float(length["value"]) * (float(unit["conversion_factor"]) if isinstance(unit, dict) else 1.0)
    return float(length)


def transformed(points: Points, source: CRS, target: CRS, what: str) -> Points:
    """Transform coordinates to another system; infinite where they are outside its domain.

    Raises:
        DataError: no point can be transformed, as between two planets; `what` names the file.
    """
    if source == target or not len(points):
        return points.copy()
    moved = _transformed(points, source, target)
    if not np.isfinite(moved).any():
        ours, theirs = (crs.to_string() for crs in (source, target))
        raise DataError(
            f"{what}: coordinates in {ours if len(ours) < 60 else 'a system of its own'} cannot be transformed to "
            f"{theirs if len(theirs) < 60 else 'one of its own'}. Bring both into one coordinate system."
        )
    return moved


def _transformed(points: Points, source: CRS, target: CRS) -> Points:
    try:
        return np.stack(warp_points(source, target, points[:, 0], points[:, 1]), axis=1)
    except (RasterioError, CPLE_BaseError):
        # One point outside a projection's domain makes the call fail: halve until few points are lost with it.
        if len(points) <= 4:
            return np.full(points.shape, np.inf)
        halves = np.array_split(points, 2)
        return np.concatenate([_transformed(half, source, target) for half in halves])


def reproject(points: Points, source: CRS, target: CRS, what: str) -> Points:
    """Transform coordinates to another system; see `transformed`.

    Raises:
        DataError: also if a single point cannot be transformed.
    """
    moved = transformed(points, source, target, what)
    if not np.isfinite(moved).all():
        raise DataError(f"{what}: some of its coordinates lie outside the domain of {target.to_string()}.")
    return moved
