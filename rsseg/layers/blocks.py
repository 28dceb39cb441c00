"""Building blocks that methods share: bilinear resizing, CutMix, convolution blocks, and control of batch norms."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def resize(maps: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """Bilinear, without antialiasing: (B, C, H, W) -> (B, C, *size). Returns `maps` itself if the size agrees."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=align_corners)


def resize_logits(logits: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """`resize` in float32 for any input type, as softmax needs it and CPUs are twice as fast in it."""
    return resize(logits.float(), size, align_corners=align_corners)


def cutmix(x: Tensor, mix: Tensor) -> Tensor:
    """Replace the pixels in the box of each sample i by those of sample B - 1 - i.

    Args:
        x: (B, H, W) or (B, C, H, W), any dtype.
        mix: bool (B, H, W), True inside the box.
    """
    return torch.where(mix if x.ndim == 3 else mix[:, None], x.flip(0), x)


class ConvBNReLU(nn.Module):
    """Convolution without bias (same size), batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, maps: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        return self.relu(self.bn(self.conv(maps)))  # type: ignore[no-any-return]


class Classifier(nn.Module):
    """Channel dropout and a 1x1 convolution to class logits."""

    def __init__(self, channels: int, num_classes: int, *, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.conv = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv.weight, std=0.01)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, maps: Tensor) -> Tensor:
        """(B, channels, H, W) -> logits (B, K, H, W)."""
        return self.conv(self.dropout(maps))  # type: ignore[no-any-return]


def has_batch_norm(module: nn.Module) -> bool:
    """Whether any part of `module` normalizes over the batch."""
    return any(isinstance(part, _BatchNorm) for part in module.modules())


@torch.no_grad()
def measure_statistics(module: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of all batch norms by the plain mean over `batches`, inputs of `module`.

    All other parts stay in eval mode, and so does `module` afterwards.
    """
    norms = [part for part in module.eval().modules() if isinstance(part, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch: cumulative mean
        norm.train()
    for batch in batches:
        module(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    module.eval()


@contextmanager
def unrecorded_statistics(module: nn.Module) -> Iterator[None]:
    """Keep batch norms of `module` from updating their running statistics, without changing their outputs."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False  # a momentum of 0 would still count the batch
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
