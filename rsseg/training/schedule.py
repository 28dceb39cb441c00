"""The learning rate as a pure function of the step; nothing is stored, so a resumed run cannot differ."""

import math

from rsseg.config import ScheduleConfig


def lr_at(config: ScheduleConfig, base_lr: float, step: int, total_steps: int) -> float:
    """Rate that optimizer step `step` (from 0) of `total_steps` uses: min_lr..base_lr by the decay, times the warm-up.

    Warm-up and decay are both active where they overlap, as in mmengine's chained schedulers.
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
