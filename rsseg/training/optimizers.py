"""Optimizers and learning rates of a recipe."""

import math
from collections.abc import Mapping

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

from rsseg.config import OptimizerConfig, ScheduleConfig
from rsseg.errors import RecipeError
from rsseg.methods.base import Method


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
    # Fused kernels exist on these devices only; elsewhere torch chooses.
    parameters = [p for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    fused = True if all(p.device.type in ("cpu", "cuda") for p in parameters) else None
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
