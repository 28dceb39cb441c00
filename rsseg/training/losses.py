"""Running means of losses that wait for the device once per report instead of once per step."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rsseg.distributed import current_ranks, sum_over_ranks
from rsseg.methods.base import StepOutput


@dataclass(frozen=True)
class Means:
    """Means over the micro-steps and ranks since the last report."""

    losses: Mapping[str, float]
    logs: Mapping[str, float]


class LossWindow:
    """Sums one stacked tensor per micro-step. A method returns the same names in every step."""

    def __init__(self) -> None:
        self._losses: tuple[str, ...] = ()
        self._logs: tuple[str, ...] = ()
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, output: StepOutput) -> None:
        """Take the values of one micro-step; nothing is read from the device."""
        values = [*output.losses.values(), *output.logs.values()]
        stacked = torch.stack([value.detach().float() for value in values])
        self._losses, self._logs = tuple(output.losses), tuple(output.logs)
        self._sum = stacked if self._sum is None else self._sum + stacked
        self._count += 1

    def take(self) -> Means:
        """The means, and start again; all ranks must call it. Needs at least one `add`."""
        if self._sum is None:
            raise ValueError("no step was added since the last report")
        means = (sum_over_ranks(self._sum) / (self._count * current_ranks().world_size)).tolist()
        self._sum, self._count = None, 0
        middle = len(self._losses)
        return Means(
            dict(zip(self._losses, means[:middle], strict=True)), dict(zip(self._logs, means[middle:], strict=True))
        )
