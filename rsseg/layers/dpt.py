"""Dense prediction head of Ranftl et al. (arXiv 2103.13413), in the form that UniMatch and RS-MTDF use.

Every resize is bilinear with aligned corners.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from rsseg.layers.blocks import resize

PYRAMID_FACTORS = (4, 2, 1, 0.5)
"""Size factors that make four maps of one stride a pyramid."""


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions, each after a ReLU, with a residual. Keeps (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """float (B, C, H, W) -> the same shape."""
        # no in-place ReLU: it would also change the residual
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))  # type: ignore[no-any-return]


class FusionBlock(nn.Module):
    """Adds a finer map to a coarser one, refines the sum and resizes it to the next level."""

    def __init__(self, channels: int, *, skip: bool) -> None:
        super().__init__()
        self.skip = ResidualUnit(channels) if skip else None
        self.refine = ResidualUnit(channels)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        """x, skip float (B, C, h, w), or no skip for the coarsest level -> (B, C, *size)."""
        if self.skip is not None:
            x = x + self.skip(skip)
        # The published order is resize, then project. Bilinear weights sum to 1, so projecting first gives the same
        # result from a quarter of the pixels.
        return resize(self.project(self.refine(x)), size, align_corners=True)


class DPTHead(nn.Module):
    """Four feature maps -> logits at twice the finest level's size.

    Maps of equal stride p (of a ViT) are first resized to the strides p/4, p/2, p, 2p; maps of a pyramid, whose strides
    double from level to level, are used unchanged.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        *,
        widths: Sequence[int] = (48, 96, 192, 384),
        features: int = 64,
    ) -> None:
        """Build the head.

        Args:
            channels: of the four maps.
            strides: of the four maps, pixels.
            num_classes: channels of the logits.
            widths: channels of the four maps after their projection.
            features: channels of the fusion path.

        Raises:
            ValueError: not four maps, or strides that are neither equal nor doubling.
        """
        super().__init__()
        if not len(channels) == len(strides) == len(widths) == 4:
            raise ValueError(f"DPTHead fuses four maps; got {len(channels)} maps and {len(widths)} widths")
        self.project = nn.ModuleList(nn.Conv2d(c, w, 1) for c, w in zip(channels, widths, strict=True))
        self.reassemble = nn.ModuleList(_reassemble(strides, widths))
        self.lateral = nn.ModuleList(nn.Conv2d(w, features, 3, padding=1, bias=False) for w in widths)
        self.fuse = nn.ModuleList(FusionBlock(features, skip=level < 3) for level in range(4))
        self.predict = nn.Sequential(
            nn.Conv2d(features, features, 3, padding=1), nn.ReLU(), nn.Conv2d(features, num_classes, 1)
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Fuse from coarse to fine.

        Args:
            maps: four float (B, channels[i], H / strides[i], W / strides[i]), finest level first.

        Returns:
            float (B, num_classes, 2h, 2w) for a finest level of h x w.
        """
        levels = [
            lateral(reassemble(project(x)))
            for x, project, reassemble, lateral in zip(maps, self.project, self.reassemble, self.lateral, strict=True)
        ]
        sizes = [_size(level) for level in levels]
        targets = [(2 * sizes[0][0], 2 * sizes[0][1]), *sizes[:3]]
        path = self.fuse[3](levels[3], None, targets[3])
        for level in (2, 1, 0):
            path = self.fuse[level](path, levels[level], targets[level])
        return self.predict(path)  # type: ignore[no-any-return]


class TokenPyramid(nn.Module):
    """Resample maps of one stride, such as a ViT's, to a pyramid; channels are unchanged."""

    def __init__(self, channels: Sequence[int], factors: Sequence[float] = PYRAMID_FACTORS) -> None:
        """Build one layer per map; `factors` scale the sizes: whole numbers, or 0.5.

        Raises:
            ValueError: the numbers of maps and factors differ.
        """
        super().__init__()
        if len(channels) != len(factors):
            raise ValueError(f"the pyramid has {len(factors)} levels; got {len(channels)} maps")
        self.levels = nn.ModuleList(_resampling(width, f) for width, f in zip(channels, factors, strict=True))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """One float (B, channels[i], h, w) per level -> (B, channels[i], factors[i] * h, factors[i] * w)."""
        return [level(x) for level, x in zip(self.levels, maps, strict=True)]


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]


def _reassemble(strides: Sequence[int], widths: Sequence[int]) -> list[nn.Module]:
    """The layer per map that resizes it to the stride of its level."""
    if len(set(strides)) == 1:
        return [_resampling(width, factor) for width, factor in zip(widths, PYRAMID_FACTORS, strict=True)]
    if all(fine * 2 == coarse for fine, coarse in pairwise(strides)):
        return [nn.Identity() for _ in strides]
    raise ValueError(f"strides of four maps must be equal or double from level to level; got {tuple(strides)}")


def _resampling(width: int, factor: float) -> nn.Module:
    """A layer that multiplies height and width by `factor`."""
    if factor == 1:
        return nn.Identity()
    if factor < 1:
        return nn.Conv2d(width, width, 3, stride=2, padding=1)
    return nn.ConvTranspose2d(width, width, int(factor), stride=int(factor))
