"""Listeners that record a run: the text files of its folder, and experiment trackers (`trainer.log`)."""

import importlib.util
import json
import os
import platform
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from rsseg.data.index import SegmentationIndex
from rsseg.errors import RssegError, UsageError
from rsseg.files import append_line, append_row, keep_rows_until, write_json, write_text
from rsseg.metrics import Scores, scores
from rsseg.recipe import Recipe, dump_recipe
from rsseg.runs import Manifest, RunFolder
from rsseg.training.checkpoints import versions
from rsseg.training.plan import TrainPlan
from rsseg.training.progress import EvaluationReport, Progress, StepReport, TrainResult, evaluation_line, step_line

_TRIES = 3
"""At writing why a run failed: torch reports the death of each loader process as an error at any place."""


class Recorder(Progress):
    """Writes every report into a run folder, then forwards it; after a crash the files hold all reports so far."""

    def __init__(self, run: RunFolder, recipe: Recipe, class_names: tuple[str, ...], listener: Progress) -> None:
        self._run, self._folder, self._recipe, self._listener = run, run.path, recipe, listener
        self._class_names = class_names

    def begin(
        self, plan: TrainPlan, frozen: Mapping[str, str], index: SegmentationIndex, *, source: str | None, resumed: bool
    ) -> None:
        """Write recipe, manifest and data description; a resumed run drops the rows of steps it repeats.

        Args:
            plan: what the run does.
            frozen: module of a teacher -> SHA-256 of its weights.
            index: of the training data.
            source: the recipe's text as given.
            resumed: the folder already has these files.
        """
        write_text(self._run.recipe_file, resolved_yaml(self._recipe))
        manifest = _new_manifest(self._folder.name, self._recipe, plan, frozen)
        if resumed:
            before = self._run.manifest()
            entry = f"{manifest.created} after step {plan.start_step}"
            kept = {name: getattr(before, name) for name in ("created", "steps", "best_score", "best_step")}
            manifest = manifest.model_copy(update={**kept, "resumed": (*before.resumed, entry)})
            self._drop_after(plan.start_step)
            for leftover in self._folder.rglob(".*.tmp"):  # of a killed process
                leftover.unlink(missing_ok=True)
        else:
            write_text(self._folder / "recipe.yaml", source if source is not None else dump_recipe(self._recipe))
            write_json(self._folder / "data.json", index.model_dump(mode="json", exclude={"items"}))
        self._run.write_manifest(manifest)

    def scores_at(self, step: int | None) -> Scores | None:
        """The scores of the evaluation at a step, from its saved matrix."""
        file = self._confusion(step or 0)
        if not file.is_file():
            return None
        counts = json.loads(file.read_text())["counts"]
        return scores(counts, self._class_names, ignore=self._recipe.eval.ignore_classes)

    def on_start(self, plan: TrainPlan) -> None:
        """Log the plan."""
        self._log(plan.text())
        self._event("start", plan.model_dump(mode="json"))
        self._listener.on_start(plan)

    def on_step(self, report: StepReport) -> None:
        """Add a row to steps.csv."""
        self._log(step_line(report))
        row: dict[str, Any] = {"step": report.step, "loss": report.loss}
        row |= {f"loss_{name}": value for name, value in report.losses.items()}
        row |= {f"log_{name}": value for name, value in report.logs.items()}
        row |= {f"lr_{name}": value for name, value in report.learning_rates.items()}
        row |= {"images_per_s": round(report.images_per_s, 3), "memory_mb": round(report.memory_mb, 1)}
        append_row(self._folder / "steps.csv", row)
        self._listener.on_step(report)

    def on_evaluation(self, report: EvaluationReport) -> None:
        """Add a row to metrics.csv and write the matrix."""
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
        write_json(self._confusion(report.step), values | {"ignored": self._recipe.eval.ignore_classes})
        self._event("evaluation", row)
        self._listener.on_evaluation(report)

    def on_message(self, text: str) -> None:
        """Add a line to the log."""
        self._log(text)
        self._event("message", {"text": text})
        self._listener.on_message(text)

    def on_end(self, result: TrainResult) -> None:
        """Log the result."""
        self._run.update_manifest(state=result.state, reason=result.reason, finished=now(), steps=result.steps)
        self._log(result.text())
        self._event("end", {"state": result.state, "reason": result.reason, "steps": result.steps})
        self._listener.on_end(result)

    def on_error(self, error: BaseException) -> None:
        """Log why the run ended early."""
        state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        reason = str(error) if isinstance(error, RssegError) else repr(error)
        with suppress(RssegError):  # a full disk may have caused the error, and must not hide it
            for _ in range(_TRIES):
                with suppress(RuntimeError):
                    self._run.update_manifest(state=state, reason=reason, finished=now())
                    self._log(reason)
                    self._event("error", {"text": reason})
                    break
        self._listener.on_error(error)

    def _drop_after(self, step: int) -> None:
        for name in ("steps.csv", "metrics.csv"):
            keep_rows_until(self._folder / name, step)
        for file in (self._folder / "confusion").glob("val-*.json"):
            if int(file.stem.removeprefix("val-")) > step:
                file.unlink()

    def _confusion(self, step: int) -> Path:
        return self._folder / "confusion" / f"val-{step:08d}.json"

    def _log(self, text: str) -> None:
        append_line(self._folder / "log.txt", f"{now('seconds')} {text}")

    def _event(self, kind: str, values: dict[str, Any]) -> None:
        append_line(self._folder / "events.jsonl", json.dumps({"time": now("seconds"), "event": kind, **values}))


def now(precision: str = "auto") -> str:
    """Local time with its UTC offset, ISO 8601; to the microsecond by default, so that runs sort."""
    return datetime.now().astimezone().isoformat(timespec=precision)


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every value, marked `given` (recipe, --set or flag) or `default`; it loads as a recipe."""
    return "\n".join(_lines(recipe, recipe.model_dump(mode="json"), 0)) + "\n"


def _lines(part: Any, values: Mapping[str, Any], depth: int) -> Iterator[str]:
    for key, value in values.items():
        member = getattr(part, key, None) if isinstance(part, BaseModel) else part.get(key)
        given = not isinstance(part, BaseModel) or key in part.model_fields_set
        head = f"{'  ' * depth}{_on_one_line(key)}:"
        if isinstance(value, Mapping) and value:
            yield head
            yield from _lines(member, value, depth + 1)
        else:
            yield f"{head} {_on_one_line(value)}  # {'given' if given else 'default'}"


def _on_one_line(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _new_manifest(name: str, recipe: Recipe, plan: TrainPlan, frozen: Mapping[str, str]) -> Manifest:
    return Manifest(
        name=name,
        method=recipe.method,
        recipe=recipe.name,
        created=now(),
        host=socket.gethostname(),
        pid=os.getpid(),
        command=tuple(sys.argv),
        versions=versions() | {"platform": platform.platform()},
        commit=_commit(),
        device=plan.device_name,
        seed=recipe.seed,
        monitor=recipe.trainer.monitor,
        selection=plan.selection,
        plan=plan.model_dump(mode="json"),
        used=plan.used,
        frozen=frozen,
    )


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def require_trackers(recipe: Recipe) -> None:
    """Raise `UsageError` naming the extra if the package of a tracker is missing; imports nothing."""
    for name in recipe.trainer.log:
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"trainer.log: {name} is not installed. Install it with `pip install 'rsseg[{name}]'`, or leave it out."
            )


def with_trackers(run: RunFolder, recipe: Recipe, listener: Progress, *, start_step: int) -> Progress:
    """The listener behind all trackers of the recipe.

    Args:
        run: its folder gets the trackers' files.
        recipe: of the run.
        listener: gets every report after the trackers.
        start_step: step that the run resumes after; 0 for a new one. Later reports of the same run are replaced.
    """
    for name in recipe.trainer.log:
        tensorboard = name == "tensorboard"
        listener = TensorBoard(run, listener, start_step) if tensorboard else WandB(run, recipe, listener, start_step)
    return listener


def step_values(report: StepReport) -> Iterator[tuple[str, float]]:
    """Names and values of a step."""
    yield "loss/total", report.loss
    yield from ((f"loss/{name}", value) for name, value in report.losses.items())
    yield from ((f"log/{name}", value) for name, value in report.logs.items())
    yield from ((f"lr/{name}", value) for name, value in report.learning_rates.items())
    yield from (("speed/images_per_s", report.images_per_s), ("speed/memory_mb", report.memory_mb))


def evaluation_values(report: EvaluationReport) -> Iterator[tuple[str, float]]:
    """Names and values of an evaluation; scores without a value are left out."""
    scores = report.scores
    named = {name: getattr(scores, name) for name in ("miou", "mf1", "oa", "macc", "mprecision", "kappa")}
    named |= {f"iou/{c.name}": c.iou for c in scores.classes} | {"entropy": report.entropy}
    yield from ((f"val/{name}", value) for name, value in named.items() if value is not None)


class Tracker(Progress, ABC):
    """Sends the values of every report to a tracker, then the report to a listener."""

    def __init__(self, listener: Progress) -> None:
        self._listener = listener

    @abstractmethod
    def write(self, values: Mapping[str, float], step: int) -> None:
        """Send named values."""

    @abstractmethod
    def close(self, result: TrainResult | None) -> None:
        """Finish; None after an error."""

    def on_start(self, plan: TrainPlan) -> None:
        """Forward it."""
        self._listener.on_start(plan)

    def on_step(self, report: StepReport) -> None:
        """Write losses, rates and speed."""
        self.write(dict(step_values(report)), report.step)
        self._listener.on_step(report)

    def on_evaluation(self, report: EvaluationReport) -> None:
        """Write the scores."""
        self.write(dict(evaluation_values(report)), report.step)
        self._listener.on_evaluation(report)

    def on_message(self, text: str) -> None:
        """Forward it."""
        self._listener.on_message(text)

    def on_end(self, result: TrainResult) -> None:
        """Finish."""
        self.close(result)
        self._listener.on_end(result)

    def on_error(self, error: BaseException) -> None:
        """Finish as failed."""
        self.close(None)
        self._listener.on_error(error)


class TensorBoard(Tracker):
    """Event files in `RUN/tensorboard`; show them with `tensorboard --logdir runs`."""

    def __init__(self, run: RunFolder, listener: Progress, start_step: int) -> None:
        """Open a writer; values of steps that a resumed run repeats are hidden."""
        from torch.utils.tensorboard.writer import SummaryWriter

        super().__init__(listener)
        purge = start_step + 1 if start_step else None
        self._writer: Any = SummaryWriter(str(run.path / "tensorboard"), purge_step=purge)

    def on_start(self, plan: TrainPlan) -> None:
        """Write the plan as text."""
        self._writer.add_text("plan", f"```\n{plan.text()}\n```", plan.start_step)
        super().on_start(plan)

    def write(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, result: TrainResult | None) -> None:  # noqa: ARG002
        """See `Tracker`."""
        self._writer.close()


class WandB(Tracker):
    """A run of Weights & Biases; its own environment variables choose project, mode and server."""

    def __init__(self, run: RunFolder, recipe: Recipe, listener: Progress, start_step: int) -> None:
        """Start the run, named after the run folder; a resumed one continues under the same id."""
        import wandb

        super().__init__(listener)
        self._run: Any = wandb.init(
            dir=str(run.path),
            id=run.path.name,
            name=run.path.name,
            config=recipe.model_dump(mode="json"),
            resume="allow" if start_step else None,
        )

    def write(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._run.log(values, step=step)

    def close(self, result: TrainResult | None) -> None:
        """Add the best score and finish."""
        if result is not None:
            self._run.summary.update({"best_score": result.best_score, "best_step": result.best_step})
        self._run.finish(exit_code=0 if result is not None and result.state == "finished" else 1)
