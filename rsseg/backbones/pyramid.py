"""Convolutional and hierarchical networks: maps of falling resolution."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import Tensor, nn

from rsseg.backbones.norm import LayerNorm2d


class Pyramid(nn.Module):
    """Levels of a network, each with a LayerNorm of its own where asked.

    The norm acts on the returned copy only; the next stage gets the plain map.
    """

    def __init__(
        self,
        network: Any,
        *,
        indices: Mapping[int, int],
        channels: Mapping[int, int],
        normed: Sequence[int],
        stages: Sequence[Sequence[nn.Module]],
    ) -> None:
        """Take a network apart from its head.

        Args:
            network: has timm's `forward_intermediates`.
            indices: level -> index among the network's own intermediates, in the order in which maps are returned.
            channels: of each of these levels.
            normed: levels that get a LayerNorm.
            stages: the parts of `network` that compute level 0 (stem included), then level 1, and so on.
        """
        super().__init__()
        self.network = network
        self.indices = dict(indices)
        self.norms = nn.ModuleDict({str(level): LayerNorm2d(channels[level]) for level in indices if level in normed})
        self._stages = tuple(tuple(parts) for parts in stages)
        self._frozen: tuple[nn.Module, ...] = ()

    def freeze(self, stages: int) -> None:
        """Keep the first `stages` levels as they are, stem included: no gradient, always in eval mode.

        The levels' own norms go on training, as mmpretrain's ConvNeXt has it.
        """
        self._frozen = tuple(part for parts in self._stages[:stages] for part in parts)
        for part in self._frozen:
            part.requires_grad_(False).eval()

    def parameters_by_depth(self) -> list[list[nn.Parameter]]:
        """One list per level; the stem counts with the first, a level's own norm with its level."""
        levels = [[p for part in parts for p in part.parameters()] for parts in self._stages]
        for level, norm in self.norms.items():
            levels[int(level)] += norm.parameters()
        return levels

    def train(self, mode: bool = True) -> Self:
        """Switch everything but the frozen stages."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalized images (B, C, H, W) -> NCHW maps, one per level."""
        ascending = sorted(self.indices.values())
        maps = self.network.forward_intermediates(images, indices=ascending, intermediates_only=True)
        found = dict(zip(ascending, maps, strict=True))
        return tuple(self._normed(level, found[index]) for level, index in self.indices.items())

    def _normed(self, level: int, plain: Tensor) -> Tensor:
        key = str(level)
        return self.norms[key](plain) if key in self.norms else plain
