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

from rsseg.data.prepare.stage import require_free_disk
from rsseg.errors import DataError

_BLOCK = 1 << 20
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
    archive: Path, folder: Path, progress: Callable[[int, int], None], limits: UnpackLimits | None = None
) -> None:
    """Unpack regular files into `folder`, which must exist. Links, devices and paths that leave it are refused.

    Args:
        archive: zip, tar, tar.gz, tar.bz2 or tar.xz.
        folder: where to; nothing outside it is written.
        progress: told files done and their number (0 while it is not known).
        limits: None takes the defaults.

    Raises:
        DataError: a dangerous, encrypted, damaged or suspiciously large archive.
        MachineError: the disk is too small.
    """
    room = _Room(archive, limits or UnpackLimits())
    with _readable(archive):
        if zipfile.is_zipfile(archive):
            _unpack_zip(archive, folder, room, progress)
        elif tarfile.is_tarfile(archive):
            _unpack_tar(archive, folder, room, progress)
        else:
            raise DataError(f"{archive}: neither a zip nor a tar archive. Unpack it and pass the folder as --src.")


class _Room:
    """Counts what comes out of an archive."""

    def __init__(self, archive: Path, limits: UnpackLimits) -> None:
        self.archive = archive
        self._limits = limits
        self._most_bytes = max(limits.ratio * archive.stat().st_size, float(limits.ratio_free_bytes))
        self._bytes = 0
        self._files = 0

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


def _unpack_zip(archive: Path, folder: Path, room: _Room, progress: Callable[[int, int], None]) -> None:
    with zipfile.ZipFile(archive) as file:
        entries = [entry for entry in file.infolist() if not entry.is_dir()]
        # looked through before the first byte is written
        for entry in entries:
            room.take_file()
            mode = entry.external_attr >> 16
            if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                raise DataError(f"{archive}: {entry.filename!r} is a link or a device, refused.")
            if entry.flag_bits & 1:
                raise DataError(f"{archive}: {entry.filename!r} is encrypted. Unpack it and pass the folder as --src.")
            _inside(archive, entry.filename)
        require_free_disk(folder, sum(entry.file_size for entry in entries))
        for done, entry in enumerate(entries, start=1):
            with file.open(entry) as content:
                _write(content, folder / _inside(archive, entry.filename), room)
            progress(done, len(entries))


def _unpack_tar(archive: Path, folder: Path, room: _Room, progress: Callable[[int, int], None]) -> None:
    with tarfile.open(archive, "r:*") as file:
        for done, member in enumerate(file, start=1):
            target = _inside(archive, member.name)
            if member.isdir():
                continue
            if not member.isreg():
                raise DataError(f"{archive}: {member.name!r} is a link or a device, refused.")
            room.take_file()
            require_free_disk(folder, member.size)
            content = file.extractfile(member)
            if content is not None:
                _write(content, folder / target, room)
            progress(done, 0)


def _inside(archive: Path, name: str) -> PurePosixPath:
    """The entry's path; raises `DataError` if it would leave the folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    drive = path.parts and path.parts[0].endswith(":")
    if path.is_absolute() or ".." in path.parts or drive or "\0" in name:
        raise DataError(f"{archive}: the entry {name!r} points outside the archive, refused.")
    return path


def _write(content: IO[bytes], target: Path, room: _Room) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with target.open("xb") as file:
            while block := content.read(_BLOCK):
                room.take_bytes(len(block))
                file.write(block)
    except FileExistsError:
        raise DataError(f"{room.archive}: two entries are named {target.name!r}, refused.") from None
