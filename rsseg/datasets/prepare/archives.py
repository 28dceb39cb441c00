"""Find the files of a dataset in folders and in zip and tar archives, which are not trusted."""

import hashlib
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from rsseg.datasets.layouts import SIDECARS, WORLD_FILES, Layout, PathPattern, list_files
from rsseg.errors import DataError
from rsseg.files import require_free_disk

_PACKED = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")
_NESTED = 3
"""Maximum depth of nested archives."""
_BLOCK = 1 << 20
_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, NotImplementedError)


@dataclass(frozen=True)
class UnpackLimits:
    """Limits against decompression bombs."""

    files: int = 1_000_000
    ratio: float = 500.0
    """Unpacked bytes per archive byte, checked above `ratio_free_bytes`: small uniform masks compress very well."""
    ratio_free_bytes: int = 1 << 30


class FileFilter:
    """Filter for the files that a dataset uses; an archive may hold many more."""

    def __init__(self, layouts: Sequence[Layout]) -> None:
        """Accept files of any of the layouts."""
        texts = [text for one in layouts for text in (*one.images.split("|"), one.masks, *one.beside) if text]
        self._patterns = [PathPattern(text) for text in dict.fromkeys(texts)]
        self._suffixes = sorted({PurePosixPath(text).suffix for text in texts})

    def __call__(self, name: str) -> bool:
        """Whether a file is an image, a mask, a side file of one, or an archive."""
        if is_packed(name) or self._fits(name):
            return True
        bare = [name.removesuffix(suffix) for suffix in SIDECARS if name.endswith(suffix)]
        stem, dot, suffix = name.rpartition(".")
        if f"{dot}{suffix}".lower() in WORLD_FILES:
            bare += [f"{stem}{suffix}" for suffix in self._suffixes]
        return any(self._fits(candidate) for candidate in bare)

    def _fits(self, name: str) -> bool:
        return any(pattern.prefixes([name]) for pattern in self._patterns)


def is_packed(name: str) -> bool:
    """Whether a file is an archive by its name."""
    return name.lower().endswith(_PACKED)


def is_archive(path: Path) -> bool:
    """Whether a file is a zip or a tar, compressed or not; by content, not by name."""
    return path.is_file() and (zipfile.is_zipfile(path) or tarfile.is_tarfile(path))


def gather(
    source: Path,
    unpacked: Path,
    layouts: Sequence[Layout],
    checksums: Mapping[str, str],
    progress: Callable[[str, int, int], None],
) -> dict[str, Path]:
    """Find all files that a layout may use, by relative name with `/`.

    Args:
        source: an archive, or a folder with or without archives.
        unpacked: folder for the content of archives; may contain that of an interrupted call.
        layouts: only files that match one of them are unpacked.
        checksums: MD5 of the publisher's archives by name; a difference is only a warning, as users repack archives.
        progress: called with the stage, and the numbers of finished and of all files.

    Raises:
        DataError: a dangerous or damaged archive, or one that contains another version of a file next to it.
        MachineError: not enough disk space.
    """
    wanted = FileFilter(layouts)
    if source.is_file():
        files: dict[str, Path] = {}
        archives = {source.name: source}
    else:
        found = {name: source / name for name in list_files(source)}
        archives = {name: path for name, path in found.items() if is_packed(name) and is_archive(path)}
        files = {name: path for name, path in found.items() if name not in archives}
    for _ in range(_NESTED):
        inner: dict[str, Path] = {}
        for name, archive in archives.items():
            expected = checksums.get(archive.name)
            if expected is not None and (found_sum := md5_of(archive)) != expected:
                progress(f"{archive.name} is not the publisher's file: MD5 {found_sum}, expected {expected}", 1, 1)
            for member in _unpack_wanted(name, archive, unpacked, wanted, files, progress):
                (inner if is_packed(member) else files)[member] = unpacked / member
        archives = inner
        if not archives:
            return files
    raise DataError(f"{source}: archives are nested more than {_NESTED} deep. Unpack {next(iter(archives))} yourself.")


def _unpack_wanted(
    name: str,
    archive: Path,
    folder: Path,
    wanted: FileFilter,
    known: Mapping[str, Path],
    progress: Callable[[str, int, int], None],
) -> Iterable[str]:
    """Unpack the files that are wanted and not among `known`; returns their names."""
    above, _, base = name.rpartition("/")
    stem = base
    while is_packed(stem) or stem.lower().endswith(".tar"):
        stem = stem.rpartition(".")[0]
    taken: list[str] = []

    def place(entry: str) -> str | None:
        # most archives contain one folder of their own name; create it for the others
        parts = [part for part in (above, stem if entry.split("/")[0] != stem else "", entry) if part]
        placed = "/".join(parts)
        hidden = any(part.startswith((".", "__MACOSX")) for part in entry.split("/"))
        if hidden or not wanted(placed):
            return None
        # Already unpacked next to the archive, with or without its outer folder? Bare file names are too ambiguous.
        inner = entry.partition("/")[2]
        twins = [f"{above}/{path}".strip("/") for path in (entry, inner, inner and f"{stem}/{inner}") if "/" in path]
        if twin := next((name for name in (placed, *twins) if name in known), None):
            return twin
        taken.append(placed)
        return placed

    folder.mkdir(parents=True, exist_ok=True)
    unpack(archive, folder, lambda done, total: progress(f"unpack {base}", done, total), place=place, known=known)
    return sorted(taken)


def md5_of(path: Path) -> str:
    """MD5 of a file in hexadecimal, as publishers give it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def unpack(
    archive: Path,
    folder: Path,
    progress: Callable[[int, int], None],
    limits: UnpackLimits | None = None,
    place: Callable[[str], str | None] | None = None,
    known: Mapping[str, Path] | None = None,
) -> None:
    """Unpack regular files into `folder`, which must exist. Links, devices and paths that leave it are refused.

    Files get their final names when complete; a repeated call skips them.

    Args:
        archive: zip, tar, tar.gz, tar.bz2 or tar.xz.
        folder: nothing outside it is written.
        progress: called with the numbers of finished and of all files (0 while unknown).
        limits: None uses the defaults.
        place: entry -> its path below `folder`, None to leave it out; by default all keep their names.
        known: path below `folder` -> existing file, which is compared instead of written.

    Raises:
        DataError: a dangerous, encrypted, damaged or suspiciously large archive, or an entry that differs from a known
            file.
        MachineError: not enough disk space.
    """
    extraction = _Extraction(archive, folder, limits or UnpackLimits(), place or str, known or {})
    try:
        if zipfile.is_zipfile(archive):
            _unpack_zip(archive, extraction, progress)
        elif tarfile.is_tarfile(archive):
            _unpack_tar(archive, extraction, progress)
        else:
            raise DataError(f"{archive}: neither a zip nor a tar archive. Unpack it and pass the folder as --src.")
    except (*_DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # not the archive: bzip2's errors have no number
        raise DataError(f"{archive}: the archive is damaged or incomplete ({error}). Download it again.") from None


class _Extraction:
    """Targets of an archive's entries, checked against the limits on their number and size."""

    def __init__(
        self,
        archive: Path,
        folder: Path,
        limits: UnpackLimits,
        place: Callable[[str], str | None],
        known: Mapping[str, Path],
    ) -> None:
        self.archive = archive
        self.folder = folder
        self._place = place
        self._known = known
        self.known = frozenset(known.values())
        self._taken: set[Path] = set()
        self._limits = limits
        self._most_bytes = max(limits.ratio * archive.stat().st_size, float(limits.ratio_free_bytes))
        self._bytes = 0
        self._files = 0

    def target(self, name: str) -> Path | None:
        """File to write for an entry; None if it is left out."""
        placed = self._place(_inside(self.archive, name).as_posix())
        if placed is None:
            return None
        target = self._known.get(placed) or self.folder / _inside(self.archive, placed)
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


def _unpack_zip(archive: Path, extraction: _Extraction, progress: Callable[[int, int], None]) -> None:
    with zipfile.ZipFile(archive) as file:
        entries = [entry for entry in file.infolist() if not entry.is_dir()]
        wanted = []
        # check all entries before the first byte is written
        for entry in entries:
            extraction.take_file()
            mode = entry.external_attr >> 16
            if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                raise DataError(f"{archive}: {entry.filename!r} is a link or a device, refused.")
            target = extraction.target(entry.filename)
            if target is None:
                continue
            if entry.flag_bits & 1:
                raise DataError(f"{archive}: {entry.filename!r} is encrypted. Unpack it and pass the folder as --src.")
            wanted.append((entry, target))
        require_free_disk(extraction.folder, sum(entry.file_size for entry, target in wanted if not target.exists()))
        for done, (entry, target) in enumerate(wanted, start=1):
            with file.open(entry) as content:
                _write(content, target, entry.file_size, extraction)
            progress(done, len(wanted))


def _unpack_tar(archive: Path, extraction: _Extraction, progress: Callable[[int, int], None]) -> None:
    with tarfile.open(archive, "r:*") as file:
        for done, member in enumerate(file, start=1):
            if member.isdir():
                _inside(archive, member.name)
                continue
            target = extraction.target(member.name)
            if not member.isreg():
                raise DataError(f"{archive}: {member.name!r} is a link or a device, refused.")
            extraction.take_file()
            content = file.extractfile(member)
            if target is None or content is None:
                continue
            require_free_disk(extraction.folder, member.size)
            _write(content, target, member.size, extraction)
            progress(done, 0)


def _inside(archive: Path, name: str) -> PurePosixPath:
    """The entry's path; raises `DataError` if it would leave the folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    drive = path.parts and path.parts[0].endswith(":")
    if path.is_absolute() or ".." in path.parts or drive or "\0" in name:
        raise DataError(f"{archive}: the entry {name!r} points outside the archive, refused.")
    return path


def _write(content: IO[bytes], target: Path, size: int, extraction: _Extraction) -> None:
    if target in extraction.known:
        # GDAL may have changed side files since they were unpacked
        if not target.name.endswith(SIDECARS) and not _holds(target, content, size):
            raise DataError(
                f"{target} differs from the file of this name in {extraction.archive}. Remove one of them, or pass "
                "the right one as --src."
            )
        return
    if target.is_file() and target.stat().st_size == size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    with partial.open("wb") as file:
        while block := content.read(_BLOCK):
            extraction.take_bytes(len(block))
            file.write(block)
    partial.replace(target)


def _holds(path: Path, content: IO[bytes], size: int) -> bool:
    if path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        while block := content.read(_BLOCK):
            if file.read(len(block)) != block:
                return False
    return True
