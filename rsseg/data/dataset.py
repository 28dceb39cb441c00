"""Read images and masks of a prepared dataset, whole or by window."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from rsseg.data.cache import CACHE_NAME, ArrayCache, Page
from rsseg.data.index import IndexItem, SegmentationIndex
from rsseg.data.labels import LabelTable
from rsseg.errors import DataError
from rsseg.raster import Raster, Window
from rsseg.task import IGNORE_INDEX, task_with_bands

_NATIVE = ("uint8", "uint16", "int16", "float32")
"""Pixel types kept until the pixels are on the device; others are converted to float32."""
_STRIP_VALUES = 1 << 24
"""Values per strip of a conversion."""
_MOST_MAPS = 1024
"""Images and masks kept mapped per reader: Linux grants a process 65530 maps."""
_T = TypeVar("_T")


class _Image(NamedTuple):
    """A cached image: pixels `(h, w, bands)` and bool `(h, w)`; None if every pixel has data."""

    pixels: NDArray[Any]
    valid: NDArray[np.bool_] | None


class SampleReader:
    """Images and masks of one index. Can be pickled for use in several processes."""

    def __init__(self, index: SegmentationIndex, bands: Sequence[str], *, cache: bool) -> None:
        """Check the bands and the label map.

        Args:
            index: prepared dataset.
            bands: names of the bands to read, in network order.
            cache: keep decoded images beside the index.

        Raises:
            DataError: a band that the index does not have, or a label map that contradicts the task.
        """
        task_with_bands(index.task, bands)
        self._index = index
        self._bands = [index.task.bands.index(band) for band in bands]
        self._labels = LabelTable(index.label_map, index.task.num_classes)
        self._cache = ArrayCache(index.root / CACHE_NAME) if cache else None
        self._images: dict[str, _Image] = {}
        self._masks: dict[str, NDArray[np.uint8]] = {}
        self._sizes: dict[str, tuple[int, int]] = {}
        self._aligned: set[str] = set()
        """Images whose masks are known to be on the same grid and not mirrored."""

    def __getstate__(self) -> dict[str, Any]:
        """Memory maps are not pickled."""
        return self.__dict__ | {"_images": {}, "_masks": {}}

    def size(self, item: IndexItem) -> tuple[int, int]:
        """Rows and columns of an image; raises `DataError`."""
        if item.image not in self._sizes:
            cached = self._cached_image(item)
            if cached is not None:
                self._sizes[item.image] = cached.pixels.shape[0], cached.pixels.shape[1]
            else:
                with self._open(item) as raster:
                    self._sizes[item.image] = raster.info.height, raster.info.width
        return self._sizes[item.image]

    def image(self, item: IndexItem, window: Window | None = None) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Pixels and where they have data.

        Returns:
            `(bands, h, w)` uint8, uint16, int16 or float32, 0 without data, read-only; bool `(h, w)`.

        Raises:
            DataError: a missing or damaged file, bands or a pixel type other than those of the index.
        """
        cached = self._cached_image(item)
        if cached is None:
            with self._open(item) as raster:
                pixels, valid = raster.read(window)
            return _native(pixels), valid
        inside = _index(window)
        pixels = np.asarray(cached.pixels[inside]).transpose(2, 0, 1)
        valid = np.ones(pixels.shape[1:], np.bool_) if cached.valid is None else np.asarray(cached.valid[inside])
        return pixels, valid

    def sample(
        self, item: IndexItem, window: Window | None = None
    ) -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.uint8]]:
        """`image` and `mask`; the mask is 255 also where the image has no data."""
        pixels, valid = self.image(item, window)
        mask = self.mask(item, window)
        return pixels, valid, mask if valid.all() else np.where(valid, mask, np.uint8(IGNORE_INDEX))

    def mask(self, item: IndexItem, window: Window | None = None) -> NDArray[np.uint8]:
        """Class indices of the file, uint8 `(h, w)`, 255 to ignore.

        Raises:
            DataError: no mask, a damaged one, an undeclared value, or a size other than the image's.
        """
        file = self._index.mask_file(item)
        if file is None:
            raise DataError(
                f"{item.image}: the image has no mask. Prepare the dataset with masks, or select other images."
            )
        cached = self._cached_mask(item, file)
        if cached is not None:
            return np.asarray(cached[_index(window)])
        return self._read_mask(item, file, window)

    def _open(self, item: IndexItem) -> Raster:
        index = self._index
        files, known = index.image_files(item), len(index.task.bands)
        with Raster(files) as raster:
            info, name = raster.info, raster.name
        # The alpha band may be a band of the dataset: GDAL marks the fourth band of many files as alpha.
        if known not in (info.count, info.available):
            raise DataError(
                f"{name}: the image has {info.count} bands, the dataset {known}: {', '.join(index.task.bands)}. "
                "Prepare the dataset again, or leave the image out."
            )
        if info.dtype != index.task.dtype:
            raise DataError(
                f"{name}: the pixels are {info.dtype}, but the dataset was prepared for {index.task.dtype}. "
                "Prepare it again, or leave the image out."
            )
        numbers = info.numbers if known == info.count else range(1, known + 1)
        bands = [numbers[band] for band in self._bands]
        return Raster(files, bands=bands, nodata=index.nodata, zero_collar=index.ignore_zero_collar)

    def _cached_image(self, item: IndexItem) -> _Image | None:
        """The image from the cache, stored there first if needed; None without a cache."""
        if item.image not in self._images:
            index = self._index
            variant = f"image {self._bands} {index.nodata} {index.ignore_zero_collar} {index.task.dtype}"
            arrays = self._cached(index.image_files(item), variant, lambda: self._image_pages(item))
            if arrays is None:
                return None
            pixels, *valid = arrays
            _remember(self._images, item.image, _Image(pixels, valid[0][..., 0].view(np.bool_) if valid else None))
        return self._images[item.image]

    def _cached_mask(self, item: IndexItem, file: Path) -> NDArray[np.uint8] | None:
        """Class indices of the mask from the cache, stored there first if needed; None without a cache."""
        if item.image not in self._masks:
            variant = f"mask {self._index.label_map.model_dump_json()} {self._index.task.num_classes}"
            # The image and the side files of both decide where the mask lies on the image.
            sources = [file, *self._index.image_files(item)]
            arrays = self._cached(sources, variant, lambda: [_page(self._read_mask(item, file, None))])
            if arrays is None:
                return None
            _remember(self._masks, item.image, arrays[0][..., 0])
        return self._masks[item.image]

    def _cached(
        self, sources: Sequence[Path], variant: str, pages: Callable[[], Iterable[Page]]
    ) -> tuple[NDArray[Any], ...] | None:
        cache = self._cache
        if cache is None or not cache.enabled:
            return None
        missing = [source for source in sources if not source.is_file()]
        if missing:
            raise DataError(f"{missing[0]}: there is no such file. Restore it, or prepare the dataset again.")
        path = cache.path(sources, variant)
        arrays = cache.load(path)
        if arrays is None:
            try:
                cache.store(path, pages())
            except OSError as error:
                cache.disable(error)
                return None
            arrays = cache.load(path)
        return arrays

    def _image_pages(self, item: IndexItem) -> Iterator[Page]:
        """The pixels, then the valid mask unless every pixel has data."""
        with self._open(item) as raster:
            info = raster.info
            valid = np.empty((info.height, info.width), np.uint8)
            block = info.block_shape[0]
            rows = min(info.height, block * math.ceil(_STRIP_VALUES / (info.width * info.count * block)))

            def strips() -> Iterator[NDArray[Any]]:
                for row in range(0, info.height, rows):
                    window = Window(row, 0, min(rows, info.height - row), info.width)
                    pixels, valid[row : row + rows] = raster.read(window)
                    yield _native(pixels).transpose(1, 2, 0)

            dtype = info.dtype if info.dtype in _NATIVE else "float32"
            yield Page(strips(), (info.height, info.width, info.count), dtype, rows)
            if not valid.all():
                yield _page(valid)

    def _read_mask(self, item: IndexItem, file: Path, window: Window | None) -> NDArray[np.uint8]:
        """Class indices from the file; only the values in the window are checked."""
        with Raster(file) as raster:
            if item.image not in self._aligned:
                with self._open(item) as image:
                    mirrored = raster.align_to(image.info, what=f"{file}: the mask", of=f"its image {item.image}")
                if not mirrored:
                    self._aligned.add(item.image)
            return self._labels.read(raster, window)


def _page(array: NDArray[np.uint8]) -> Page:
    height, width = array.shape
    return Page([array[..., None]], (height, width, 1), np.uint8, height)


def _remember(table: dict[str, _T], key: str, value: _T) -> None:
    """Add a map, dropping the oldest one of a full table."""
    if len(table) >= _MOST_MAPS:
        del table[next(iter(table))]
    table[key] = value


def _native(pixels: NDArray[Any]) -> NDArray[Any]:
    return pixels if pixels.dtype.name in _NATIVE else pixels.astype(np.float32)


def _index(window: Window | None) -> tuple[slice, slice]:
    return (slice(None), slice(None)) if window is None else window.within()
