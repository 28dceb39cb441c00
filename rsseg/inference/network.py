"""Load a model and prepare it for inference: batch norms and paddings folded, weights converted."""

import copy
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode

from rsseg.backbones.timm_adapter import Conv2dSame
from rsseg.checkpoint import read_header
from rsseg.errors import UsageError
from rsseg.inference.device import resolve_device, trial_side
from rsseg.inference.ensemble import EnsembleNetwork, check_tasks
from rsseg.inference.machine import memory_errors
from rsseg.inference.torch_network import TorchNetwork, probabilities_of
from rsseg.methods.base import Segmenter
from rsseg.methods.registry import load_model

_INITIALIZERS = {f"{name}_" for name in ("uniform", "normal", "erfinv", "mul", "add", "clamp", "fill", "zero")} | {
    f"{name}_" for name in ("constant", "ones", "zeros", "kaiming_uniform", "kaiming_normal", "xavier_uniform")
}
_TOLERANCE = 1e-3
"""Tolerance relative to the largest logit: far above float32 rounding, far below an error."""


def load_segmenter(path: Path | str, *, device: str = "cpu") -> Segmenter:
    """Load the network of a model file or run folder, in eval mode; needs no other file and no network connection.

    Args:
        path: `model.safetensors`, another file of that format, or the folder of a run.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        WeightsError: there is no model, or it is damaged, foreign, or of another version.
        MachineError: there is no such device, or too little memory.
    """
    target = resolve_device(device)
    file = Path(path)
    with memory_errors(f"{file}: the network that this header describes does not fit into memory."):
        with _Uninitialized():
            segmenter = load_model(file)
        return segmenter.to(target)


class AveragedSegmenter(Segmenter):
    """Several networks as one: its logits are the logarithms of their mean probabilities, see `EnsembleNetwork`."""

    def __init__(self, members: Sequence[Segmenter]) -> None:
        """Networks of one task; raises `UsageError` if they are bound to different tile sizes."""
        own = [member.tile.size for member in members if not member.tile.flexible]
        if len(set(own)) > 1:
            raise UsageError(f"the models were trained on tiles of different sizes ({own}). Evaluate one of them.")
        facts = EnsembleNetwork(tuple(TorchNetwork(member) for member in members), (None,) * len(members))
        super().__init__(facts.task, input_multiple=facts.input_multiple, fill=facts.fill, tile=facts.tile)
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        """See `Segmenter.forward`."""
        total: Any = 0
        for member in self.members:
            assert isinstance(member, Segmenter)  # for the type checker
            seen = torch.where(images.isnan(), images.new_tensor(member.fill)[:, None, None], images)
            own = member.calibration
            logits = member.predict_logits(seen).permute(0, 2, 3, 1)
            total = total + probabilities_of(logits, None if own is None else own.temperatures)
        mean: Tensor = total / len(self.members)
        return mean.clamp_min(1e-30).log().permute(0, 3, 1, 2)


def load_averaged(paths: Sequence[Path], *, device: str) -> Segmenter:
    """The mean of the probabilities of several models; a single one is loaded as it is. See `load_segmenter`.

    Raises:
        UsageError: no model, or models of different classes, bands or scaling.
    """
    check_tasks([(str(path), read_header(path).task) for path in paths])
    members = [load_segmenter(path, device=device) for path in paths]
    return members[0] if len(members) == 1 else AveragedSegmenter(members).eval()


class _Uninitialized(TorchFunctionMode):
    """Skips the initialization of parameters, which are loaded afterwards.

    Initialization takes most of the time of building a network. Memory that is never written is not allocated either,
    so a file that does not fit the network is rejected early.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        target = args[0] if args else (kwargs or {}).get("tensor")
        if isinstance(target, nn.Parameter) and getattr(func, "__name__", "") in _INITIALIZERS:
            return target
        return func(*args, **(kwargs or {}))


def ready_to_predict(segmenter: Segmenter, device: torch.device, dtype: torch.dtype) -> tuple[Segmenter, torch.dtype]:
    """A copy in eval mode for inference, and the type to compute in; the original is not changed.

    A network that cannot compute in `dtype`, which is tried with one small image, computes in float32. Weights that
    need no conversion are shared with the original. Convolutions are stored channels_last, which is a third faster on a
    CPU; those of a convolutional network are folded as well, see `fold_convolutions`.
    """
    # deepcopy takes what the memo already holds: the weights are not copied twice.
    memo: dict[int, Tensor] = {id(buffer): buffer.to(device) for buffer in segmenter.buffers()}
    for parameter in segmenter.parameters():
        layout = torch.channels_last if parameter.ndim == 4 else torch.preserve_format
        placed = parameter.detach().to(device, memory_format=layout)
        memo[id(parameter)] = nn.Parameter(placed, requires_grad=False)
    ready = copy.deepcopy(segmenter, memo).eval()
    ready.fold()
    if ready.tile.flexible:
        fold_convolutions(ready, functools.partial(ready.predict_logits, _small_image(ready, device)))
    if dtype == torch.float32 or not _can_compute(ready, device, dtype):
        return ready, torch.float32
    store_convolutions(ready, dtype, lambda: _can_compute(ready, device, dtype))
    return ready, dtype


@torch.no_grad()
def fold_convolutions(network: nn.Module, run: Callable[[], Tensor]) -> None:
    """Fold batch norms into the preceding convolutions and make asymmetric padding symmetric; in place.

    If the logits change, for example because another layer also reads the output of a convolution, the network is
    restored.

    Args:
        network: in eval mode, only used for images whose sides are multiples of its strides. Its tensors are not
            modified, because they may be shared with another network.
        run: applies the network to a small image in float32; returns its logits.
    """
    expected = run()
    edits = _Edits()
    _pad_evenly(network, edits)
    _fold_batch_norms(network, run, edits)
    # Written so that NaN is a change too.
    if not (run() - expected).abs().max() <= _TOLERANCE * expected.abs().max():
        edits.undo()


@torch.no_grad()
def store_convolutions(network: nn.Module, dtype: torch.dtype, works: Callable[[], bool]) -> None:
    """Store convolution weights in the type that autocast converts them to at every call; in place.

    Undone if `works`, which runs the network, returns False because some part computes in float32.
    """
    edits = _Edits()
    for conv in [module for module in network.modules() if isinstance(module, nn.Conv2d)]:
        edits.set(conv, "weight", _constant(conv.weight.to(dtype)))
        if conv.bias is not None:
            edits.set(conv, "bias", _constant(conv.bias.to(dtype)))
    if not works():
        edits.undo()


@torch.inference_mode()
def _can_compute(segmenter: Segmenter, device: torch.device, dtype: torch.dtype) -> bool:
    try:
        with torch.autocast(device.type, dtype):
            return bool(segmenter.predict_logits(_small_image(segmenter, device)).isfinite().all())
    except RuntimeError:  # an operation has no kernel for this type, or does not mix it with float32
        return False


def _small_image(segmenter: Segmenter, device: torch.device) -> Tensor:
    """Noise (1, C, side, side) about the mean, of a small side that suits the network."""
    side = segmenter.input_multiple if segmenter.tile.flexible else trial_side(segmenter, segmenter.tile.size)
    mean = torch.tensor(segmenter.fill)[:, None, None]
    noise = torch.randn(len(mean), side, side, generator=torch.Generator().manual_seed(0))
    return (mean + noise * mean.abs())[None].to(device)


class _Edits:
    """Changes of attributes that can be undone."""

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
    """Replace TensorFlow's asymmetric padding, which copies the map, by the padding of the convolution itself.

    A kernel with a first row and column of zeros needs the same padding on both sides.
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
        assert norm.running_mean is not None  # for the type checker: `_pairs` tests it
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
    """Convolutions and the norms that always follow them, found by running the network."""
    made: list[tuple[Tensor, nn.Module]] = []
    calls: Counter[nn.Module] = Counter()
    follows: Counter[tuple[nn.Module, nn.Module]] = Counter()

    def after_conv(conv: nn.Module, _: Any, output: Tensor) -> None:
        calls[conv] += 1
        made.append((output, conv))  # kept alive, so that no later tensor gets the same id

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
