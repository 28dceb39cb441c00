"""Files written atomically, logs and tables, checks of outputs, names of temporary files."""

import csv
import errno
import hashlib
import io
import json
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rsseg.errors import DataError, MachineError, UsageError

_LONG_NAME = 240
"""Maximum bytes of a file name, which leave room for the suffix of a temporary name."""


@contextmanager
def writing(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Turn an `OSError`, or another of `errors`, into a `MachineError` that names the file."""
    kinds: tuple[type[Exception], ...] = (OSError, *errors)
    try:
        yield
    except kinds as error:
        reason = str(error.__cause__ or error).strip().rstrip(".")
        raise MachineError(
            f"{path}: cannot be written: {reason}. Free some space or choose another --output."
        ) from None


@contextmanager
def output_errors(out: Path) -> Iterator[None]:
    """Turn file system errors while writing `out` into errors of rsseg.

    Raises:
        MachineError: it cannot be written, or the disk is full.
        UsageError: its name is too long.
        DataError: the name of a file in it is too long.
    """
    try:
        yield
    except OSError as error:
        name = error.filename or out
        if error.errno == errno.ENAMETOOLONG:
            kind = UsageError if len(os.fsencode(out.name)) > _LONG_NAME else DataError
            raise kind(f"{name}: the file name is too long. Shorten it, or pass a shorter --out.") from None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(
                f"{out}: the disk is full. Free some space and repeat the command to resume, or pass another --out."
            ) from None
        if error.errno is None:
            raise
        raise MachineError(f"{name}: {error.strerror}. Check its permissions, or pass another --out.") from None


def require_free_disk(folder: Path, needed: int) -> None:
    """Raise `MachineError` unless the disk of `folder` has `needed` free bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MachineError(
            f"{folder}: {free / 1e6:,.0f} MB free, about {needed / 1e6:,.0f} MB needed. "
            "Free some space, or pass --out on another disk."
        )


@contextmanager
def replaced(path: Path, *errors: type[Exception], ending: str = "") -> Iterator[Path]:
    """A temporary file beside `path` that replaces it if the block succeeds, else is removed; see `writing`."""
    temporary = temporary_path(path, ending)
    try:
        with writing(path, *errors):
            yield temporary
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file; raise `MachineError` if it cannot be written."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: Any) -> None:
    """Replace a JSON file; see `write_text`."""
    write_text(path, json.dumps(values, indent=1, default=str) + "\n")


def append_line(path: Path, line: str) -> None:
    """Append a line to a log; raise `MachineError` if the disk is full."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a CSV file; new columns are added to all rows."""
    columns: list[str] = []
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            columns = next(csv.reader(file), [])
    new = [name for name in row if name not in columns]
    if new:
        write_rows(path, [*read_rows(path), dict(row)], [*columns, *new])
    else:
        append_line(path, _csv_line([row.get(name, "") for name in columns]))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV file, values as text; empty without a file. A truncated last line is dropped."""
    if not is_file(path):
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def write_rows(path: Path, rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Replace a CSV file."""
    lines = [_csv_line(columns), *(_csv_line([row.get(name, "") for name in columns]) for row in rows)]
    write_text(path, "\n".join(lines) + "\n")


def keep_rows_until(path: Path, step: int) -> None:
    """Drop the rows of steps after `step`."""
    rows = read_rows(path)
    if rows:
        write_rows(path, [row for row in rows if int(row["step"]) <= step], list(rows[0]))


def _csv_line(values: Sequence[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    return line.getvalue()


def publish(source: Path, target: Path) -> None:
    """Replace `target` by `source` in one step: a hard link, or a copy where links are not possible.

    Raises:
        MachineError: neither is possible.
    """
    with replaced(target) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


PRODUCT_ENDING = "_rsseg"
"""Added to the stem of a scene for the name of its class raster."""
_LONGEST = 120
"""Bytes of an output's name that the names of its temporary files repeat; file systems allow 255 in all."""


def check_outputs(outputs: Iterable[tuple[str, Path]], inputs: Iterable[Path | str], *, overwrite: bool) -> None:
    """Raise if writing would replace an input, another output of the same call, or an existing file.

    Links are followed, and names that differ only in spelling are one file.

    Args:
        outputs: for each output the option that requests it, such as "--output", and its path.
        inputs: all files that are read, side files and the sources of a VRT included. Other names, such as URLs, are
            ignored.
        overwrite: existing files may be replaced, but never an input.

    Raises:
        UsageError: see above; or a path is a folder, is too long, or lies in no writable folder.
    """
    read = {key: str(path) for path in inputs for key in _file_keys(Path(path))}
    written: dict[object, str] = {}
    for option, path in outputs:
        exists = _exists(path)
        keys = _file_keys(path)
        if source := next((read[key] for key in keys if key in read), None):
            raise UsageError(f"{path}: {option} would replace the input {source}. Choose another {option}.")
        if other := next((written[key] for key in keys if key in written), None):
            raise UsageError(f"{path}: {option} and {other} name the same file. Choose another {option}.")
        written |= dict.fromkeys(keys, option)
        if is_folder(path):
            raise UsageError(f"{path}: {option} is a folder. Give a file name.")
        if exists and not overwrite:
            raise UsageError(f"{path}: exists already. Choose another {option}, or replace it with --overwrite.")
        folder = next(folder for folder in path.absolute().parents if _exists(folder))
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UsageError(f"{path}: cannot be written, {folder} is no writable folder. Choose another {option}.")


def content_hash(path: Path) -> bytes:
    """BLAKE2b hash of a file's content, 16 bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()


def is_file(path: Path | str) -> bool:
    """False also for a name that no file can have, such as one that is too long."""
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises


def is_folder(path: Path | str) -> bool:
    """False also for a name that no folder can have, such as one that is too long."""
    return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises


def _file_keys(path: Path) -> tuple[object, ...]:
    """Keys that two names of one file share: the resolved path and, if the file exists, its device and inode."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return (os.path.normcase(path.resolve()),)
    return os.path.normcase(path.resolve()), (status.st_dev, status.st_ino)


def _exists(path: Path) -> bool:
    """Also true for a broken link."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UsageError(f"{path}: cannot be a file: {error.strerror}. Choose another name.") from None
    return True


def hidden_path(output: Path, ending: str) -> Path:
    """A hidden file beside an output, `.NAME` plus the suffix; long names are shortened."""
    name = output.name
    if len(name.encode()) > _LONGEST:
        name = f"{name[: _LONGEST // 5]}-{hashlib.blake2b(name.encode(), digest_size=6).hexdigest()}"
    return output.with_name(f".{name}{ending}")


def temporary_path(output: Path, ending: str = "") -> Path:
    """A hidden name beside an output that identifies the process: `.NAME.HOST-PID.tmp` plus the suffix."""
    return hidden_path(output, f".{_host()}-{os.getpid()}.tmp{ending}")


def remove_leftovers(folder: Path) -> None:
    """Remove files named by `temporary_path` whose processes on this machine have ended."""
    made = re.compile(rf"\..+\.{re.escape(_host())}-(\d+)\.tmp.*")
    for path in folder.glob(".*.tmp*"):
        if (match := made.fullmatch(path.name)) and not is_running(int(match[1])):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _host() -> str:
    return socket.gethostname().partition(".")[0]


def is_running(process: int) -> bool:
    """Whether a process of this machine exists; True where the system cannot tell."""
    if os.name == "nt":  # os.kill would end the process there
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # a process of another user
        return True
    return True
