"""Experiment trackers, optional packages behind the recorder: `trainer.log: [tensorboard, wandb]`."""

import importlib.util
from collections.abc import Iterator
from typing import Any

from rsseg.errors import UsageError
from rsseg.recipe import Recipe
from rsseg.runs import RunFolder
from rsseg.training.plan import TrainPlan
from rsseg.training.progress import EvaluationReport, Progress, StepReport, TrainResult


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
        tracker = TensorBoard(run, start_step) if name == "tensorboard" else WandB(run, recipe, start_step)
        listener = _Tee(tracker, listener)
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


class TensorBoard(Progress):
    """Event files in `RUN/tensorboard`; show them with `tensorboard --logdir runs`."""

    def __init__(self, run: RunFolder, start_step: int) -> None:
        """Open a writer; values of steps that a resumed run repeats are hidden."""
        from torch.utils.tensorboard.writer import SummaryWriter

        purge = start_step + 1 if start_step else None
        self._writer: Any = SummaryWriter(str(run.path / "tensorboard"), purge_step=purge)

    def on_start(self, plan: TrainPlan) -> None:
        """Write the plan as text."""
        self._writer.add_text("plan", f"```\n{plan.text()}\n```", plan.start_step)

    def on_step(self, report: StepReport) -> None:
        """Write losses, rates and speed."""
        self._write(step_values(report), report.step)

    def on_evaluation(self, report: EvaluationReport) -> None:
        """Write the scores."""
        self._write(evaluation_values(report), report.step)

    def on_end(self, result: TrainResult) -> None:  # noqa: ARG002
        """Close the file."""
        self._writer.close()

    def on_error(self, error: BaseException) -> None:  # noqa: ARG002
        """Close the file."""
        self._writer.close()

    def _write(self, values: Iterator[tuple[str, float]], step: int) -> None:
        for name, value in values:
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


class WandB(Progress):
    """A run of Weights & Biases; its own environment variables choose project, mode and server."""

    def __init__(self, run: RunFolder, recipe: Recipe, start_step: int) -> None:
        """Start the run, named after the run folder; a resumed one continues under the same id."""
        import wandb

        self._run: Any = wandb.init(
            dir=str(run.path),
            id=run.path.name,
            name=run.path.name,
            config=recipe.model_dump(mode="json"),
            resume="allow" if start_step else None,
        )

    def on_step(self, report: StepReport) -> None:
        """Log losses, rates and speed."""
        self._run.log(dict(step_values(report)), step=report.step)

    def on_evaluation(self, report: EvaluationReport) -> None:
        """Log the scores."""
        self._run.log(dict(evaluation_values(report)), step=report.step)

    def on_end(self, result: TrainResult) -> None:
        """Add the best score and finish."""
        self._run.summary.update({"best_score": result.best_score, "best_step": result.best_step})
        self._run.finish(exit_code=0 if result.state == "finished" else 1)

    def on_error(self, error: BaseException) -> None:  # noqa: ARG002
        """Finish as failed."""
        self._run.finish(exit_code=1)


class _Tee(Progress):
    """Reports to one listener, then to another."""

    def __init__(self, first: Progress, second: Progress) -> None:
        self._both = first, second

    def on_start(self, plan: TrainPlan) -> None:
        for one in self._both:
            one.on_start(plan)

    def on_step(self, report: StepReport) -> None:
        for one in self._both:
            one.on_step(report)

    def on_evaluation(self, report: EvaluationReport) -> None:
        for one in self._both:
            one.on_evaluation(report)

    def on_message(self, text: str) -> None:
        for one in self._both:
            one.on_message(text)

    def on_end(self, result: TrainResult) -> None:
        for one in self._both:
            one.on_end(result)

    def on_error(self, error: BaseException) -> None:
        for one in self._both:
            one.on_error(error)
