"""Progress of loops on stderr: rich on a terminal, elsewhere a line of tqdm per interval."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tqdm import tqdm

from rsseg.commands.console import is_live, print_note, stderr

INTERVAL_S = 10.0


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Progress of one loop; the yielded function is called with (done, total), before the first item with 0."""
    with stage_bar() as advance:
        # Off a terminal, a loop of one item would be a line without information.
        yield lambda done, total: advance(title, done, total) if total != 1 or is_live() else None


@contextmanager
def stage_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Progress of several loops in turn; the yielded function is called with (title, done, total).

    A loop of at most one item is a message: off a terminal its title is printed once, without counts.
    """
    if not is_live():
        yield _Lines().advance
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr(), transient=True) as progress:
        task = progress.add_task("", total=None, visible=False)
        yield lambda title, done, total: progress.update(
            task, description=title, completed=done, total=total or None, visible=True
        )


class _Lines:
    """One tqdm counter per title."""

    def __init__(self) -> None:
        self._counters: dict[str, _LineCounter] = {}

    def advance(self, title: str, done: int, total: int) -> None:
        """Count; a line is printed once per interval."""
        if title not in self._counters:
            if total == 1:
                print_note(title)
            counts = "{n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left" if total else "{n_fmt}, {rate_fmt}"
            self._counters[title] = _LineCounter(
                desc=title,
                initial=done,
                mininterval=INTERVAL_S,
                delay=INTERVAL_S,
                miniters=1,
                bar_format=f"{{desc}}: {counts}",
            )
        counter = self._counters[title]
        counter.total = total or None
        counter.update(done - counter.n)


class _LineCounter(tqdm):  # type: ignore[type-arg]
    """tqdm for log files: prints whole lines and starts no thread."""

    monitor_interval = 0

    def display(self, msg: str | None = None, pos: int | None = None) -> None:  # noqa: ARG002
        """Print the counts."""
        print_note(msg or str(self))

    def close(self) -> None:
        """Print no last line."""
        self.disable = True
