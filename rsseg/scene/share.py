"""Logs of finished rows of a scene: resume an interrupted run, and share a scene among processes.

A log of finished rows is only appended to; an incomplete record at its end is detected by a checksum and dropped.

Processes that share a scene, such as one per GPU, need no connection: each writes its rows to a log beside the output,
and the main one merges them. Names of completed logs and of failure messages contain the id of the start, so that files
of an earlier start are never used.
"""

import glob
import json
import os
import struct
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from rsseg import errors
from rsseg.errors import MachineError, RssegError, UsageError
from rsseg.files import hidden_path, writing
from rsseg.inference.tiling import Span

_PAUSE = 0.05
"""Interval of the checks for files of other processes, seconds."""
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
        """Open or create; a log with another identity is replaced if `anew`, else an error.

        Raises:
            MachineError: it cannot be written, or has another identity.
        """
        self.path = path
        self._head = _MAGIC + identity.encode() + b"\n"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = path.open("r+b" if path.exists() else "w+b")
            if self._file.read(len(self._head)) != self._head:
                if not anew:
                    raise MachineError(f"{path}: made with other settings. Give all processes the same --tile.")
                self._file.seek(0)
                self._file.truncate()
                self._file.write(self._head)
                self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def strips(self) -> Iterator[LoggedStrip]:
        """Yield the strips in order and truncate an incomplete last one; exhaust before appending."""
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
        """Add a strip; on return it is on the disk.

        Raises:
            MachineError: the disk is full.
        """
        body = b"".join(_packed(array) for array in strip.arrays)
        head = _RECORD.pack(strip.panel, strip.row, len(strip.arrays), len(body), zlib.crc32(body))
        with writing(self.path):
            self._file.write(head + body)
            self._file.flush()
            os.fsync(self._file.fileno())

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


def _packed(array: NDArray[np.generic]) -> bytes:
    # Level 1: a strip is written once and read at most once.
    body = zlib.compress(np.ascontiguousarray(array).tobytes(), 1)
    return _ARRAY.pack(array.dtype.char.encode().replace(b"B", b"u"), *array.shape, len(body)) + body


@dataclass(frozen=True)
class Share:
    """The part of one process.

    number: of this process, from 0
    count: number of processes
    start: id that all processes of one start have in common
    """

    number: int = 0
    count: int = 1
    start: str = ""

    @classmethod
    def from_environment(cls, variables: Mapping[str, str]) -> "Share":
        """From the variables of torchrun; without them this is the only process.

        Raises:
            UsageError: the processes are on several machines.
        """
        count = int(variables.get("WORLD_SIZE", "1"))
        if count == 1:
            return ALONE
        if int(variables.get("LOCAL_WORLD_SIZE", count)) != count:
            raise UsageError(
                "the processes of one scene must be on one machine. Split scenes among machines with --part."
            )
        names = ("TORCHELASTIC_RUN_ID", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
        return cls(int(variables["RANK"]), count, "-".join(variables.get(name, "0") for name in names))

    @property
    def is_main(self) -> bool:
        """True for the process that writes the outputs and prints."""
        return self.number == 0

    def rows(self, total: int) -> Span:
        """This process's part of `total` rows of tiles."""
        return Span(total * self.number // self.count, total * (self.number + 1) // self.count)

    def log(self, output: Path) -> Path:
        """Log of this process's finished rows."""
        return hidden_path(output, f"{self._part(self.number)}.resume")

    @contextmanager
    def of_scene(self, output: Path, *, resume: bool) -> Iterator[None]:
        """Context of all work on one scene: a failure in any process is raised in the main one, and only there.

        Args:
            output: of the scene.
            resume: use the rows of an earlier start, and keep those of this one if it fails.
        """
        if self.count == 1:
            yield
            return
        self._tidy(output, resume=resume)
        kept = resume
        try:
            yield
            kept = False
        except Exception as error:
            if self.is_main:
                # The others continue with the next scene: their files of this one must not be removed yet.
                with suppress(RssegError):
                    self.wait(output)
                raise
            self._hand_over_failure(output, error)
            if not isinstance(error, RssegError):
                raise
        finally:
            if self.is_main:
                self._clear(output, kept=kept)
            if not kept:
                self.log(output).unlink(missing_ok=True)

    def hand_over(self, output: Path) -> None:
        """Mark the log as complete."""
        self.log(output).replace(self._named(output, self.number, "rows"))

    def wait(self, output: Path) -> list[Path]:
        """Wait for all other processes; returns their completed logs.

        Raises:
            RssegError: the error of the first process that failed.
        """
        logs, failures = [], []
        for number in range(1, self.count):
            log, failure = (self._named(output, number, kind) for kind in ("rows", "failed"))
            while not (log.exists() or failure.exists()):
                time.sleep(_PAUSE)
            if log.exists():
                logs.append(log)
            else:
                failures.append(failure)
        if failures:
            name, message = json.loads(failures[0].read_text(encoding="utf-8"))
            raise getattr(errors, name)(message)
        return logs

    def _tidy(self, output: Path, *, resume: bool) -> None:
        """Use or remove the files of this process's part that an earlier start left."""
        start = hidden_path(output, f"{self._part(self.number)}.").name
        for left in output.parent.glob(f"{glob.escape(start)}*.*"):
            if left.suffix == ".rows" and resume:
                left.replace(self.log(output))
            else:
                left.unlink()
        if not resume:
            self.log(output).unlink(missing_ok=True)

    def _hand_over_failure(self, output: Path, error: Exception) -> None:
        kind = type(error).__name__ if isinstance(error, RssegError) else RssegError.__name__
        made = self._named(output, self.number, "failing")
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_text(json.dumps([kind, str(error)]), encoding="utf-8")
        made.replace(self._named(output, self.number, "failed"))

    def _clear(self, output: Path, *, kept: bool) -> None:
        for number in range(1, self.count):
            rows = self._named(output, number, "rows")
            if kept and rows.exists():
                rows.replace(Share(number, self.count).log(output))
            for kind in ("rows", "failed"):
                self._named(output, number, kind).unlink(missing_ok=True)

    def _part(self, number: int) -> str:
        return f".{number + 1}-of-{self.count}" if self.count > 1 else ""

    def _named(self, output: Path, number: int, kind: str) -> Path:
        return hidden_path(output, f"{self._part(number)}.{self.start}.{kind}")


ALONE = Share()


def merge_logs(logs: Sequence[StripLog], panels: int) -> Iterator[LoggedStrip]:
    """Merge logs that each hold the rows below those of the one before: panel by panel, from top to bottom."""
    strips = [log.strips() for log in logs]
    heads = [next(iterator, None) for iterator in strips]
    for panel in range(panels):
        for i, iterator in enumerate(strips):
            while (head := heads[i]) is not None and head.panel == panel:
                yield head
                heads[i] = next(iterator, None)
