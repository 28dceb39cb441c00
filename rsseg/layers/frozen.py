"""A network that is used but never trained, switched to train mode, or saved."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class Frozen(nn.Module):
    """Holds a module outside the tree of parameters: no optimizer, state dict, DDP wrapper or `train()` can reach it.

    It moves with its owner (`to`, `cuda`), stays in eval mode and runs under no_grad.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._held = (module.requires_grad_(False).eval(),)

    @property
    def module(self) -> nn.Module:
        """The wrapped module."""
        return self._held[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's output, without a graph."""
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self
