"""Unpacks zip and tar archives without trusting them."""

import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from rsseg.datasets.prepare.stage import require_free_disk
from rsseg.errors import DataError

_BLOCK = 1 << 20
PARTIAL = ".partial"
"""Ends the name of a file that is being written."""
_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, NotImplementedError)


@dataclass(frozen=True)
class UnpackLimits:
    """What an honest archive stays below."""

    files: int = 1_000_000
    ratio: float = 500.0
    """Unpacked bytes per archive byte, looked at only beyond `ratio_free_bytes`: small flat masks pack very well."""
    ratio_free_bytes: int = 1 << 30


def is_archive(path: Path) -> bool:
    """Whether a file is a zip or a tar, compressed or not; by content, not by name."""
    return path.is_file() and (zipfile.is_zipfile(path) or tarfile.is_tarfile(path))


def unpack(
    archive: Path,
    folder: Path,
    progress: Callable[[int, int], None],
    limits: UnpackLimits | None = None,
    place: Callable[[str], str | None] | None = None,
) -> None:
    """Unpack regular files into `folder`, which must exist. Links, devices and paths that leave it are refused.

    Files appear complete, by renaming, so that an interrupted call can be repeated: what is there is not written again.

    Args:
        archive: zip, tar, tar.gz, tar.bz2 or tar.xz.
        folder: where to; nothing outside it is written.
        progress: told files done and their number (0 while it is not known).
        limits: None takes the defaults.
        place: entry -> its path below `folder`, None to leave it out; None takes all as they are named.

    Raises:
        DataError: a dangerous, encrypted, damaged or suspiciously large archive.
        MachineError: the disk is too small.
    """
    room = _Room(archive, folder, limits or UnpackLimits(), place or str)
    with _readable(archive):
        if zipfile.is_zipfile(archive):
            _unpack_zip(archive, room, progress)
        elif tarfile.is_tarfile(archive):
            _unpack_tar(archive, room, progress)
        else:
            raise DataError(f"{archive}: neither a zip nor a tar archive. Unpack it and pass the folder as --src.")


class _Room:
    """Where files of an archive go, and how much comes out of it."""

    def __init__(self, archive: Path, folder: Path, limits: UnpackLimits, place: Callable[[str], str | None]) -> None:
        self.archive = archive
        self.folder = folder
        self._place = place
        self._taken: set[Path] = set()
        self._limits = limits
        self._most_bytes = max(limits.ratio * archive.stat().st_size, float(limits.ratio_free_bytes))
        self._bytes = 0
        self._files = 0

    def target(self, name: str) -> Path | None:
        """Where an entry goes; None if it is left out."""
        placed = self._place(_inside(self.archive, name).as_posix())
        if placed is None:
            return None
        target = self.folder / _inside(self.archive, placed)
        if target in self._taken:
            raise DataError(f"{self.archive}: two entries are named {target.name!r}, refused.")
        self._taken.add(target)
        return target

    def take_file(self) -> None:
        self._files += 1
        if self._files > self._limits.files:
            raise DataError(f"{self.archive}: more than {self._limits.files} files, refused as a decompression bomb.")

    def take_bytes(self, count: int) -> None:
        self._bytes += count
        if self._bytes > self._most_bytes:
            raise DataError(
                f"{self.archive}: unpacks to more than {self._limits.ratio:g} times its size, refused as a "
                "decompression bomb. If you trust it, unpack it yourself and pass the folder as --src."
            )


@contextmanager
def _readable(archive: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGED as error:
        raise DataError(f"{archive}: the archive is damaged or ends early ({error}). Get it again.") from None


def _unpack_zip(archive: Path, room: _Room, progress: Callable[[int, int], None]) -> None:
    with zipfile.ZipFile(archive) as file:
        entries = [entry for entry in file.infolist() if not entry.is_dir()]
        wanted = []
        # looked through before the first byte is written
        for entry in entries:
            room.take_file()
            mode = entry.external_attr >> 16
            if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                raise DataError(f"{archive}: {entry.filename!r} is a link or a device, refused.")
            target = room.target(entry.filename)
            if target is None:
                continue
            if entry.flag_bits & 1:
                raise DataError(f"{archive}: {entry.filename!r} is encrypted. Unpack it and pass the folder as --src.")
            wanted.append((entry, target))
        require_free_disk(room.folder, sum(entry.file_size for entry, target in wanted if not target.exists()))
        for done, (entry, target) in enumerate(wanted, start=1):
            with file.open(entry) as content:
                _write(content, target, entry.file_size, room)
            progress(done, len(wanted))


def _unpack_tar(archive: Path, room: _Room, progress: Callable[[int, int], None]) -> None:
    with tarfile.open(archive, "r:*") as file:
        for done, member in enumerate(file, start=1):
            target = room.target(member.name) if not member.isdir() else None
            if member.isdir():
                _inside(archive, member.name)
                continue
            if not member.isreg():
                raise DataError(f"{archive}: {member.name!r} is a link or a device, refused.")
            room.take_file()
            content = file.extractfile(member)
            if target is None or content is None:
                continue
            require_free_disk(room.folder, member.size)
            _write(content, target, member.size, room)
            progress(done, 0)


def _inside(archive: Path, name: str) -> PurePosixPath:
    """The entry's path; raises `DataError` if it would leave the folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    drive = path.parts and path.parts[0].endswith(":")
    if path.is_absolute() or ".." in path.parts or drive or "\0" in name:
        raise DataError(f"{archive}: the entry {name!r} points outside the archive, refused.")
    return path


def _write(content: IO[bytes], target: Path, size: int, room: _Room) -> None:
    if target.is_file() and target.stat().st_size == size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}{PARTIAL}")
    with partial.open("wb") as file:
        while block := content.read(_BLOCK):
            room.take_bytes(len(block))
            file.write(block)
    partial.replace(target)
