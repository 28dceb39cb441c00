"""The training loop of all methods."""

import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Protocol, cast

import torch
from torch import Tensor

from rsseg import distributed
from rsseg.config import BaseRecipe
from rsseg.data.streams import Batch
from rsseg.distributed import StopSignals
from rsseg.errors import Interrupted, RecipeError
from rsseg.evaluation.result import Evaluation
from rsseg.layers.ema import own_share
from rsseg.methods.base import Segmenter, StepOutput
from rsseg.training.checkpoints import Checkpoints, Counters, Parts
from rsseg.training.device import Hardware, prefetched, with_weights
from rsseg.training.graphs import make_step
from rsseg.training.progress import EvaluationReport, Progress, StepReport
from rsseg.training.step import BufferSnapshot, MicroStep, lr_at, set_rate

MAX_SKIPPED = 3
"""Consecutive steps with a non-finite loss after which a run ends."""


class Evaluate(Protocol):
    """Scores a network, see `rsseg.evaluation.model.evaluate`."""

    def __call__(self, segmenter: Segmenter, *, stop: Callable[[], bool]) -> Evaluation:
        """Raises `Interrupted` on all ranks once `stop` returns True on any."""


class Trainer:
    """Trains a method until its steps, patience or hours are used up, or a signal arrives."""

    def __init__(
        self,
        parts: Parts,
        recipe: BaseRecipe,
        hardware: Hardware,
        counters: Counters,
        *,
        batches_from: Callable[[int], Generator[Batch]],
        evaluate: Evaluate | None,
        checkpoints: Checkpoints,
        progress: Progress,
        signals: StopSignals,
    ) -> None:
        """Prepare a run.

        Args:
            parts: method, average and optimizers.
            recipe: schedule, precision, intervals, monitored score.
            hardware: device that `parts` live on.
            counters: first step, best score so far.
            batches_from: optimizer step -> endless micro-batches from that step on.
            evaluate: scores a network on the validation split; None without validation images.
            checkpoints: saves networks and state.
            progress: receives the reports.
            signals: a received signal ends the run after the current step.
        """
        self.recipe = recipe
        self.config = recipe.trainer
        self.hardware = hardware
        self.batches_from, self.evaluate = batches_from, evaluate
        self.checkpoints, self.progress, self.signals = checkpoints, progress, signals
        self.parts = parts
        self.counters = counters
        self.ranks = distributed.current_ranks()
        self.step = make_step(parts, recipe, hardware, progress.on_message)
        self.means = LossMeans()
        self.bad_losses: list[str] = []
        self._buffers = BufferSnapshot(parts.method)
        self.samples = 0
        self.speed_clock = self.clock = self.started = time.monotonic()
        self.speed_step = counters.step

    @property
    def shipped(self) -> Segmenter:
        """The network that is evaluated and saved: the student or its average. All ranks must ask for it."""
        ema, template = self.parts.ema, self.parts.template
        segmenter = self.parts.method.deployable() if ema is None else cast(Segmenter, ema.module)
        return segmenter if template is None else with_weights(template, segmenter)

    def fit(self) -> str:
        """Train to the end; return why it ended: `all steps`, `patience`, `max_hours`, or the name of a signal.

        Raises:
            RecipeError: a loss or the weights are no longer finite; the last good checkpoint is kept.
            MachineError: a checkpoint cannot be written.
        """
        # Loader processes must end before the interpreter exits, also after an error.
        with closing(prefetched(self.batches_from(self.counters.step), self.hardware.device)) as batches:
            return self._loop(batches)

    def _loop(self, batches: Iterator[Batch]) -> str:
        config, counters = self.config, self.counters
        self.parts.method.train()
        reason = None
        if counters.evaluation_due:
            reason = self._evaluate(None)
            if reason or counters.step >= config.steps:
                self._save()
        while reason is None and counters.step < config.steps:
            self.train_step(counters.step, batches)
            counters.step += 1
            reason = "all steps" if counters.step >= config.steps else self._reason_to_stop()
            counters.evaluation_due = counters.step % config.eval_every == 0 or reason == "all steps"
            checkpoint_due = counters.step % config.checkpoint_every == 0
            if counters.step % config.log_every == 0 or counters.evaluation_due or checkpoint_due or reason:
                self._report()
            if counters.evaluation_due:
                reason = self._evaluate(reason)
            if checkpoint_due or reason:
                self._save()
        return reason or "all steps"

    def train_step(self, step: int, batches: Iterator[Batch]) -> None:
        """One update of all optimizers from `grad_accum_steps` micro-batches."""
        self._set_learning_rates(step)
        parts = self.parts
        self._buffers.keep()
        micro_steps = []
        for micro in range(self.config.grad_accum_steps):
            batch = self._arranged(next(batches))
            micro_steps.append(self.step.gradients(batch, step, micro))
            self.means.add(micro_steps[-1].output)
            self.samples += sum(len(samples.images) for samples in batch.values())
        broken = [micro_step for micro_step in micro_steps if not micro_step.is_finite()]
        if distributed.max_over_ranks(int(bool(broken))):
            self._skip(broken)
            return
        self.counters.skipped_in_row = 0
        self.step.update()
        parts.method.after_optimizer_step(step)
        if parts.ema is not None:
            parts.ema.update(parts.method.deployable())

    def _skip(self, broken: list[MicroStep]) -> None:
        """Undo a step with a non-finite loss; raise after `MAX_SKIPPED` consecutive ones."""
        counters = self.counters
        self.step.discard()
        self._buffers.restore()
        counters.skipped += 1
        counters.skipped_in_row += 1
        names = [name for micro in broken for name, value in micro.output.losses.items() if not bool(value.isfinite())]
        self.bad_losses = list(dict.fromkeys([*self.bad_losses, *names]))
        if counters.skipped_in_row == MAX_SKIPPED:
            saved = [self.checkpoints.save_batch(micro.batch, self.ranks.rank) for micro in broken[:1]]
            raise self._diverged(counters.step + 1, "".join(f"The batch is in {file}. " for file in saved))
        what = f"{self._named_losses()} not finite; the step is skipped, {counters.skipped} so far."
        self.progress.on_message(f"step {counters.step + 1}: {what}")

    def _set_learning_rates(self, step: int) -> None:
        for name, optimizer in self.parts.optimizers.items():
            for group in optimizer.param_groups:
                set_rate(group, self._learning_rate(name, step, scale=group["lr_scale"]))

    def _learning_rate(self, optimizer: str, step: int, *, scale: float = 1.0) -> float:
        """Rate of a group; `scale` does not apply to `min_lr`."""
        config = self.recipe.optimizers[optimizer]
        return lr_at(config.schedule, scale * config.lr, step, self.config.steps)

    def _arranged(self, batch: Batch) -> Batch:
        if not self.config.channels_last:
            return batch
        return {
            name: replace(samples, images=samples.images.contiguous(memory_format=torch.channels_last))
            for name, samples in batch.items()
        }

    def _reason_to_stop(self) -> str | None:
        limit = self.config.max_hours
        late = limit is not None and time.monotonic() - self.started > 3600 * limit
        # All ranks must stop at the same step.
        match distributed.max_over_ranks(2 if self.signals.received is not None else int(late)):
            case 2:
                return self.signals.received or "SIGTERM"
            case 1:
                return "max_hours"
        return None

    def _report(self) -> None:
        step, now = self.counters.step, time.monotonic()
        losses, logs = self.means.take()
        weights = [own_share(p.detach()) for p in self.parts.method.parameters() if p.requires_grad]
        if not bool(torch.stack(torch._foreach_norm(weights)).isfinite().all()):
            raise self._diverged(step)
        self.bad_losses = []
        seconds = max(now - self.speed_clock, 1e-9)
        self.progress.on_step(
            StepReport(
                step=step,
                total=self.config.steps,
                losses=losses,
                loss=sum(losses.values()),
                logs=logs,
                learning_rates={name: self._learning_rate(name, step - 1) for name in self.parts.optimizers},
                images_per_s=self.samples * self.ranks.world_size / seconds,
                memory_mb=peak_memory_mb(self.hardware.device),
                eta_s=(self.config.steps - step) * seconds / max(step - self.speed_step, 1),
            )
        )
        self._restart_speed()

    def _restart_speed(self) -> None:
        self.samples, self.speed_step, self.speed_clock = 0, self.counters.step, time.monotonic()

    def _named_losses(self) -> str:
        bad = self.bad_losses
        return f"the losses {', '.join(bad)} are" if len(bad) > 1 else f"the loss {''.join(bad) or 'of a process'} is"

    def _diverged(self, step: int, where: str = "") -> RecipeError:
        what = self._named_losses() if self.bad_losses or where else "the weights are"
        return RecipeError(
            f"training diverged: {what} not finite by step {step}. {where}Lower optimizers.*.lr, set "
            f"trainer.clip_grad, or use trainer.amp_dtype=none. {self.checkpoints.last_good()}"
        )

    def _evaluate(self, reason: str | None) -> str | None:
        """Score the network to ship; return why the run ends after it, or None.

        A signal ends the evaluation early; a resumed run then repeats it first.
        """
        counters, patience = self.counters, self.config.patience
        if self.evaluate is not None:
            # Every rank scores its share of the images with the buffers that will be saved.
            for module in filter(None, (self.parts.method, self.parts.ema)):
                distributed.broadcast_buffers(module)
            try:
                evaluation = self.evaluate(self.shipped.eval(), stop=lambda: self.signals.received is not None)
            except Interrupted:
                return self._reason_to_stop()
            finally:
                self.parts.method.train()
            self._compare(evaluation)
        counters.evaluation_due = False
        return "patience" if reason is None and patience is not None and counters.since_best >= patience else reason

    def _compare(self, evaluation: Evaluation) -> None:
        """Save the network if it is the best so far, and report."""
        counters = self.counters
        monitor = self.config.monitor
        match monitor:
            case "last":
                score, improved = None, True
            case "entropy":
                score = evaluation.entropy
                improved = counters.best_score is None or (score is not None and score < counters.best_score)
            case _:
                score = getattr(evaluation.scores, monitor)
                improved = counters.best_step is None or (score or 0.0) > (counters.best_score or 0.0)
        counters.since_best = 0 if improved else counters.since_best + 1
        if improved:
            counters.best_score, counters.best_step = score, counters.step
            self.checkpoints.save_best(self.shipped, counters)
        self.progress.on_evaluation(
            EvaluationReport(
                **dict(evaluation),
                step=counters.step,
                total=self.config.steps,
                score=score,
                best=counters.best_score,
                improved=improved,
            )
        )
        self._restart_speed()

    def _save(self) -> None:
        now = time.monotonic()
        self.counters.elapsed_s += now - self.clock
        self.clock = now
        self.checkpoints.save_last(self.shipped, self.parts, self.counters)
        self._restart_speed()


class LossMeans:
    """Means of losses and logs since the last report, read from the device once per report instead of every step."""

    def __init__(self) -> None:
        self._losses: tuple[str, ...] = ()
        self._logs: tuple[str, ...] = ()
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, output: StepOutput) -> None:
        """Add one micro-step; a method returns the same names in every step."""
        values = [*output.losses.values(), *output.logs.values()]
        stacked = torch.stack([value.detach().float() for value in values])
        self._losses, self._logs = tuple(output.losses), tuple(output.logs)
        self._sum = stacked if self._sum is None else self._sum + stacked
        self._count += 1

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return mean losses and logs over micro-steps and ranks, and reset; all ranks must call it after an `add`."""
        if self._sum is None:
            raise ValueError("no step was added since the last report")
        count = self._count * distributed.current_ranks().world_size
        means = (distributed.sum_over_ranks(self._sum) / count).tolist()
        self._sum, self._count = None, 0
        middle = len(self._losses)
        losses = dict(zip(self._losses, means[:middle], strict=True))
        return losses, dict(zip(self._logs, means[middle:], strict=True))


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory so far in MB: of the GPU's tensors, or resident in this process (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return 0.0
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
