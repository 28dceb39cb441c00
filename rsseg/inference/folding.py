"""The same network with less to do, for networks that only predict."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

_TOLERANCE = 1e-3
"""Of the logits, relative to the largest: far above rounding in float32, far below a mistake."""


@torch.no_grad()
def simplify(network: nn.Module, run: Callable[[], Tensor]) -> None:
    """Let convolutions take up the batch norms behind them and the uneven padding before them; in place.

    Whether the logits stay the same is looked at: if not, as where something else reads what a convolution returns,
    the network stays as it was.

    Args:
        network: in eval mode, and only given images whose sides its strides divide. Its tensors are not written to:
            they may be shared with another network.
        run: applies the network to a small image in float32; returns its logits.
    """
    expected = run()
    edits = _Edits()
    _pad_evenly(network, edits)
    _fold_batch_norms(network, run, edits)
    if (run() - expected).abs().max() > _TOLERANCE * expected.abs().max():
        edits.undo()


@torch.no_grad()
def store_convolutions(network: nn.Module, dtype: torch.dtype, works: Callable[[], bool]) -> None:
    """Keep the weights of convolutions in the type that autocast computes in, instead of converting them each time; in
    place. Undone if `works`, which runs the network, says no: a part that computes in float32 after all.
    """
    edits = _Edits()
    for conv in [module for module in network.modules() if isinstance(module, nn.Conv2d)]:
        edits.set(conv, "weight", _constant(conv.weight.to(dtype)))
        if conv.bias is not None:
            edits.set(conv, "bias", _constant(conv.bias.to(dtype)))
    if not works():
        edits.undo()


class _Edits:
    """Changes of attributes that can be taken back."""

    def __init__(self) -> None:
        self._before: list[tuple[nn.Module, str, Any]] = []

    def set(self, owner: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
        self._before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def replace(self, network: nn.Module, old: nn.Module, new: nn.Module) -> None:
        for owner in list(network.modules()):
            for name, child in owner.named_children():
                if child is old:
                    self.set(owner, name, new)

    def undo(self) -> None:
        for owner, name, value in reversed(self._before):
            setattr(owner, name, value)


def _pad_evenly(network: nn.Module, edits: _Edits) -> None:
    """TensorFlow's padding, where one side gets more, costs a copy of the map: a kernel with a first row and column of
    zeros needs as much on both sides, which the convolution adds by itself.
    """
    for conv in [module for module in network.modules() if isinstance(module, Conv2dSame)]:
        side, stride = conv.kernel_size[0], conv.stride[0]
        padding = max(side - stride, 0)
        after, more = padding - padding // 2, padding % 2
        if conv.kernel_size != (side, side) or conv.stride != (stride, stride) or conv.dilation != (1, 1):
            continue
        even = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            side + more,
            stride,
            after,
            groups=conv.groups,
            bias=conv.bias is not None,
            device="meta",
        )
        even.weight = _constant(F.pad(conv.weight, (more, 0, more, 0)))
        even.bias = conv.bias
        edits.replace(network, conv, even.eval())


def _fold_batch_norms(network: nn.Module, run: Callable[[], Tensor], edits: _Edits) -> None:
    for conv, norm in _pairs(network, run):
        assert norm.running_mean is not None  # for the type checker: `_pairs` saw to it
        assert norm.running_var is not None
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        edits.set(conv, "weight", _constant(weight))
        edits.set(conv, "bias", _constant(bias))
        # Norms of timm have their activation inside.
        rest = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]
        edits.replace(network, norm, nn.Sequential(*rest))


def _pairs(network: nn.Module, run: Callable[[], Tensor]) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions and norms that always follow one another, found by running the network, whatever its kind."""
    made: list[tuple[Tensor, nn.Module]] = []
    calls: Counter[nn.Module] = Counter()
    follows: Counter[tuple[nn.Module, nn.Module]] = Counter()

    def after_conv(conv: nn.Module, _: Any, output: Tensor) -> None:
        calls[conv] += 1
        made.append((output, conv))  # kept, so that no later tensor can be taken for it

    def before_norm(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        calls[norm] += 1
        follows.update((conv, norm) for output, conv in made if output is inputs[0])

    hooks = [m.register_forward_hook(after_conv) for m in network.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]
    hooks += [norm.register_forward_pre_hook(before_norm) for norm in norms]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [pair for pair, n in follows.items() if calls[pair[0]] == calls[pair[1]] == n]  # type: ignore[misc]


def _constant(values: Tensor) -> nn.Parameter:
    layout = torch.channels_last if values.ndim == 4 else torch.contiguous_format
    return nn.Parameter(values.contiguous(memory_format=layout), requires_grad=False)
