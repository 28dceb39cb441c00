"""A cache of decoded images: uncompressed TIFF files, memory-mapped.

A random window of a compressed file requires decoding all its blocks; from the cache it costs a few page faults.
"""

import ctypes
import hashlib
import mmap
import os
import tempfile
import time
import uuid
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile
from numpy.typing import DTypeLike, NDArray

from rsseg.errors import RssegWarning

CACHE_NAME = ".rsseg-cache"
_ABANDONED_S = 3600
"""Age, in seconds, from which a temporary file counts as abandoned."""


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
