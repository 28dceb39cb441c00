"""Low-rank adapters of frozen linear layers.

Source: Hu et al. 2021 (arXiv 2106.09685).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRank(nn.Module):
    """scale * up @ down, added to the weight of a linear layer; 0 at initialization."""

    def __init__(self, in_features: int, out_features: int, *, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as nn.Linear

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in_features) -> term to add to the layer's output, (..., out_features)."""
        return F.linear(self.scale * F.linear(inputs, self.down), self.up)

    def delta(self) -> Tensor:
        """Term to add to the layer's weight, (out_features, in_features)."""
        return self.scale * self.up @ self.down


class LowRankAdapters(nn.Module):
    """One `LowRank` per chosen linear layer of a network; does not contain the network."""

    def __init__(self, network: nn.Module, targets: Sequence[str], *, rank: int, alpha: float) -> None:
        """Build the adapters.

        Args:
            network: network to adapt.
            targets: last names of linear layers, such as `qkv`; each must occur.
            rank: rank of the products.
            alpha: the products are multiplied by alpha / rank.

        Raises:
            ValueError: no linear layer has one of the names.
        """
        super().__init__()
        linear = {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear)}
        known = {name.rpartition(".")[2] for name in linear}
        if unknown := [target for target in targets if target not in known]:
            raise ValueError(f"no linear layer is called {unknown[0]!r}; there are {sorted(known)}")
        chosen = {name: m for name, m in linear.items() if name.rpartition(".")[2] in targets}
        self.names = tuple(chosen)
        self.layers = nn.ModuleList(
            LowRank(m.in_features, m.out_features, rank=rank, scale=alpha / rank) for m in chosen.values()
        )

    @contextmanager
    def added_to(self, network: nn.Module) -> Iterator[None]:
        """Context in which the chosen layers of `network` return their output plus the adapters' term."""

        def adding(addition: nn.Module) -> Any:
            return lambda _, inputs, output: output + addition(inputs[0])

        hooks = [
            network.get_submodule(name).register_forward_hook(adding(addition))
            for name, addition in zip(self.names, self.layers, strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def merge(self, base: nn.Module, into: nn.Module) -> None:
        """Write the weights of `base` plus the adapters into `into`, a network of the same architecture."""
        for name, addition in zip(self.names, self.layers, strict=True):
            weight = cast(Tensor, base.get_submodule(name).weight)
            cast(Tensor, into.get_submodule(name).weight).copy_(weight + cast(LowRank, addition).delta())
