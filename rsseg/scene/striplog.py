"""Finished strips of a scene on the disk, so that an interrupted run goes on where it stopped.

A log is only ever appended to. What a crash cut off at its end is noticed by a checksum and dropped.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from rsseg.errors import MachineError

_MAGIC = b"rsseg strips 1\n"
_RECORD = struct.Struct("<IIIII")
"""Panel, row of tiles, number of arrays, bytes that follow, their checksum."""
_ARRAY = struct.Struct("<cIIII")
"""Type, number of bands, rows, columns, compressed bytes."""
_TYPES: dict[bytes, np.dtype[Any]] = {b"u": np.dtype(np.uint8), b"e": np.dtype(np.float16)}


class LoggedStrip(NamedTuple):
    """Finished rows of one panel: an array (bands, h, w) per product."""

    panel: int
    row: int
    arrays: list[NDArray[np.generic]]


class StripLog:
    """A file of strips; use as a context manager."""

    def __init__(self, path: Path, identity: str, *, anew: bool = True) -> None:
        """Open or make it; a log of something else is begun anew, or with `anew=False` refused.

        Raises:
            MachineError: it cannot be written, or is refused.
        """
        self.path = path
        self._head = _MAGIC + identity.encode() + b"\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = path.open("r+b" if path.exists() else "w+b")
            if self._file.read(len(self._head)) != self._head:
                if not anew:
                    raise MachineError(
                        f"{path}: made with other settings, as where GPUs differ. Give all processes the same "
                        "--batch-size and --tile."
                    )
                self._file.seek(0)
                self._file.truncate()
                self._file.write(self._head)
                self._file.flush()
        except OSError as error:
            raise self._failure(error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def strips(self) -> Iterator[LoggedStrip]:
        """What is in the log, in order; drops an incomplete end, so exhaust it before appending."""
        self._file.seek(len(self._head))
        while True:
            start = self._file.tell()
            strip = self._next()
            if strip is None:
                self._file.seek(start)
                self._file.truncate()
                return
            yield strip

    def append(self, strip: LoggedStrip) -> None:
        """Add a strip; it is on the disk when this returns.

        Raises:
            MachineError: the disk is full.
        """
        body = b"".join(_packed(array) for array in strip.arrays)
        head = _RECORD.pack(strip.panel, strip.row, len(strip.arrays), len(body), zlib.crc32(body))
        try:
            self._file.write(head + body)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failure(error) from None

    def _next(self) -> LoggedStrip | None:
        head = self._file.read(_RECORD.size)
        if len(head) < _RECORD.size:
            return None
        panel, row, count, size, checksum = _RECORD.unpack(head)
        body = self._file.read(size)
        if len(body) < size or zlib.crc32(body) != checksum:
            return None
        arrays, at = [], 0
        for _ in range(count):
            kind, *shape, length = _ARRAY.unpack_from(body, at)
            at += _ARRAY.size
            pixels = np.frombuffer(zlib.decompress(body[at : at + length]), _TYPES[kind])
            arrays.append(pixels.reshape(shape))
            at += length
        return LoggedStrip(panel, row, arrays)

    def _failure(self, error: OSError) -> MachineError:
        return MachineError(f"{self.path}: cannot be written: {error.strerror}. Make room on the disk.")


def _packed(array: NDArray[np.generic]) -> bytes:
    # Level 1: a strip is written once and read at most once.
    body = zlib.compress(np.ascontiguousarray(array).tobytes(), 1)
    return _ARRAY.pack(array.dtype.char.encode().replace(b"B", b"u"), *array.shape, len(body)) + body
