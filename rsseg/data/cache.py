"""A cache of decoded images: uncompressed TIFF files, memory-mapped.

A random window of a compressed file costs the decoding of all its blocks; from here it costs a few page faults.
"""

import hashlib
import tempfile
import uuid
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile
from numpy.typing import DTypeLike, NDArray

CACHE_NAME = ".rsseg-cache"


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
        """Use `folder`; it is created if missing."""
        self._folder = folder
        self.enabled = True
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            self.disable(error)

    def disable(self, error: OSError) -> None:
        """Stop caching, with a warning."""
        self.enabled = False
        warnings.warn(
            f"{self._folder}: images cannot be cached ({error}); they are decoded at every use instead.",
            RuntimeWarning,
            stacklevel=2,
        )

    def path(self, sources: Sequence[Path], variant: str) -> Path:
        """File for the array made from `sources`; changes with their size and time and with `variant`."""
        states = [(str(source), stat.st_size, stat.st_mtime_ns) for source in sources for stat in [source.stat()]]
        digest = hashlib.sha256(repr((states, variant)).encode()).hexdigest()[:32]
        return self._folder / f"{digest}.tif"

    @staticmethod
    def load(path: Path) -> tuple[NDArray[Any], ...] | None:
        """The file's arrays `(h, w, bands)`, memory-mapped; None if it is missing or incomplete."""
        try:
            with tifffile.TiffFile(path) as file:
                sizes = [(page.imagelength, page.imagewidth) for page in file.pages]
            return tuple(tifffile.memmap(path, page=i, mode="r").reshape(*size, -1) for i, size in enumerate(sizes))
        except (OSError, ValueError, tifffile.TiffFileError):
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
