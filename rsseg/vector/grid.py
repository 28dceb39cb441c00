"""Between the pixels of a raster and coordinates on the ground."""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Grid:
    """Where the pixels of a raster lie: by its transform, else its ground control points, else its RPCs."""

    info: RasterInfo

    @property
    def is_located(self) -> bool:
        """False for a plain picture."""
        return bool(not self.info.transform.is_identity or self.info.gcps or self.info.rpcs)

    @property
    def crs(self) -> CRS | None:
        """Of the coordinates; None if unknown."""
        if self._has_transform:
            return self.info.crs
        if self.info.gcps:
            return self.info.gcps_crs
        return CRS.from_epsg(4326) if self.info.rpcs else self.info.crs

    @property
    def pixel_area(self) -> float | None:
        """Square metres; None unless the coordinate system is a projected one. Holds for turned and oblong pixels."""
        if not self._has_transform or self.info.crs is None or not self.info.crs.is_projected:
            return None
        metres: float = self.info.crs.linear_units_factor[1]
        return float(abs(self.info.transform.determinant)) * metres**2

    @property
    def _has_transform(self) -> bool:
        return not self.info.transform.is_identity and not self.info.gcps

    def to_ground(self, points: Points) -> Points:
        """Pixels to coordinates."""
        cols, rows = points[:, 0], points[:, 1]
        if self._has_transform or not self.is_located:
            t = self.info.transform
            return np.stack([t.a * cols + t.b * rows + t.c, t.d * cols + t.e * rows + t.f], axis=1)
        with self._transformer() as transformer:
            return np.stack(transformer.xy(rows, cols, self._heights(len(points)), offset="ul"), axis=1)

    def to_pixels(self, points: Points) -> Points:
        """Coordinates to pixels, not rounded."""
        x, y = points[:, 0], points[:, 1]
        if self._has_transform or not self.is_located:
            t = ~self.info.transform
            return np.stack([t.a * x + t.b * y + t.c, t.d * x + t.e * y + t.f], axis=1)
        with self._transformer() as transformer:
            rows, cols = transformer.rowcol(x, y, self._heights(len(points)), op=np.asarray)
        return np.stack([cols, rows], axis=1).astype(np.float64)

    def _transformer(self) -> GCPTransformer | RPCTransformer:
        return GCPTransformer(list(self.info.gcps)) if self.info.gcps else RPCTransformer(self.info.rpcs)

    def _heights(self, count: int) -> list[float] | None:
        return None if self.info.rpcs is None or self.info.gcps else [float(self.info.rpcs.height_off)] * count


def reproject(points: Points, source: CRS, target: CRS, what: str) -> Points:
    """Coordinates in another system.

    Raises:
        DataError: there is no way from one to the other, as between two planets; `what` names the thing.
    """
    if source == target or not len(points):
        return points
    try:
        x, y = warp_points(source, target, points[:, 0], points[:, 1])
    except (RasterioError, CPLE_BaseError):
        raise DataError(
            f"{what}: coordinates in {source.to_string()} cannot be brought to {target.to_string()}."
        ) from None
    moved = np.stack([x, y], axis=1)
    if not np.isfinite(moved).all():
        raise DataError(f"{what}: some of its coordinates do not exist in {target.to_string()}.")
    return moved
