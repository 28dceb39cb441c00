"""Reports of a run, the interface of its listeners, and plain text lines."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from rsseg.evaluation.result import Evaluation
from rsseg.fields import Result
from rsseg.metrics import Scores
from rsseg.runs import ExitState
from rsseg.text import duration
from rsseg.training.plan import TrainPlan

INTERVAL_S = 10.0


class StepReport(Result):
    """Mean losses, rates and speed since the previous report."""

    step: int
    """Optimizer steps done."""
    total: int
    losses: Mapping[str, float]
    """As weighted by the method; `loss` is their sum."""
    loss: float
    logs: Mapping[str, float]
    learning_rates: Mapping[str, float]
    """Optimizer -> rate of the last step."""
    images_per_s: float
    memory_mb: float
    eta_s: float


class EvaluationReport(Evaluation):
    """One evaluation on the validation split."""

    step: int
    total: int
    score: float | None
    """The monitored score."""
    best: float | None
    """Best score up to and including this one."""
    improved: bool


class TrainResult(Result):
    """How a run ended."""

    run: Path
    state: ExitState
    reason: str
    """`all steps`, `patience`, `max_hours` or a signal."""
    steps: int
    """Optimizer steps done."""
    total: int
    """Optimizer steps of the recipe."""
    monitor: str
    best_score: float | None
    best_step: int | None
    scores: Scores | None
    """Validation scores of the shipped weights, if they were evaluated."""
    model: Path
    seconds: float
    calibration: str = ""
    """Temperatures, calibration errors and images of the fit, in words; empty without labeled validation images."""
    next_command: str

    def text(self) -> str:
        """Score, calibration, model file and next command."""
        best = "no validation score" if self.best_score is None else f"best {self.monitor} {self.best_score:.4f}"
        calibration = f"{self.calibration}\n" if self.calibration else ""
        at = "" if self.best_step is None else f" at step {self.best_step}"
        if self.state == "stopped":
            end = (
                f"stopped at the limit of trainer.max_hours after step {self.steps} of {self.total}; the run is saved, "
                "and the command below continues it"
            )
        else:
            end = f"{self.reason}, {self.steps} steps"
        return f"{best}{at} ({end})\n{calibration}{self.model}\n{self.next_command}"


class Progress:
    """Listener to a run. This one does nothing; only the main process calls it."""

    def on_start(self, plan: TrainPlan) -> None:
        """Before the first step."""

    def on_step(self, report: StepReport) -> None:
        """Every `trainer.log_every` steps, and after the last."""

    def on_evaluation(self, report: EvaluationReport) -> None:
        """After each evaluation on the validation split."""

    def on_message(self, text: str) -> None:
        """A warning or note."""

    def on_end(self, result: TrainResult) -> None:
        """After the last file was written."""

    def on_error(self, error: BaseException) -> None:
        """The run ends early."""


class LineProgress(Progress):
    """Plain lines: steps at most once per interval, every evaluation and message."""

    def __init__(self, stream: TextIO | None = None, *, interval_s: float = INTERVAL_S) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._interval_s = interval_s
        self._last = float("-inf")

    def on_start(self, plan: TrainPlan) -> None:
        """Print the plan."""
        self.on_message(plan.text())

    def on_step(self, report: StepReport) -> None:
        """Print a line once per interval, and at the end."""
        now = time.monotonic()
        if now - self._last >= self._interval_s or report.step == report.total:
            self._last = now
            self.on_message(step_line(report))

    def on_evaluation(self, report: EvaluationReport) -> None:
        """Print the scores."""
        self.on_message(evaluation_line(report))

    def on_message(self, text: str) -> None:
        """Print it."""
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Restore the terminal; call it also after an error."""


class LiveProgress(LineProgress):
    """One updating line on a terminal, with evaluations and messages above it."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._bar = Bar(*columns, console=console, transient=True)
        self._task = self._bar.add_task("starting", total=None)

    def on_start(self, plan: TrainPlan) -> None:
        """Print the plan and show the line."""
        super().on_start(plan)
        self._bar.start()
        self._bar.update(self._task, completed=plan.start_step, total=plan.steps)

    def on_step(self, report: StepReport) -> None:
        """Update the line."""
        text = f"loss {report.loss:.4g}  {report.images_per_s:.1f} images/s  {duration(report.eta_s)} left"
        self._bar.update(self._task, completed=report.step, description=text)

    def on_message(self, text: str) -> None:
        """Print it above the line."""
        self._bar.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Remove the line, also after an error."""
        self._bar.stop()


def step_line(report: StepReport) -> str:
    """One line of losses, rates, speed and remaining time."""
    parts = " ".join(f"{name} {value:.4g}" for name, value in report.losses.items())
    rates = " ".join(f"lr {rate:.3g}" for rate in dict.fromkeys(report.learning_rates.values()))
    return (
        f"step {report.step}/{report.total}  loss {report.loss:.4g} ({parts})  {rates}  "
        f"{report.images_per_s:.1f} images/s  {report.memory_mb:.0f} MB  {duration(report.eta_s)} left"
    )


def evaluation_line(report: EvaluationReport) -> str:
    """One line of scores."""
    named = [("mIoU", report.scores.miou), ("mF1", report.scores.mf1), ("OA", report.scores.oa)]
    if report.entropy is not None:
        named = [("entropy", report.entropy)]
    values = "  ".join(f"{name} {'-' if value is None else f'{value:.4f}'}" for name, value in named)
    best = "  (best)" if report.improved and report.score is not None else ""
    return f"step {report.step}/{report.total}  validation of {report.images} images: {values}{best}"
