"""A folder that appears only when it is complete."""

import errno
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rsseg.data.index import INDEX_NAME
from rsseg.errors import DataError, MachineError

REQUEST_NAME = "prepared.json"
"""Beside the index: what was asked for, so that asking again costs nothing."""
JOURNAL = ".done"
"""Below the stage: results of finished parts."""


@contextmanager
def staged_folder(out: Path, request: Mapping[str, Any], *, overwrite: bool) -> Iterator[Path]:
    """Give a folder `NAME.partial` beside `out`; rename it to `out` when the block ends.

    When the block is interrupted, or the process killed, the folder stays, and the same request goes on in it. It is
    removed when the block fails because of the data, and when another request comes.

    Raises:
        DataError: `out` is not empty and `overwrite` is False, or what is there is not a prepared dataset.
        MachineError: the place cannot be written, or the disk is full.
    """
    _check_free(out, overwrite=overwrite)
    stage = partial_folder(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if not holds_request(stage, request):
            shutil.rmtree(stage, ignore_errors=True)
            stage.mkdir()
            (stage / REQUEST_NAME).write_text(json.dumps(request, indent=1), encoding="utf-8")
        yield stage
        _replace(out, stage)
    except DataError:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise MachineError(f"{error.filename or out}: no permission. Pass an --out that may be written.") from None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(
                f"{out}: the disk is full. Free some space and say the same again to go on, or pass --out elsewhere."
            ) from None
        raise


def partial_folder(out: Path) -> Path:
    """Where an unfinished dataset lies."""
    return out.parent / f"{out.name}.partial"


def holds_request(folder: Path, request: Mapping[str, Any]) -> bool:
    """Whether a folder was made, or begun, for a request."""
    try:
        return bool(json.loads((folder / REQUEST_NAME).read_text(encoding="utf-8")) == request)
    except (OSError, ValueError):
        return False


class Journal:
    """Which parts of a long work are done, with their results, kept below the stage."""

    def __init__(self, stage: Path) -> None:
        """Use the stage's folder."""
        self._folder = stage / JOURNAL
        self._folder.mkdir(exist_ok=True)

    def get(self, number: int) -> Any | None:
        """The result of a part, or None."""
        try:
            return json.loads((self._folder / str(number)).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def put(self, number: int, result: Any) -> None:
        """Remember a part's result, which JSON can hold."""
        partial = self._folder / f"{number}.partial"
        partial.write_text(json.dumps(result), encoding="utf-8")
        partial.replace(self._folder / str(number))


def _check_free(out: Path, *, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise DataError(f"{out} exists already. Pass --overwrite to replace it, or another --out.")
    # --overwrite deletes, so it must not take a mistyped folder of other things
    if not (out / INDEX_NAME).is_file():
        raise DataError(f"{out} is not a prepared dataset, so it is not replaced. Pass another --out.")


def _replace(out: Path, stage: Path) -> None:
    """Put `stage` in the place of `out`; what was there goes only after the new folder stands."""
    if not out.exists():
        stage.rename(out)
        return
    old = stage.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    stage.rename(out)
    shutil.rmtree(old)


def require_free_disk(folder: Path, needed: int) -> None:
    """Raise `MachineError` unless the disk that holds `folder` has `needed` bytes to spare."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MachineError(
            f"{folder}: {free / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB needed. "
            "Free some space, or pass --out on another disk."
        )
