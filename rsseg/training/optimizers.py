"""A method's parameter groups and a recipe's settings -> torch optimizers."""

from collections.abc import Mapping

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

from rsseg.config import OptimizerConfig
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
    # The fused kernels exist on these devices only; elsewhere torch chooses.
    fused = True if all(p.device.type in ("cpu", "cuda") for p in _parameters(groups)) else None
    match config.name:
        case "adamw":
            return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
        case "adam":
            return Adam(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
        case "sgd":
            return SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)


def _parameters(groups: list[dict[str, object]]) -> list[torch.nn.Parameter]:
    return [p for group in groups for p in group["params"]]  # type: ignore[attr-defined]


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
