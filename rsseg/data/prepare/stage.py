"""A folder that appears only when it is complete."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rsseg.data.index import INDEX_NAME
from rsseg.errors import DataError, MachineError


@contextmanager
def staged_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a new folder beside `out`; rename it to `out` when the block ends, remove it when the block fails.

    A process that is killed leaves at most `.NAME.partial` beside `out`, which the next one removes.

    Raises:
        DataError: `out` is not empty and `overwrite` is False, or what is there is not a prepared dataset.
        MachineError: the place cannot be written, or the disk is full.
    """
    _check_free(out, overwrite=overwrite)
    stage = out.parent / f".{out.name}.partial"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if stage.exists():
            shutil.rmtree(stage)
        stage.mkdir()
        yield stage
        _replace(out, stage)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise MachineError(f"{error.filename or out}: no permission. Pass an --out that may be written.") from None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(f"{out}: the disk is full. Free some space, or pass --out on another disk.") from None
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


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
