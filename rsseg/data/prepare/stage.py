"""A folder that appears only when it is complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rsseg.errors import DataError, MachineError


@contextmanager
def staged_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a new folder beside `out`; rename it to `out` when the block ends, remove it when the block fails.

    A process that is killed leaves at most `.NAME.partial-PID` beside `out`, never a half-made `out`.

    Raises:
        DataError: `out` exists and is not empty, and `overwrite` is False.
    """
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists already. Pass --overwrite to replace it, or another --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = out.parent / f".{out.name}.partial-{os.getpid()}"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
        yield stage
        _replace(out, stage)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _replace(out: Path, stage: Path) -> None:
    """Put `stage` in the place of `out`; what was there goes only after the new folder stands."""
    if not out.exists():
        stage.rename(out)
        return
    old = stage.with_name(f".{out.name}.old-{os.getpid()}")
    out.rename(old)
    stage.rename(out)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink()


def require_free_disk(folder: Path, needed: int) -> None:
    """Raise `MachineError` unless the disk that holds `folder` (which need not exist) has `needed` bytes to spare."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MachineError(
            f"{folder}: {free / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB needed. "
            "Free some space, or pass --out on another disk."
        )
