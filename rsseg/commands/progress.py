"""Progress on stderr: one updating line on a terminal, one plain line per interval elsewhere."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rsseg.commands.console import print_note, stderr

Advance = Callable[[int, int], None]
"""Called with how many of how many are done."""

PLAIN_INTERVAL_S = 10.0


def is_live() -> bool:
    """True where an updating line can be shown."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


@contextmanager
def bar(title: str) -> Iterator[Advance]:
    """A progress bar for work of known length; the total may be told with any call."""
    if not is_live():
        yield _plain_advance(title)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr(), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def stage_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar whose title changes with the stage of the work."""
    if not is_live():
        shown: dict[str, Advance] = {}
        yield lambda stage, done, total: shown.setdefault(stage, _plain_advance(stage))(done, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr(), transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda stage, done, total: progress.update(task, description=stage, completed=done, total=total)


def _plain_advance(title: str) -> Advance:
    last = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PLAIN_INTERVAL_S:
            last = now
            print_note(f"{title}: {done}/{total}")

    return advance
