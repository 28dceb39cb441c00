"""Progress on stderr: one updating line on a terminal, one plain line per interval elsewhere."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rsseg.commands.console import print_note, stderr

if TYPE_CHECKING:
    from rsseg.training.progress import Progress as TrainingProgress
    from rsseg.training.results import EvaluationReport, StepReport, TrainPlan, TrainResult

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


def training_progress() -> "TrainingProgress":
    """What `rsseg train` shows: an updating line and a permanent row per evaluation, or plain lines."""
    from rsseg.training.progress import LineProgress

    return LiveTraining() if is_live() else LineProgress()


class LiveTraining:
    """One updating line; evaluations and messages scroll by above it."""

    def __init__(self) -> None:
        columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns, console=stderr(), transient=True)
        self._task = self._progress.add_task("starting", total=None)

    def on_start(self, plan: "TrainPlan") -> None:
        """Print the plan and start the line."""
        print_note(plan.text())
        self._progress.start()
        self._progress.update(self._task, completed=plan.start_step, total=plan.steps)

    def on_step(self, report: "StepReport") -> None:
        """Update the line."""
        from rsseg.training.progress import duration

        text = f"loss {report.loss:.4g}  {report.images_per_s:.1f} images/s  {duration(report.eta_s)} left"
        self._progress.update(self._task, completed=report.step, description=text)

    def on_evaluation(self, report: "EvaluationReport") -> None:
        """Print a row."""
        from rsseg.training.progress import evaluation_line

        self.on_message(evaluation_line(report))

    def on_message(self, text: str) -> None:
        """Print it above the line."""
        self._progress.console.print(text, markup=False, soft_wrap=True)

    def on_end(self, result: "TrainResult") -> None:  # noqa: ARG002 - the result is the caller's to print
        """Take the line away."""
        self._progress.stop()

    def close(self) -> None:
        """Take the line away, also after an error."""
        self._progress.stop()


def _plain_advance(title: str) -> Advance:
    last = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PLAIN_INTERVAL_S:
            last = now
            print_note(f"{title}: {done}/{total}")

    return advance
