"""A folder that appears only when it is complete."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rsseg.data.index import INDEX_NAME
from rsseg.errors import DataError, MachineError
from rsseg.files import output_errors

REQUEST_NAME = "prepared.json"
"""File next to the index with the request, so that a repeated request is skipped."""
JOURNAL = ".done"
"""Below the stage: results of finished steps."""


@contextmanager
def staged_folder(out: Path, request: Mapping[str, Any], *, overwrite: bool) -> Iterator[Path]:
    """Folder `NAME.partial` beside `out`, renamed to `out` when the block ends.

    The folder stays if the block is interrupted or the process killed, and the same request resumes in it. It is
    removed by a different request, and if the block fails because of the data.

    Raises:
        DataError: `out` is not empty and `overwrite` is False, or it is not a prepared dataset.
        MachineError: `out` cannot be written, or the disk is full.
    """
    stage = partial_folder(out)
    with output_errors(out):
        _check_free(out, overwrite=overwrite)
        out.parent.mkdir(parents=True, exist_ok=True)
        if not (_is_unfinished(stage) and holds_request(stage, request)):
            _clear(stage)
            stage.mkdir()
            (stage / REQUEST_NAME).write_text(json.dumps(request, indent=1), encoding="utf-8")
        try:
            yield stage
        except DataError:
            shutil.rmtree(stage, ignore_errors=True)
            raise
        _replace(out, stage)


def _clear(stage: Path) -> None:
    """Remove the stage of another request; raises `DataError` for a folder that `prepare` did not make."""
    if not stage.exists() and not stage.is_symlink():
        return
    if stage.is_symlink() or not stage.is_dir() or (any(stage.iterdir()) and not _is_unfinished(stage)):
        raise DataError(
            f"{stage}: needed as the working folder, but it exists already. Move it, or pass another --out."
        )
    shutil.rmtree(stage)


def _is_unfinished(stage: Path) -> bool:
    """Whether the folder is the stage of an interrupted call; a finished dataset may have such a name too."""
    return (stage / REQUEST_NAME).is_file() and ((stage / JOURNAL).is_dir() or not (stage / INDEX_NAME).exists())


def partial_folder(out: Path) -> Path:
    """Folder of an unfinished dataset."""
    return out.parent / f"{out.name}.partial"


def holds_request(folder: Path, request: Mapping[str, Any]) -> bool:
    """Whether a folder was made, or started, for a request."""
    try:
        return bool(json.loads((folder / REQUEST_NAME).read_text(encoding="utf-8")) == request)
    except (OSError, ValueError):
        return False


class Journal:
    """Results of finished steps, kept below the stage for resuming."""

    def __init__(self, stage: Path) -> None:
        """Use the stage's folder."""
        self._folder = stage / JOURNAL
        self._folder.mkdir(exist_ok=True)

    def get(self, number: int) -> Any | None:
        """The result of a step, or None."""
        try:
            return json.loads((self._folder / str(number)).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def put(self, number: int, result: Any) -> None:
        """Store the result of a step, as JSON."""
        partial = self._folder / f"{number}.partial"
        partial.write_text(json.dumps(result), encoding="utf-8")
        partial.replace(self._folder / str(number))


def _check_free(out: Path, *, overwrite: bool) -> None:
    if out.is_symlink():
        raise DataError(f"{out} is a link. Pass the folder that it points to, or another --out.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise DataError(f"{out} exists already. Pass --overwrite to replace it, or another --out.")
    # --overwrite deletes the folder, which must not be some other folder given by mistake
    if not (out / INDEX_NAME).is_file():
        raise DataError(f"{out} is not a prepared dataset, so it is not replaced. Pass another --out.")


def _replace(out: Path, stage: Path) -> None:
    """Rename `stage` to `out`; an old `out` is deleted only after that."""
    if not out.exists():
        stage.rename(out)
        return
    old = stage.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    stage.rename(out)
    shutil.rmtree(old)


def require_free_disk(folder: Path, needed: int) -> None:
    """Raise `MachineError` unless the disk of `folder` has `needed` free bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MachineError(
            f"{folder}: {free / 1e6:,.0f} MB free, about {needed / 1e6:,.0f} MB needed. "
            "Free some space, or pass --out on another disk."
        )
