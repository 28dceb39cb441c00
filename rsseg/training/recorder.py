"""The files that a run writes while it goes on: tables, matrices, log and events."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from rsseg.errors import RssegError
from rsseg.files import append_line, append_row, keep_rows_until, write_json
from rsseg.metrics import Scores, scores
from rsseg.training.progress import evaluation_line, step_line
from rsseg.training.results import EvaluationReport, StepReport, TrainPlan, TrainResult


class Recorder:
    """A listener that writes into a run folder; the files are complete up to the last call, also after a crash."""

    def __init__(self, folder: Path, *, class_names: tuple[str, ...], ignore_classes: tuple[str, ...]) -> None:
        self._folder = folder
        self._class_names = class_names
        self._ignore_classes = ignore_classes

    def forget_after(self, step: int) -> None:
        """Drop the rows of steps that a resumed run does again."""
        for name in ("steps.csv", "metrics.csv"):
            keep_rows_until(self._folder / name, step)
        for file in (self._folder / "confusion").glob("val-*.json"):
            if int(file.stem.removeprefix("val-")) > step:
                file.unlink()

    def scores_at(self, step: int | None) -> Scores | None:
        """The scores of the evaluation at a step, from its saved matrix."""
        file = self._confusion(step or 0)
        if not file.is_file():
            return None
        return scores(json.loads(file.read_text())["counts"], self._class_names, ignore=self._ignore_classes)

    def on_start(self, plan: TrainPlan) -> None:
        """Log the plan."""
        self._log(plan.text())
        self._event("start", plan.model_dump(mode="json"))

    def on_step(self, report: StepReport) -> None:
        """One row of steps.csv."""
        self._log(step_line(report))
        row: dict[str, Any] = {"step": report.step, "loss": report.loss}
        row |= {f"loss_{name}": value for name, value in report.losses.items()}
        row |= {f"log_{name}": value for name, value in report.logs.items()}
        row |= {f"lr_{name}": value for name, value in report.learning_rates.items()}
        row |= {"images_per_s": round(report.images_per_s, 3), "memory_mb": round(report.memory_mb, 1)}
        append_row(self._folder / "steps.csv", row)

    def on_evaluation(self, report: EvaluationReport) -> None:
        """One row of metrics.csv and one matrix."""
        self._log(evaluation_line(report))
        result = report.scores
        row: dict[str, Any] = {"step": report.step}
        row |= {name: getattr(result, name) for name in ("miou", "mf1", "oa", "macc", "mprecision", "kappa")}
        row |= dict(result.variants)
        row |= {f"iou_{c.name}": c.iou for c in result.classes} | {f"f1_{c.name}": c.f1 for c in result.classes}
        if report.entropy is not None:
            row["entropy"] = report.entropy
        row |= {"pixels": result.pixels, "absent": result.absent, "images": report.images}
        row |= {"seconds": round(report.seconds, 3), "improved": int(report.improved)}
        append_row(self._folder / "metrics.csv", row)
        values = {"step": report.step, "split": "val", "classes": self._class_names, "counts": report.counts}
        write_json(self._confusion(report.step), values | {"ignored": self._ignore_classes})
        self._event("evaluation", row)

    def on_message(self, text: str) -> None:
        """One line of the log."""
        self._log(text)
        self._event("message", {"text": text})

    def on_end(self, result: TrainResult) -> None:
        """Log the result."""
        self._log(result.text())
        self._event("end", {"state": result.state, "reason": result.reason, "steps": result.steps})

    def on_error(self, error: BaseException) -> None:
        """Log why the run ended early."""
        text = str(error) if isinstance(error, RssegError) else repr(error)
        self._log(text)
        self._event("error", {"text": text})

    def _confusion(self, step: int) -> Path:
        return self._folder / "confusion" / f"val-{step:08d}.json"

    def _log(self, text: str) -> None:
        append_line(self._folder / "log.txt", f"{_now()} {text}")

    def _event(self, kind: str, values: dict[str, Any]) -> None:
        append_line(self._folder / "events.jsonl", json.dumps({"time": _now(), "event": kind, **values}))


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
