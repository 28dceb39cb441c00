"""Read images and masks strip by strip: band statistics, samples of values, class counts, polygons and their area."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import cv2
import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning

from rsseg.data.labels import LabelTable, histogram
from rsseg.errors import DataError
from rsseg.raster import Raster, RasterInfo, Window
from rsseg.task import IGNORE_INDEX
from rsseg.vector.grid import Grid

_VECTOR = {".geojson", ".json", ".shp", ".gpkg", ".kml", ".gml", ".fgb", ".parquet"}
_STRIP_VALUES = 1 << 24
"""Values in memory per thread."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Moments:
    """Band statistics of some pixels that can be joined: float64 per band, of stored values after scale tags."""

    pixels: int
    """Pixels with data."""
    sums: NDArray[np.float64]
    squares: NDArray[np.float64]
    """Sum of squared deviations from the mean."""
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    samples: tuple[NDArray[np.float32], ...]
    """Arrays `(bands, n)` of regularly spaced values."""

    def joined(self, other: Self) -> Self:
        """Statistics of both sets of pixels together, without cancellation (Chan, Golub and LeVeque 1979)."""
        if not self.pixels or not other.pixels:
            return other if not self.pixels else self
        pixels = self.pixels + other.pixels
        gap = other.sums / other.pixels - self.sums / self.pixels
        return type(self)(
            pixels=pixels,
            sums=self.sums + other.sums,
            squares=self.squares + other.squares + gap**2 * (self.pixels * other.pixels / pixels),
            low=np.minimum(self.low, other.low),
            high=np.maximum(self.high, other.high),
            samples=self.samples + other.samples,
        )

    def mean(self) -> NDArray[np.float64]:
        """Mean per band."""
        return self.sums / max(self.pixels, 1)

    def std(self) -> NDArray[np.float64]:
        """Population standard deviation per band."""
        return np.asarray(np.sqrt(self.squares / max(self.pixels, 1)))


def open_image(
    files: Sequence[Path], names: Sequence[str] | None, *, nodata: float | None = None, zero_collar: bool = False
) -> Raster:
    """Open an image with the bands of its dataset.

    Args:
        files: file, or one per band.
        names: band names in file order; None reads all bands but alpha. GDAL calls the fourth band of many files alpha,
            so all bands of a file are read if there are as many as names.
        nodata: see `Raster`.
        zero_collar: see `Raster`.

    Raises:
        DataError: an unreadable file, or the wrong number of bands.
    """
    raster = Raster(files, nodata=nodata, zero_collar=zero_collar)
    if names is None or raster.info.count == len(names):
        return raster
    info, name = raster.info, raster.name
    raster.close()
    if info.available != len(names):
        raise DataError(f"{name}: the image has {info.count} bands, expected {len(names)}: {', '.join(names)}.")
    return Raster(files, bands=range(1, len(names) + 1), nodata=nodata, zero_collar=zero_collar)


class MaskError(DataError):
    """A mask that cannot be used."""


@contextmanager
def mask_errors() -> Iterator[None]:
    """Raise errors about a mask as `MaskError`."""
    try:
        yield
    except DataError as error:
        raise MaskError(str(error)) from None


def open_mask(path: Path, grid: RasterInfo | None = None, *, jpeg: bool = False) -> Raster:
    """Open a mask, to be read in the pixel order of its image.

    Args:
        path: file.
        grid: its image; None compares nothing.
        jpeg: accept JPEG compression, for colours that are rounded.

    Raises:
        MaskError: an unreadable or a vector file, another grid, or JPEG, which changes values without a trace.
    """
    if path.suffix.lower() in _VECTOR:
        raise MaskError(
            f"{path}: a vector file, but masks must be rasters. Draw its polygons on the images with `rsseg dataset "
            f"prepare vectors --src IMAGES --labels {path.name} --field NAME`."
        )
    with mask_errors():
        raster = Raster(path)
    try:
        if not jpeg and _is_jpeg(path):
            raise MaskError(f"{path}: JPEG compression changes values: export the masks as PNG or GeoTIFF instead.")
        if grid is not None:
            with mask_errors():
                raster.align_to(grid, what=f"{path}: the mask", of="its image")
    except MaskError:
        raster.close()
        raise
    return raster


def _is_jpeg(path: Path) -> bool:
    with rasterio.open(path) as file:
        return file.driver == "JPEG" or str(file.profile.get("compress")).lower() == "jpeg"


Seen = Callable[[NDArray[np.uint8], Window], None]
"""Called with class indices (h, w) of each strip of a mask, 255 where ignored or without image data."""


def measure_item(
    raster: Raster,
    mask: Path | None,
    labels: LabelTable,
    num_classes: int,
    *,
    samples: int = 0,
    seen: Seen | None = None,
) -> tuple[Moments, NDArray[np.int64] | None]:
    """Statistics of a whole image, and class counts of its mask where the image has data.

    Args:
        raster: open image.
        mask: file, or None.
        labels: meaning of its values.
        num_classes: K.
        samples: approximate number of pixels to keep as a sample.
        seen: gets the class indices strip by strip.

    Returns:
        Statistics, and int64 `(K + 1,)`: pixels with data per class index, ignored ones last; None without a mask.

    Raises:
        DataError: a damaged file, a mask on another grid, an undeclared mask value.
    """
    info = raster.info
    step = max(info.height * info.width // max(samples, 1), 1)
    total, counts = _moments(np.zeros((info.count, 0)), 0), np.zeros(IGNORE_INDEX + 1, np.int64)
    with ExitStack() as stack:
        stored = None if mask is None else stack.enter_context(open_mask(mask, info))
        for window in strips(info):
            pixels, valid = raster.read(window)
            values = pixels.reshape(info.count, -1) if valid.all() else pixels[:, valid]
            total = total.joined(_moments(values, step if samples else 0))
            if stored is not None:
                counts += _count(stored, window, labels, valid, seen)
    return total, None if mask is None else _of_classes(counts, num_classes)


def _moments(values: NDArray[Any], step: int) -> Moments:
    count, pixels = values.shape
    samples = (values[:, step // 2 :: step].astype(np.float32),) if step else ()
    if not pixels:
        nothing = np.zeros(count)
        return Moments(0, nothing, nothing, nothing + np.inf, nothing - np.inf, ())
    sums = values.sum(axis=1, dtype=np.float64)
    deviations = (np.square(band - mean, dtype=np.float64) for band, mean in zip(values, sums / pixels, strict=True))
    squares = np.array([float(deviation.sum()) for deviation in deviations])
    low, high = values.min(axis=1).astype(np.float64), values.max(axis=1).astype(np.float64)
    return Moments(pixels, sums, squares, low, high, samples)


def count_classes(
    mask: Path, labels: LabelTable, num_classes: int, grid: RasterInfo | None, *, seen: Seen | None = None
) -> NDArray[np.int64]:
    """Class counts of a mask whose image is not read; see `open_mask` and `measure_item`."""
    counts = np.zeros(IGNORE_INDEX + 1, np.int64)
    with open_mask(mask, grid) as raster:
        for window in strips(raster.info):
            counts += _count(raster, window, labels, None, seen)
    return _of_classes(counts, num_classes)


def _of_classes(counts: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    return np.append(counts[:num_classes], counts[IGNORE_INDEX])


def _count(
    mask: Raster, window: Window, labels: LabelTable, valid: NDArray[np.bool_] | None, seen: Seen | None
) -> NDArray[np.int64]:
    with mask_errors():
        indices = labels.read(mask, window)
    if seen is not None:
        seen(indices if valid is None else np.where(valid, indices, np.uint8(IGNORE_INDEX)), window)
    return histogram(indices if valid is None or valid.all() else indices[valid])


def strips(info: RasterInfo) -> Iterator[Window]:
    """Windows of full width and whole blocks that cover an image and fit into memory."""
    block = info.block_shape[0]
    rows = block * max(_STRIP_VALUES // (info.width * info.count * block), 1)
    for row in range(0, info.height, rows):
        yield Window(row, 0, min(rows, info.height - row), info.width)


def in_order(
    work: Callable[[T], R], tasks: Sequence[T], jobs: int, progress: Callable[[int, int], None] | None = None
) -> Iterable[R]:
    """`map` over threads (decoding releases the GIL); results come in the order of `tasks`, the first error ends it."""
    # Not per file: warning filters are global, and threads would reset each other's.
    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=max(jobs, 1)) as pool:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        futures = [pool.submit(work, task) for task in tasks]
        try:
            for done, future in enumerate(futures, start=1):
                yield future.result()
                if progress is not None:
                    progress(done, len(futures))
        finally:
            for future in futures:
                future.cancel()


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
            self._square_meters += self._areas.totals(indices, window.row, window.col)[1]
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
