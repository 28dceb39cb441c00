"""Features of a network, pooled over windows, and their distance to those of its training images."""

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsseg.backbones.backbone import Backbone
from rsseg.checkpoint import read_tensors, write_tensors
from rsseg.errors import UsageError, WeightsError
from rsseg.inference.predict import Network
from rsseg.inference.torch_network import TorchNetwork

REFERENCE_NAME = "applicability.safetensors"
"""File beside the model."""
WINDOW = 128
"""Side in pixels of the windows that features are pooled over, to the nearest multiple of the backbone's stride."""
NEIGHBOURS = 5
MOST_VECTORS = 1000
_SHRINKAGE = 0.1
"""Share of the mean standard deviation that is added to that of each feature, for small training sets."""
_CHUNK = 4096


def feature_backbone(network: nn.Module) -> Backbone:
    """The backbone whose last map is used: the first one of the network."""
    return next(part for part in network.modules() if isinstance(part, Backbone))


def window_cells(network: nn.Module) -> int:
    """Side of a window in cells of the last map."""
    return max(round(WINDOW / feature_backbone(network).info.strides[-1]), 1)


class FeatureTap:
    """Keeps the last map of a backbone for the thread that ran it."""

    def __init__(self, segmenter: nn.Module) -> None:
        """Attach to the first backbone of a network that is used for prediction only."""
        self._local = threading.local()
        feature_backbone(segmenter).register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _images: Any, maps: tuple[Tensor, ...]) -> None:
        self._local.last = maps[-1]

    def take(self) -> Tensor:
        """float32 (B, C, h, w) of this thread's last forward pass."""
        last: Tensor = self._local.last
        del self._local.last
        return last.float()


def with_features(network: Network, option: str) -> TorchNetwork:
    """The network, whose logits carry the features too; raises `UsageError` for another engine than torch."""
    if not isinstance(network, TorchNetwork):
        raise UsageError(
            f"{option} needs the features of the network, which {network.engine} does not return. Use --engine torch."
        )
    return network if network.tap is not None else replace(network, tap=FeatureTap(network.segmenter).take)


@dataclass(frozen=True, eq=False)
class Reference:
    """Pooled features of training images, and how far held-out images are from them.

    vectors: float32 (n, C), at most `MOST_VECTORS`
    mean, std: float32 (C,), of the training windows
    threshold: distance that 95 % of the held-out windows do not exceed
    cells: side of a window in cells of the backbone's last map
    model: hash of the model
    held_out: held-out images, in words
    """

    vectors: Tensor
    mean: Tensor
    std: Tensor
    threshold: float
    cells: int
    model: str
    held_out: str

    @classmethod
    def of(cls, train: Tensor, *, cells: int, model: str) -> Self:
        """Reference of training windows float32 (n, C); the threshold is infinite until `with_threshold`."""
        mean, std = train.mean(0), train.std(0, unbiased=False)
        std = std + _SHRINKAGE * std.mean() + 1e-6
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:MOST_VECTORS]
        return cls(train[order.sort().values], mean, std, float("inf"), cells, model, "")

    def with_threshold(self, held_out: Tensor, what: str) -> Self:
        """The reference with the threshold of held-out windows float32 (n, C)."""
        # A single training window is at distance 0 from itself.
        threshold = max(float(self.distances(held_out).quantile(0.95)), 1e-6)
        return replace(self, threshold=threshold, held_out=what)

    def distances(self, features: Tensor) -> Tensor:
        """float32 (n,): mean distance of features (n, C) to their nearest training windows.

        Root mean square over the features, each in units of its standard deviation.
        """
        ours, found = self._standard.to(features.device), []
        for part in torch.split(self.standardized(features), _CHUNK):
            near = torch.cdist(part, ours).topk(min(NEIGHBOURS, len(ours)), largest=False).values
            found.append(near.mean(1) / ours.shape[1] ** 0.5)
        return torch.cat(found) if found else features.new_zeros(0)

    def standardized(self, features: Tensor) -> Tensor:
        """(n, C) in units of the training windows' standard deviation."""
        return (features - self.mean.to(features.device)) / self.std.to(features.device)

    @cached_property
    def _standard(self) -> Tensor:
        return self.standardized(self.vectors)

    def applicability(self, features: Tensor) -> Tensor:
        """float32 (1, 1, h, w) for a map (C, h, w): 1 at the training data, 0.5 at the threshold, 0 far away."""
        channels, height, width = features.shape
        side = self.cells
        before, after = (side - 1) // 2, side // 2
        near = F.pad(features[None], (before, after, before, after), mode="replicate")
        pooled = F.avg_pool2d(near, side, stride=1)[0]
        distance = self.distances(pooled.reshape(channels, -1).T)
        return (1 / (1 + (distance / self.threshold) ** 2)).reshape(1, 1, height, width)

    def save(self, path: Path) -> None:
        """Write the file; raises `MachineError`."""
        about = {"threshold": self.threshold, "cells": self.cells, "model": self.model, "held_out": self.held_out}
        tensors = {"vectors": self.vectors, "mean": self.mean, "std": self.std}
        write_tensors(path, {name: t.contiguous() for name, t in tensors.items()}, {"rsseg": json.dumps(about)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file; raises `WeightsError`."""
        tensors, metadata = read_tensors(path)
        try:
            about: Mapping[str, Any] = json.loads(metadata.get("rsseg", "{}"))
            return cls(tensors["vectors"], tensors["mean"], tensors["std"], **about)
        except (KeyError, TypeError, ValueError):
            raise WeightsError(f"{path}: not a file of this version. Delete it; it is made again.") from None
