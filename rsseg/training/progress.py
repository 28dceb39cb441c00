"""Listening to a run: the interface, plain lines, and several listeners at once."""

import sys
import time
from collections.abc import Sequence
from typing import Protocol, TextIO

from rsseg.training.results import EvaluationReport, StepReport, TrainPlan, TrainResult

INTERVAL_S = 10.0


class Progress(Protocol):
    """Is told what happens in a run; only the main process talks."""

    def on_start(self, plan: TrainPlan) -> None:
        """Before the first step."""

    def on_step(self, report: StepReport) -> None:
        """Every `trainer.log_every` steps, and after the last."""

    def on_evaluation(self, report: EvaluationReport) -> None:
        """After each evaluation on the validation split."""

    def on_message(self, text: str) -> None:
        """Something worth knowing."""

    def on_end(self, result: TrainResult) -> None:
        """After the last file was written."""


class Silent:
    """Listens and says nothing."""

    def on_start(self, plan: TrainPlan) -> None:
        """Ignore."""

    def on_step(self, report: StepReport) -> None:
        """Ignore."""

    def on_evaluation(self, report: EvaluationReport) -> None:
        """Ignore."""

    def on_message(self, text: str) -> None:
        """Ignore."""

    def on_end(self, result: TrainResult) -> None:
        """Ignore."""


class LineProgress:
    """Plain lines: one for steps per interval, one for each evaluation and message."""

    def __init__(self, stream: TextIO | None = None, *, interval_s: float = INTERVAL_S) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._interval_s = interval_s
        self._last = float("-inf")

    def on_start(self, plan: TrainPlan) -> None:
        """Print the plan."""
        self._print(plan.text())

    def on_step(self, report: StepReport) -> None:
        """Print a line if the last one is an interval ago, and at the end."""
        now = time.monotonic()
        if now - self._last >= self._interval_s or report.step == report.total:
            self._last = now
            self._print(step_line(report))

    def on_evaluation(self, report: EvaluationReport) -> None:
        """Print the scores."""
        self._print(evaluation_line(report))

    def on_message(self, text: str) -> None:
        """Print it."""
        self._print(text)

    def on_end(self, result: TrainResult) -> None:
        """Print nothing: the result is the caller's to print."""

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class Together:
    """Passes everything on to several listeners."""

    def __init__(self, listeners: Sequence[Progress]) -> None:
        self._listeners = tuple(listeners)

    def on_start(self, plan: TrainPlan) -> None:
        """Pass on."""
        for listener in self._listeners:
            listener.on_start(plan)

    def on_step(self, report: StepReport) -> None:
        """Pass on."""
        for listener in self._listeners:
            listener.on_step(report)

    def on_evaluation(self, report: EvaluationReport) -> None:
        """Pass on."""
        for listener in self._listeners:
            listener.on_evaluation(report)

    def on_message(self, text: str) -> None:
        """Pass on."""
        for listener in self._listeners:
            listener.on_message(text)

    def on_end(self, result: TrainResult) -> None:
        """Pass on."""
        for listener in self._listeners:
            listener.on_end(result)


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
    star = "  (best)" if report.improved else ""
    return f"step {report.step}/{report.total}  validation of {report.images} images: {values}{star}"


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
