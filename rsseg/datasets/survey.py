"""Count the polygons of a mask and their area on the ground, strip by strip."""

import cv2
import numpy as np
from numpy.typing import NDArray

from rsseg.data.labels import histogram
from rsseg.raster import RasterInfo, Window
from rsseg.task import IGNORE_INDEX
from rsseg.vector.grid import Grid


class Survey:
    """4-connected components and areas per class of one mask, whose strips are added from top to bottom."""

    def __init__(self, info: RasterInfo | None, classes: int, gsd_m: float | None) -> None:
        """Take pixel areas from the coordinates of the image, else from the ground sampling distance if known."""
        self.polygons = np.zeros(classes, np.int64)
        self._square_meters = np.zeros(256)
        self._areas = None if info is None else Grid(info).pixel_areas()
        self._pixel = None if gsd_m is None else gsd_m**2
        self._next = 1
        self._above: tuple[NDArray[np.uint8], NDArray[np.int64]] | None = None
        self._joined: dict[int, int] = {}

    @property
    def hectares(self) -> NDArray[np.float64] | None:
        """Area per class; None if the size of the pixels is unknown."""
        if self._areas is None and self._pixel is None:
            return None
        return self._square_meters[: len(self.polygons)] / 10_000

    def add(self, indices: NDArray[np.uint8], window: Window) -> None:
        """Add the next strip, uint8 (h, w) class indices of the window, 255 where ignored."""
        present = histogram(indices)
        if self._areas is not None:
            self._square_meters += self._areas.sums(indices, window.row, window.col)
        elif self._pixel is not None:
            self._square_meters += present * self._pixel
        first, last = np.zeros((2, indices.shape[1]), np.int64)
        for index in np.flatnonzero(present[: len(self.polygons)]):
            count, parts = cv2.connectedComponents((indices == index).view(np.uint8), connectivity=4)
            for row, ids in ((parts[0], first), (parts[-1], last)):
                ids[row > 0] = row[row > 0] + (self._next - 1)
            self._next += count - 1
            self.polygons[index] += count - 1
        if self._above is not None:
            self._join(indices[0], first)
        self._above = indices[-1].copy(), last

    def _join(self, classes: NDArray[np.uint8], first: NDArray[np.int64]) -> None:
        """Join components that continue from the strip above."""
        assert self._above is not None
        above, ids = self._above
        same = (above == classes) & (classes != IGNORE_INDEX)
        for one, other, index in np.unique(np.stack([ids[same], first[same], classes[same]], axis=1), axis=0).tolist():
            upper, lower = self._root(one), self._root(other)
            if upper != lower:
                self._joined[lower] = upper
                self.polygons[index] -= 1

    def _root(self, component: int) -> int:
        while component in self._joined:
            component = self._joined[component]
        return component
