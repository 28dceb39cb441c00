"""Finds the files of a dataset in a folder or an archive, whatever is packed in what."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from rsseg.datasets.layouts import Layout, PathPattern, list_files
from rsseg.datasets.prepare.archives import is_archive, unpack
from rsseg.errors import DataError

Progress = Callable[[str, int, int], None]
SIDECARS = (".aux.xml", ".msk")
"""Files beside an image that GDAL reads with it, named `IMAGE.suffix`."""
WORLD_FILES = (".tfw", ".TFW", ".wld", ".hdr")
"""Files beside an image that GDAL reads with it, with this suffix instead of the image's."""
_PACKED = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")
_NESTED = 3
"""Archives in archives."""


class Wanted:
    """Which files of a dataset are used at all: an archive may hold much more."""

    def __init__(self, layouts: Sequence[Layout]) -> None:
        """Of any of the layouts."""
        texts = [text for one in layouts for text in (*one.images.split("|"), one.masks, *one.beside) if text]
        self._patterns = [PathPattern(text) for text in dict.fromkeys(texts)]
        self._suffixes = sorted({PurePosixPath(text).suffix for text in texts})

    def __call__(self, name: str) -> bool:
        """Whether a file is an image, a mask, something that GDAL reads with these, or an archive."""
        if is_packed(name) or self._fits(name):
            return True
        bare = [name.removesuffix(suffix) for suffix in SIDECARS if name.endswith(suffix)]
        stem, dot, suffix = name.rpartition(".")
        if dot and f".{suffix}" in WORLD_FILES:
            bare += [f"{stem}{suffix}" for suffix in self._suffixes]
        return any(self._fits(candidate) for candidate in bare)

    def _fits(self, name: str) -> bool:
        return any(pattern.prefixes([name]) for pattern in self._patterns)


def is_packed(name: str) -> bool:
    """Whether a file is an archive by its name."""
    return name.lower().endswith(_PACKED)


def gather(
    source: Path,
    unpacked: Path,
    layouts: Sequence[Layout],
    checksums: Mapping[str, str],
    progress: Progress,
) -> dict[str, Path]:
    """All files that a layout may use, by a relative name with `/`.

    Args:
        source: a folder, with archives in it or not, or an archive.
        unpacked: folder for what comes out of archives; may hold the result of an earlier call.
        layouts: what is looked for; other files stay packed.
        checksums: MD5 of the publisher's archives by name; a difference is told, since one may have packed it anew.
        progress: told what is unpacked.

    Raises:
        DataError: an archive that is dangerous or damaged.
        MachineError: the disk is too small.
    """
    wanted = Wanted(layouts)
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
            _check_sum(archive, checksums, progress)
            for member in _unpack(name, archive, unpacked, wanted, files, progress):
                (inner if is_packed(member) else files)[member] = unpacked / member
        archives = inner
        if not archives:
            return files
    raise DataError(f"{source}: archives are packed more than {_NESTED} deep. Unpack {next(iter(archives))} yourself.")


def _unpack(
    name: str, archive: Path, folder: Path, wanted: Wanted, known: Mapping[str, Path], progress: Progress
) -> Iterable[str]:
    """Unpack what is wanted and not there yet; returns the names."""
    above, _, base = name.rpartition("/")
    stem = base
    while is_packed(stem) or stem.lower().endswith(".tar"):
        stem = stem.rpartition(".")[0]
    taken: list[str] = []

    def place(entry: str) -> str | None:
        # most archives hold one folder of their own name; the others get one
        parts = [part for part in (above, stem if entry.split("/")[0] != stem else "", entry) if part]
        placed = "/".join(parts)
        hidden = any(part.startswith((".", "__MACOSX")) for part in entry.split("/"))
        if hidden or placed in known or not wanted(placed):
            return None
        taken.append(placed)
        return placed

    folder.mkdir(parents=True, exist_ok=True)
    unpack(archive, folder, lambda done, total: progress(f"unpack {base}", done, total), place=place)
    return sorted(taken)


def _check_sum(archive: Path, checksums: Mapping[str, str], progress: Progress) -> None:
    expected = checksums.get(archive.name)
    if expected is None:
        return
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != expected:
        progress(f"{archive.name} is not the publisher's file: MD5 {found}, expected {expected}", 1, 1)
