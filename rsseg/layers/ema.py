"""Networks that no optimizer updates: moving averages and frozen networks."""

import copy
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

KEPT_BYTES = 2**30
"""Most that one frozen network keeps of its outputs for the images of one stream."""


class Ema(nn.Module):
    """Exponential moving average of a module, without gradients, in eval mode regardless of its owner's mode.

    Parameters are averaged. `buffers` says whether floating-point buffers (batch norm statistics) are averaged or
    copied; integer buffers (counters) are then copied. `keep` updates no buffer.
    """

    def __init__(
        self, module: nn.Module, decay: float, *, buffers: Literal["average", "copy", "keep"] = "average"
    ) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay
        self.buffers_policy = buffers
        self._pairs: _Pairs | None = None

    @torch.no_grad()
    def update(self, source: nn.Module, *, decay: float | None = None) -> None:
        """average <- decay * average + (1 - decay) * source.

        Args:
            source: always the same module of the averaged architecture; not moved between updates.
            decay: of this update; None uses the constructor's.
        """
        if self._pairs is None:
            self._pairs = _Pairs(self.module, source, buffers=self.buffers_policy)
        weight = 1.0 - (self.decay if decay is None else decay)
        if self._pairs.averaged:
            torch._foreach_lerp_(self._pairs.averaged, self._pairs.averaged_from, weight)
        if self._pairs.copied:
            torch._foreach_copy_(self._pairs.copied, self._pairs.copied_from)

    def train(self, mode: bool = True) -> Self:
        """Do not change the mode of the average; `module.train()` does."""
        self.training = mode
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._pairs = None  # buffers are replaced when a module moves
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class _Pairs:
    """Flat lists of tensors, built once: fused kernels over lists are three to five times faster than a loop."""

    def __init__(self, average: nn.Module, source: nn.Module, *, buffers: Literal["average", "copy", "keep"]) -> None:
        self.averaged: list[Tensor] = [own_share(p.data) for p in average.parameters()]
        self.averaged_from: list[Tensor] = [own_share(p.data) for p in source.parameters()]
        self.copied: list[Tensor] = []
        self.copied_from: list[Tensor] = []
        if buffers == "keep":
            return
        for own, other in zip(average.buffers(), source.buffers(), strict=True):
            smooth = buffers == "average" and own.is_floating_point()
            (self.averaged if smooth else self.copied).append(own)
            (self.averaged_from if smooth else self.copied_from).append(other)


class Frozen(nn.Module):
    """Hides a module from optimizers, state dicts, DDP and `train()`.

    It moves with its owner (`to`, `cuda`), stays in eval mode and runs under no_grad.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._held = (module.requires_grad_(False).eval(),)
        self._kept: dict[Hashable, Sequence[Tensor]] = {}
        self._fits: dict[tuple[torch.Size, int], bool] = {}  # shape of an image, number of keys

    @property
    def module(self) -> nn.Module:
        """The wrapped module."""
        return self._held[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's output, without gradients."""
        with torch.no_grad():
            return self.module(*args, **kwargs)

    @torch.no_grad()
    def outputs(
        self,
        compute: Callable[[Tensor], Sequence[Tensor]],
        images: Tensor,
        keys: tuple[Sequence[Hashable], int] | None,
    ) -> Sequence[Tensor]:
        """`compute(images)`; with keys, each image is computed once in the life of this network.

        Results do not depend on what was computed before: with keys, `compute` always gets one image at a time.

        Args:
            compute: images (B, ...) -> tensors (B, ...) by this network, always the same function.
            images: (B, ...).
            keys: one per image, equal for equal images only, and the number of different keys that may come; if outputs
                for so many take more than `KEPT_BYTES`, or without keys, all images are computed together.
        """
        # The processes of a divided network must call it together, whatever each of them has kept.
        if keys is None or any(hasattr(parameter, "to_local") for parameter in self.module.parameters()):
            return compute(images)
        own, possible = keys
        stream = images.shape[1:], possible
        if stream not in self._fits:
            first = compute(images[:1])
            self._fits[stream] = possible * sum(tensor.nbytes for tensor in first) <= KEPT_BYTES
            if self._fits[stream]:
                self._kept[own[0]] = first
        if not self._fits[stream]:
            return compute(images)
        for image, key in zip(images, own, strict=True):
            if key not in self._kept:
                self._kept[key] = compute(image[None])
        return [torch.cat(parts) for parts in zip(*(self._kept[key] for key in own), strict=True)]

    def store_as(self, dtype: torch.dtype) -> None:
        """Store weights of matrix products and convolutions in the type that autocast converts them to at each call.

        Under autocast to that type the outputs stay the same; without it, the module no longer works.
        """
        for part in self.module.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                for parameter in part.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._kept, self._fits = {}, {}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def own_share(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process keeps, if it is divided among several: it shares its memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
