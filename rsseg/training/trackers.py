"""Experiment trackers, optional packages behind the recorder: `trainer.log: [tensorboard, wandb]`."""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
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
