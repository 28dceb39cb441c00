"""Read images and masks of a prepared dataset, whole or by window, from a cache of decoded images.

The cache holds uncompressed TIFF files, memory-mapped: a random window of a compressed file requires decoding all its
blocks; from the cache it costs a few page faults.
"""

import ctypes
import hashlib
import math
import mmap
import os
import tempfile
import time
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import tifffile
from numpy.typing import DTypeLike, NDArray

from rsseg.data.index import IndexItem, SegmentationIndex
from rsseg.data.labels import LabelTable
from rsseg.errors import DataError, RssegWarning
from rsseg.raster import Raster, Window
from rsseg.task import IGNORE_INDEX, task_with_bands

CACHE_NAME = ".rsseg-cache"
_ABANDONED_S = 3600
"""Age, in seconds, from which a temporary file counts as abandoned."""
_NATIVE = ("uint8", "uint16", "int16", "float32")
"""Pixel types kept until the pixels are on the device; others are converted to float32."""
_STRIP_VALUES = 1 << 24
"""Values per strip of a conversion."""
_MOST_MAPS = 1024
"""Images and masks kept mapped per reader: Linux grants a process 65530 maps."""
_T = TypeVar("_T")


class Page(NamedTuple):
    """An array `(h, w, bands)` to write, in strips of `rows_per_strip` rows; the last may be shorter."""

    strips: Iterable[NDArray[Any]]
    shape: tuple[int, int, int]
    dtype: DTypeLike
    rows_per_strip: int


class ArrayCache:
    """A folder of arrays. Safe with any number of processes: files are renamed into place when complete.

    If the folder cannot be written, nothing is cached, and callers read the sources.
    """

    def __init__(self, folder: Path) -> None:
        """Use `folder`; it is created if missing, and temporary files of killed processes are removed."""
        self._folder = folder
        self.enabled = True
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            for file in folder.glob("*.tmp"):
                if file.stat().st_mtime < time.time() - _ABANDONED_S:
                    file.unlink(missing_ok=True)
        except OSError as error:
            self.disable(error)

    def disable(self, error: OSError) -> None:
        """Stop caching, with a warning."""
        self.enabled = False
        warnings.warn(
            f"{self._folder}: images cannot be cached ({error.strerror or error}); they are decoded at every use, "
            "which is slower. Make the folder writable, or set data.cache: false.",
            RssegWarning,
            stacklevel=2,
        )

    def path(self, sources: Sequence[Path], variant: str) -> Path:
        """File for the array made from `sources`; changes with `variant`, and with size and time of their files."""
        states = [state for source in sources for state in (_state(source), *map(_state, _side_files(source)))]
        digest = hashlib.sha256(repr((states, variant)).encode()).hexdigest()[:32]
        return self._folder / f"{digest}.tif"

    @staticmethod
    def load(path: Path) -> tuple[NDArray[Any], ...] | None:
        """The file's arrays `(h, w, bands)`, memory-mapped, read-only; None if it is missing or incomplete."""
        try:
            with tifffile.TiffFile(path) as file:
                layouts = [
                    ((page.imagelength, page.imagewidth, page.samplesperpixel), page.dtype, page.dataoffsets[0])
                    for page in map(tifffile.TiffPage.aspage, file.pages)
                ]
            data = _mapped(path)
            return tuple(np.ndarray(shape, dtype, data, offset) for shape, dtype, offset in layouts)
        except (OSError, ValueError, TypeError, tifffile.TiffFileError):
            return None

    def store(self, path: Path, pages: Iterable[Page]) -> None:
        """Write arrays under a temporary name, then rename; raises `OSError`."""
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        try:
            with tifffile.TiffWriter(temporary, bigtiff=True) as writer:
                for page in pages:
                    shape = page.shape if page.shape[2] > 1 else page.shape[:2]
                    writer.write(
                        (np.ascontiguousarray(strip).reshape(-1, *shape[1:]) for strip in page.strips),
                        shape=shape,
                        dtype=np.dtype(page.dtype),
                        photometric="minisblack",
                        planarconfig="contig" if len(shape) == 3 else None,
                        rowsperstrip=page.rows_per_strip,
                        metadata=None,
                    )
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _state(path: Path) -> tuple[str, int, int] | None:
    """Name, size and time of a file; None without one."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return str(path), stat.st_size, stat.st_mtime_ns


def _side_files(path: Path) -> Iterator[Path]:
    """Names of files in which GDAL looks for nodata, a mask and the location of an image."""
    letters = path.suffix[1:2] + path.suffix[-1:]
    yield from (path.with_name(f"{path.name}{end}") for end in (".aux.xml", ".msk"))
    yield from (path.with_suffix(end) for end in (f".{letters}w", f"{path.suffix or '.'}w", ".wld", ".prj"))


def _mapped(path: Path) -> NDArray[np.uint8]:
    """The bytes of a file, mapped read-only, without a file descriptor.

    `numpy.memmap` holds a descriptor as long as the array exists: a thousand images would exceed the usual limit.
    """
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    if library is None:
        return np.memmap(path, np.uint8, "r")
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    library.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        address = library.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    buffer = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(buffer, library.munmap, address, size).atexit = False
    data: NDArray[np.uint8] = np.ctypeslib.as_array(buffer)
    data.flags.writeable = False
    return data


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
