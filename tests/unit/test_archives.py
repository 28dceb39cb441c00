"""Archives that must not be trusted."""

import io
import random
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from rsseg.datasets.prepare.archives import UnpackLimits, is_archive, unpack
from rsseg.errors import DataError

ESCAPES = ("../a.txt", "x/../../a.txt", "/tmp/a.txt", "..\\a.txt", "C:/a.txt")


def make_zip(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return path


def make_tar(path: Path, entries: dict[str, bytes]) -> Path:
    mode = {".gz": "w:gz", ".xz": "w:xz"}.get(path.suffix, "w")
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for name, content in entries.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def unpacked(archive: Path, folder: Path, limits: UnpackLimits | None = None) -> dict[str, bytes]:
    folder.mkdir()
    unpack(archive, folder, lambda done, total: None, limits)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tar.xz"])
def test_every_kind_gives_back_its_files(tmp_path: Path, name: str) -> None:
    entries = {"x/é [1].png": b"one", "y.txt": b"two"}
    archive = (make_zip if name.endswith("zip") else make_tar)(tmp_path / name, entries)
    assert is_archive(archive)
    assert unpacked(archive, tmp_path / "out") == entries


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_paths_that_leave_the_folder_are_refused(tmp_path: Path, name: str, make: object) -> None:
    assert callable(make)
    archive = make(tmp_path / "evil", {name: b"x"})
    with pytest.raises(DataError, match="points outside"):
        unpacked(archive, tmp_path / "out")
    assert not any((tmp_path / "out").rglob("*"))
    assert not (tmp_path / "a.txt").exists()


def test_links_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    with pytest.raises(DataError, match="link or a device"):
        unpacked(tmp_path / "a.tar", tmp_path / "out1")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
        entry = zipfile.ZipInfo("link")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        zipped.writestr(entry, "/etc/passwd")
    with pytest.raises(DataError, match="link or a device"):
        unpacked(tmp_path / "a.zip", tmp_path / "out2")


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_bombs_are_refused_by_size_and_by_count(tmp_path: Path, make: object) -> None:
    assert callable(make)
    big = make(tmp_path / "big.gz", {"zeros": bytes(1 << 20)})
    with pytest.raises(DataError, match="decompression bomb"):
        unpacked(big, tmp_path / "out1", UnpackLimits(ratio=20, ratio_free_bytes=1000))
    many = make(tmp_path / "many", {str(i): b"" for i in range(11)})
    with pytest.raises(DataError, match="more than 10 files"):
        unpacked(many, tmp_path / "out2", UnpackLimits(files=10))


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_damaged_blocks_of_bzip2_are_an_error(tmp_path: Path, kind: str) -> None:
    """Python reports them as an `OSError`, as it does a full disk."""
    archive, content = tmp_path / f"a.{kind}", random.Random(0).randbytes(1 << 20)
    if kind == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_BZIP2) as file:
            file.writestr("a", content)
    else:
        with tarfile.open(archive, "w:bz2") as tar:
            member = tarfile.TarInfo("a")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    data = bytearray(archive.read_bytes())
    data[-2000:-1000] = bytes(1000)
    archive.write_bytes(data)
    with pytest.raises(DataError, match="the archive is damaged"):
        unpacked(archive, tmp_path / "out")


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tar.xz"])
def test_an_archive_that_ends_early_is_an_error(tmp_path: Path, name: str) -> None:
    content = {f"{i}.bin": bytes(range(256)) * 200 for i in range(4)}
    archive = (make_zip if name.endswith("zip") else make_tar)(tmp_path / name, content)
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(DataError, match=r"damaged|neither a zip"):
        unpacked(archive, tmp_path / "out")


def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("a", "1")
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("a", "2")
    with pytest.raises(DataError, match="two entries"):
        unpacked(tmp_path / "a.zip", tmp_path / "out")
