"""Batch normalization where one network sees images of several kinds in a step."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def has_batch_norm(module: nn.Module) -> bool:
    """Whether some part of `module` normalizes over the batch."""
    return any(isinstance(part, _BatchNorm) for part in module.modules())


@contextmanager
def unrecorded_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms of `module` normalize as ever, but what they see does not enter their running statistics."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
