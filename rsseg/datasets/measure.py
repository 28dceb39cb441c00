"""Read images and masks strip by strip: band statistics, samples of values, class counts."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning

from rsseg.data.labels import LabelTable
from rsseg.errors import DataError
from rsseg.raster import Raster, RasterInfo, Window
from rsseg.task import IGNORE_INDEX

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
        """Statistics of both sets of pixels (Chan, Golub and LeVeque 1979: no cancellation of large sums)."""
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
        names: band names in file order; None takes all bands but alpha. GDAL calls the fourth band of many files alpha,
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


def measure_image(raster: Raster, *, samples: int) -> Moments:
    """Statistics of a whole image; raises `DataError` if it is damaged.

    Args:
        raster: open image.
        samples: approximate number of pixels to keep as a sample.
    """
    info = raster.info
    step = max(info.height * info.width // max(samples, 1), 1)
    total: Moments | None = None
    for window in strips(info):
        pixels, valid = raster.read(window)
        values = pixels.reshape(info.count, -1) if valid.all() else pixels[:, valid]
        moments = _moments(values, step if samples else 0)
        total = moments if total is None else total.joined(moments)
    if total is None:
        raise DataError(f"{raster.name}: the image has no pixels.")
    return total


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


def count_classes(mask: Path, labels: LabelTable, num_classes: int, size: tuple[int, int]) -> NDArray[np.int64]:
    """Pixels per class index of a mask, ignored ones last.

    Args:
        mask: file.
        labels: meaning of its values.
        num_classes: K.
        size: rows and columns of its image.

    Returns:
        int64 `(K + 1,)`.

    Raises:
        DataError: a size that differs from the image's, an undeclared value, a damaged file.
    """
    counts = np.zeros(IGNORE_INDEX + 1, np.int64)
    with Raster(mask) as raster:
        info = raster.info
        if (info.height, info.width) != size:
            raise DataError(
                f"{mask}: the mask has {info.height} x {info.width} pixels (rows x columns), its image "
                f"{size[0]} x {size[1]}. They must agree."
            )
        for window in strips(info):
            stored = raster.read_raw(window)
            counts += labels.counts(stored, info.colormap, name=str(mask), origin=(window.row, window.col))
    return np.append(counts[:num_classes], counts[IGNORE_INDEX])


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
    # not per file: warning filters are global, and threads would undo each other's
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
