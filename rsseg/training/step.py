"""One optimizer step: optimizers and learning rates, gradients of micro-steps, and the update of the weights."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, AdamW, Optimizer

from rsseg import distributed
from rsseg.config import BaseRecipe, OptimizerConfig, ScheduleConfig
from rsseg.data.streams import Batch
from rsseg.errors import RecipeError
from rsseg.methods.base import Method, StepOutput
from rsseg.training.checkpoints import Parts
from rsseg.training.device import Hardware, is_shared


def build_optimizers(method: Method, configs: Mapping[str, OptimizerConfig]) -> dict[str, Optimizer]:
    """One optimizer per name; each group keeps its `lr_scale`.

    Raises:
        RecipeError: the recipe's names are not the method's.
        ValueError: a trainable parameter is in no group, or in two.
    """
    groups = method.param_groups()
    if set(groups) != set(configs):
        raise RecipeError(
            f"optimizers: the recipe describes {sorted(configs)}, the method needs {sorted(groups)}. "
            "Use exactly these names."
        )
    _check_every_parameter_has_one_group(method)
    return {
        name: _build(
            configs[name],
            [
                {
                    "params": list(group.params),
                    "lr_scale": group.lr_scale,
                    "weight_decay": configs[name].weight_decay if group.weight_decay is None else group.weight_decay,
                }
                for group in groups[name]
            ],
        )
        for name in groups
    }


def _build(config: OptimizerConfig, groups: list[dict[str, object]]) -> Optimizer:
    # Fused kernels exist on these devices only, that of SGD for complete tensors only; elsewhere torch chooses.
    parameters = [p for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    complete = config.name != "sgd" or not any(map(is_shared, parameters))
    fused = True if complete and all(p.device.type in ("cpu", "cuda") for p in parameters) else None
    match config.name:
        case "adamw":
            return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
        case "adam":
            return Adam(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
        case "sgd":
            return SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)


def _check_every_parameter_has_one_group(method: Method) -> None:
    names = {parameter: name for name, parameter in method.named_parameters()}
    seen: set[torch.nn.Parameter] = set()
    for optimizer, groups in method.param_groups().items():
        for parameter in (p for group in groups for p in group.params):
            if parameter in seen:
                raise ValueError(f"parameter {names.get(parameter)} is in two groups, the second of {optimizer!r}")
            seen.add(parameter)
    forgotten = [name for parameter, name in names.items() if parameter.requires_grad and parameter not in seen]
    if forgotten:
        raise ValueError(f"{len(forgotten)} trainable parameters are in no group, first {forgotten[0]}")


def lr_at(config: ScheduleConfig, base_lr: float, step: int, total_steps: int) -> float:
    """Learning rate of step `step` (from 0) of `total_steps`: min_lr to base_lr by the decay, times the warm-up.

    A pure function of the step, so resuming needs no stored state. Where warm-up and decay overlap,
    both apply, as in mmengine's chained schedulers.
    """
    step = max(step - config.lag, 0)
    return (config.min_lr + (base_lr - config.min_lr) * _decay(config, step, total_steps)) * _warmup(config, step)


def _warmup(config: ScheduleConfig, step: int) -> float:
    last = config.warmup_steps - (config.warmup_style == "mmengine")
    progress = min(step / last, 1.0) if last > 0 else 1.0
    return config.warmup_start + (1.0 - config.warmup_start) * progress


def _decay(config: ScheduleConfig, step: int, total_steps: int) -> float:
    end = total_steps - (config.warmup_style == "mmengine")
    progress = min(max((step - config.decay_begin) / max(end - config.decay_begin, 1), 0.0), 1.0)
    match config.decay:
        case "poly":
            return float((1.0 - progress) ** config.power)
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "constant":
            return 1.0


class MicroStep:
    """Batch and output of one micro-step; the check of its loss is copied to the host while the backward pass runs."""

    def __init__(self, batch: Batch, output: StepOutput, total: Tensor) -> None:
        self.batch, self.output = batch, output
        self._finite = total.detach().isfinite().to("cpu", non_blocking=True)
        self._copied = torch.cuda.current_stream(total.device).record_event() if total.is_cuda else None

    def is_finite(self) -> bool:
        """Whether the sum of the losses is finite; waits for the forward pass only."""
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._finite)


class Step(Protocol):
    """How a trainer computes gradients and updates weights."""

    def gradients(self, batch: Batch, step: int, micro: int) -> MicroStep:
        """Add the gradients of a micro-step."""

    def update(self) -> None:
        """Step all optimizers with the sum of the gradients, and reset it."""

    def discard(self) -> None:
        """Reset the gradients without a step."""


class EagerStep:
    """A step whose kernels are launched one by one."""

    def __init__(self, parts: Parts, recipe: BaseRecipe, hardware: Hardware, *, alone: bool = False) -> None:
        """Prepare steps of all processes, or of this one `alone`."""
        self.parts, self.config, self.hardware = parts, recipe.trainer, hardware
        self._shared = parts.template is not None  # its parameters are: torch averages gradients where it divides them
        self.model = parts.method if alone or self._shared else distributed.wrap(parts.method, hardware.device)
        self._seed, self._rank = recipe.seed, distributed.current_ranks().rank

    def gradients(self, batch: Batch, step: int, micro: int) -> MicroStep:
        """See `Step`; ranks exchange gradients in the last micro-step."""
        self.seed(step, micro)
        if self._shared and micro == 0:
            distributed.broadcast_buffers(self.model)  # as DistributedDataParallel does
        with distributed.gradient_sync(self.model, on=micro == self.config.grad_accum_steps - 1):
            output, loss = self.forward(self.model, batch, step)
            done = MicroStep(batch, output, loss)
            self.parts.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return done

    def forward(self, model: Callable[[Batch, int], StepOutput], batch: Batch, step: int) -> tuple[StepOutput, Tensor]:
        """The method's output, and the loss of the micro-step: its share of the sum over the step."""
        dtype = self.hardware.amp_dtype
        with torch.autocast(self.hardware.device.type, dtype, enabled=dtype is not None):
            output = model(batch, step)
            loss = torch.stack(list(output.losses.values())).sum() / self.config.grad_accum_steps
        return StepOutput({name: value.detach() for name, value in output.losses.items()}, output.logs), loss

    def seed(self, step: int, micro: int) -> None:
        """Seed torch for a micro-step."""
        seed_everything(self._seed, self._rank, step, micro)

    def update(self) -> None:
        """See `Step`."""
        self.apply_gradients(to_none=True)

    def apply_gradients(self, *, to_none: bool) -> None:
        """Unscale, clip, step and reset; gradients become None or zero."""
        scaler = self.parts.scaler
        for optimizer in self.parts.optimizers.values():
            scaler.unscale_(optimizer)
            if self.config.clip_grad is not None:
                clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], self.config.clip_grad)
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=to_none)
        scaler.update()

    def discard(self) -> None:
        """See `Step`."""
        for optimizer in self.parts.optimizers.values():
            optimizer.zero_grad(set_to_none=True)


def seed_everything(seed: int, rank: int, step: int, micro: int) -> None:
    """Seed torch by counters, so that randomness does not depend on earlier steps."""
    torch.manual_seed(int(np.random.SeedSequence((seed, rank, step, micro)).generate_state(1, np.uint64)[0] >> 1))


class BufferSnapshot:
    """The buffers of a module before a step, since a forward pass changes batch-norm statistics and the like."""

    def __init__(self, method: Method) -> None:
        """Store the current values."""
        live = list(method.buffers())
        # Lists of one type each are copied by one kernel.
        kinds = dict.fromkeys(buffer.dtype for buffer in live)
        self._live = [[buffer for buffer in live if buffer.dtype == kind] for kind in kinds]
        self._kept = [[buffer.clone() for buffer in buffers] for buffers in self._live]

    def keep(self) -> None:
        """Store the current values."""
        for kept, live in zip(self._kept, self._live, strict=True):
            torch._foreach_copy_(kept, live)

    def restore(self) -> None:
        """Restore the stored values."""
        for kept, live in zip(self._kept, self._live, strict=True):
            torch._foreach_copy_(live, kept)


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set the learning rate of a parameter group, also of one whose update was captured."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
