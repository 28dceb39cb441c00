"""The one loop that trains every method."""

import math
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from rsseg import distributed
from rsseg.config import BaseRecipe
from rsseg.data.streams import Batch
from rsseg.distributed import StopSignals
from rsseg.errors import RecipeError
from rsseg.evaluation.model import Evaluation
from rsseg.methods.base import Segmenter, StepOutput
from rsseg.training.checkpoints import Checkpoints
from rsseg.training.optimizers import lr_at
from rsseg.training.plan import Hardware
from rsseg.training.progress import EvaluationReport, Progress, StepReport
from rsseg.training.state import Counters, Parts


class Trainer:
    """Trains a method until its steps, its patience, its hours or a signal end it."""

    def __init__(
        self,
        parts: Parts,
        recipe: BaseRecipe,
        hardware: Hardware,
        counters: Counters,
        *,
        batches_from: Callable[[int], Generator[Batch]],
        evaluate: Callable[[Segmenter], Evaluation] | None,
        checkpoints: Checkpoints,
        progress: Progress,
        signals: StopSignals,
    ) -> None:
        """Prepare a run.

        Args:
            parts: method, average and optimizers.
            recipe: schedule, precision, intervals, what is monitored.
            hardware: device that `parts` live on.
            counters: step to begin at, best score so far.
            batches_from: optimizer step -> endless micro-batches from there on.
            evaluate: scores a network on the validation split; None without validation images.
            checkpoints: saves networks and state.
            progress: gets the reports.
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
        self.model: nn.Module = distributed.wrap(parts.method, hardware.device)
        if self.config.compile:
            self.model = cast(nn.Module, torch.compile(self.model))
        self.means = LossMeans()
        self.samples = 0
        self.speed_clock = self.clock = time.monotonic()
        self.speed_step = counters.step

    @property
    def shipped(self) -> Segmenter:
        """The network that is evaluated and saved: the student or its average."""
        if self.parts.ema is not None:
            return cast(Segmenter, self.parts.ema.module)
        return self.parts.method.deployable()

    def fit(self) -> str:
        """Train to the end; return why it ended: `all steps`, `patience`, `max_hours`, or the name of a signal.

        Raises:
            RecipeError: a loss or the weights are no longer finite; the last good checkpoint is kept.
            MachineError: a checkpoint cannot be written.
        """
        # Loader processes must end before the interpreter does, also after an error.
        with closing(self.batches_from(self.counters.step)) as batches:
            return self._loop(batches)

    def _loop(self, batches: Iterator[Batch]) -> str:
        config, counters = self.config, self.counters
        self.parts.method.train()
        reason = None
        while reason is None:
            self.train_step(counters.step, batches)
            counters.step += 1
            reason = "all steps" if counters.step >= config.steps else self._reason_to_stop()
            evaluation_due = counters.step % config.eval_every == 0 or reason == "all steps"
            checkpoint_due = counters.step % config.checkpoint_every == 0
            if counters.step % config.log_every == 0 or evaluation_due or checkpoint_due or reason:
                self._report()
            if evaluation_due:
                self._evaluate()
                if reason is None and config.patience is not None and counters.since_best >= config.patience:
                    reason = "patience"
            if checkpoint_due or reason:
                self._save()
        return reason

    def train_step(self, step: int, batches: Iterator[Batch]) -> None:
        """One update of all optimizers from `grad_accum_steps` micro-batches."""
        self._set_learning_rates(step)
        parts, accumulate, amp_dtype = self.parts, self.config.grad_accum_steps, self.hardware.amp_dtype
        for micro in range(accumulate):
            seed_everything(self.recipe.seed, self.ranks.rank, step, micro)
            batch = self._arranged(next(batches))
            last = micro == accumulate - 1
            with distributed.gradient_sync(self.model, on=last):
                with torch.autocast(self.hardware.device.type, amp_dtype, enabled=amp_dtype is not None):
                    output = self.model(batch, step)
                    loss = torch.stack(list(output.losses.values())).sum() / accumulate
                parts.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            self.means.add(output)
            self.samples += sum(len(samples.images) for samples in batch.values())
        for optimizer in parts.optimizers.values():
            parts.scaler.unscale_(optimizer)
            if self.config.clip_grad is not None:
                clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], self.config.clip_grad)
            parts.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        parts.scaler.update()
        parts.method.after_optimizer_step(step)
        if parts.ema is not None:
            parts.ema.update(parts.method.deployable())

    def _set_learning_rates(self, step: int) -> None:
        for name, optimizer in self.parts.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self._learning_rate(name, step, scale=group["lr_scale"])

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
        several = self.ranks.world_size > 1
        # Ranks must stop at the same step; to agree costs a message, so several ask only when they report.
        if several and self.counters.step % self.config.log_every:
            return None
        limit = self.config.max_hours
        late = limit is not None and self.counters.elapsed_s + time.monotonic() - self.clock > 3600 * limit
        signal = self.signals.received
        if not several:
            return signal or ("max_hours" if late else None)
        if distributed.any_rank(signal is not None, self.hardware.device):
            return signal or "SIGTERM"
        return "max_hours" if distributed.any_rank(late, self.hardware.device) else None

    def _report(self) -> None:
        step, now = self.counters.step, time.monotonic()
        losses, logs = self.means.take()
        self._check_finite(losses)
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

    def _check_finite(self, losses: Mapping[str, float]) -> None:
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        weights = [p.detach() for p in self.parts.method.parameters() if p.requires_grad]
        if not bad and bool(torch.stack(torch._foreach_norm(weights)).isfinite().all()):
            return
        several = "es" if len(bad) > 1 else ""
        what = f"the loss{several} {', '.join(bad)} {'are' if several else 'is'}" if bad else "the weights are"
        raise RecipeError(
            f"training diverged: {what} not finite by step {self.counters.step}. Lower optimizers.*.lr, set "
            f"trainer.clip_grad, or use trainer.amp_dtype=none. {self.checkpoints.last_good()}"
        )

    def _evaluate(self) -> None:
        if self.evaluate is None:
            return
        counters = self.counters
        evaluation = self.evaluate(self.shipped.eval())
        self.parts.method.train()
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


def seed_everything(seed: int, rank: int, step: int, micro: int) -> None:
    """Seed torch by counters, so that randomness does not depend on what happened before."""
    torch.manual_seed(int(np.random.SeedSequence((seed, rank, step, micro)).generate_state(1, np.uint64)[0] >> 1))


class LossMeans:
    """Means of losses and logs since the last report; read from the device once per report, not once per step."""

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
        """Mean losses and logs over micro-steps and ranks, then start again; all ranks must call it after an `add`."""
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
    import resource  # exists on Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
