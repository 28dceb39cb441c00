"""Decoders: feature maps of several levels -> logits."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsseg.layers.blocks import Classifier, ConvBNReLU, resize

PYRAMID_FACTORS = (4, 2, 1, 0.5)
"""Size factors that make four maps of one stride a pyramid."""


class UPerNet(nn.Module):
    """Pyramid pooling on the last level, then a top-down feature pyramid.

    Source: Xiao et al. 2018 (arXiv 1807.10221). With one level it is the pyramid pooling and one more convolution.
    In train mode a pool scale of 1 needs two samples: its batch norm gets one value per sample and channel.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.align_corners = tuple(in_channels), align_corners
        *lower, last = in_channels
        self.pool_scales = tuple(pool_scales)
        self.pools = nn.ModuleList(ConvBNReLU(last, channels, kernel=1) for _ in pool_scales)
        self.pyramid = ConvBNReLU(last + len(self.pool_scales) * channels, channels, kernel=3)
        self.laterals = nn.ModuleList(ConvBNReLU(width, channels, kernel=1) for width in lower)
        self.smooths = nn.ModuleList(ConvBNReLU(channels, channels, kernel=3) for _ in lower)
        self.fusion = ConvBNReLU(len(in_channels) * channels, channels, kernel=3)
        self.classifier = Classifier(channels, num_classes, dropout=dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """One (B, in_channels[i], H_i, W_i) per level -> logits (B, K, H_0, W_0)."""
        levels = [lateral(level) for lateral, level in zip(self.laterals, maps[:-1], strict=True)]
        levels.append(self._pool(maps[-1]))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + self._resize(levels[i], levels[i - 1])
        smooth = [conv(level) for conv, level in zip(self.smooths, levels[:-1], strict=True)]
        stacked = torch.cat([self._resize(level, levels[0]) for level in (*smooth, levels[-1])], dim=1)
        return self.classifier(self.fusion(stacked))  # type: ignore[no-any-return]

    def _pool(self, last: Tensor) -> Tensor:
        pooled = [
            self._resize(conv(_pool_to(last, scale)), last)
            for conv, scale in zip(self.pools, self.pool_scales, strict=True)
        ]
        return self.pyramid(torch.cat([last, *pooled], dim=1))  # type: ignore[no-any-return]

    def _resize(self, maps: Tensor, like: Tensor) -> Tensor:
        return resize(maps, like.shape[-2:], align_corners=self.align_corners)


def _pool_to(maps: Tensor, side: int) -> Tensor:
    """Adaptive average pooling, (B, C, H, W) -> (B, C, side, side)."""
    if not torch.onnx.is_in_onnx_export():
        return F.adaptive_avg_pool2d(maps, side)
    # ONNX has no counterpart for sides that do not divide the map: average by two matrices, of the same cells.
    rows, columns = (_cell_means(length, side, maps) for length in maps.shape[-2:])
    return rows @ maps @ columns.transpose(0, 1)


def _cell_means(length: int, cells: int, like: Tensor) -> Tensor:
    """(cells, length): weights of the pixels of each cell of adaptive pooling, which may overlap."""
    pixels, cell = torch.arange(length, device=like.device), torch.arange(cells, device=like.device)[:, None]
    first, end = cell * length // cells, ((cell + 1) * length + cells - 1) // cells
    inside = ((pixels >= first) & (pixels < end)).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


class SegFormerHead(nn.Module):
    """Projects every level to one width, resizes it to the first level and fuses all by a 1x1 convolution.

    Source: Xie et al. 2021 (arXiv 2105.15203). The paper resizes, stacks and convolves. A 1x1 convolution and bilinear
    resizing commute, so each level is first convolved by its part of the weight at its own size: equal up to rounding,
    faster, and without storing the stack of full-size maps.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: int = 256,
        dropout: float = 0.1,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.align_corners = tuple(in_channels), align_corners
        self.projections = nn.ModuleList(ConvBNReLU(width, channels, kernel=1) for width in in_channels)
        self.fusion = ConvBNReLU(len(in_channels) * channels, channels, kernel=1)
        self.classifier = Classifier(channels, num_classes, dropout=dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """One (B, in_channels[i], H_i, W_i) per level -> logits (B, K, H_0, W_0)."""
        return self.classifier(self.fusion.relu(self.fusion.bn(self._fused(maps))))  # type: ignore[no-any-return]

    def _fused(self, maps: Sequence[Tensor]) -> Tensor:
        parts = [
            F.conv2d(projection(level), weight)
            for projection, weight, level in zip(
                self.projections, self.fusion.conv.weight.chunk(len(maps), dim=1), maps, strict=True
            )
        ]
        fused = parts[0]
        for part in parts[1:]:
            fused.add_(resize(part, fused.shape[-2:], align_corners=self.align_corners))
        return fused


class LinearHead(nn.Module):
    """Batch norm and one 1x1 convolution per level, summed at the first level's size.

    The linear probe of DINOv2 (arXiv 2304.07193): normalizing and classifying the stacked maps is the same, as each
    level has its own part of the weight, and a 1x1 convolution and bilinear resizing commute.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in in_channels)
        self.classifiers = nn.ModuleList(
            nn.Conv2d(width, num_classes, 1, bias=level == 0) for level, width in enumerate(in_channels)
        )
        for conv in self.classifiers:
            nn.init.normal_(conv.weight, std=0.01)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """One (B, in_channels[i], H_i, W_i) per level -> logits (B, K, H_0, W_0)."""
        parts = [
            classify(norm(level)) for level, norm, classify in zip(maps, self.norms, self.classifiers, strict=True)
        ]
        return torch.stack([resize(part, maps[0].shape[-2:]) for part in parts]).sum(dim=0)


class FCNHead(nn.Module):
    """A few 3x3 convolutions on one map; the usual auxiliary head.

    Source: Long et al. 2015 (arXiv 1411.4038), in the form of the common segmentation code bases.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 256,
        num_convs: int = 1,
        concat_input: bool = False,
        dropout: float = 0.1,
    ) -> None:
        """Apply `num_convs` convolutions; `concat_input` then concatenates the input and applies one more."""
        super().__init__()
        widths = [in_channels, *[channels] * num_convs]
        self.convs = nn.Sequential(*(ConvBNReLU(a, b, kernel=3) for a, b in pairwise(widths)))
        self.join = ConvBNReLU(in_channels + channels, channels, kernel=3) if concat_input else None
        self.classifier = Classifier(channels, num_classes, dropout=dropout)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> logits (B, K, H, W)."""
        features = self.convs(maps)
        if self.join is not None:
            features = self.join(torch.cat([maps, features], dim=1))
        return self.classifier(features)  # type: ignore[no-any-return]


class SeparableConv(nn.Module):
    """A 3x3 convolution per channel, then a 1x1 convolution across channels; batch norm and ReLU after both."""

    def __init__(self, in_channels: int, out_channels: int, *, dilation: int = 1) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, 3, padding=dilation, dilation=dilation, groups=in_channels, bias=False
        )
        self.bn = nn.BatchNorm2d(in_channels)
        self.pointwise = ConvBNReLU(in_channels, out_channels, kernel=1)
        nn.init.kaiming_normal_(self.depthwise.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, maps: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        return self.pointwise(F.relu(self.bn(self.depthwise(maps)), inplace=True))  # type: ignore[no-any-return]


class SeparableASPPHead(nn.Module):
    """Atrous pyramid on the last level, refined with the first.

    Source: Chen et al. 2018 (arXiv 1802.02611). In train mode the batch norm of the pooled branch, with one value per
    sample and channel, needs two samples.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: int = 512,
        dilations: Sequence[int] = (1, 12, 24, 36),
        low_channels: int = 48,
        dropout: float = 0.1,
    ) -> None:
        """Build the branches.

        Args:
            in_channels: per level; only the first and the last are used.
            num_classes: of the logits.
            channels: width of every branch and of the output.
            dilations: one branch each; 1 makes it a 1x1 convolution.
            low_channels: width of the first level after its projection.
            dropout: of the classifier, whole channels.
        """
        super().__init__()
        first, last = in_channels[0], in_channels[-1]
        self.pool = ConvBNReLU(last, channels, kernel=1)
        self.branches = nn.ModuleList(
            ConvBNReLU(last, channels, kernel=1) if dilation == 1 else SeparableConv(last, channels, dilation=dilation)
            for dilation in dilations
        )
        self.bottleneck = ConvBNReLU((len(dilations) + 1) * channels, channels, kernel=3)
        self.low = ConvBNReLU(first, low_channels, kernel=1)
        self.refine = nn.Sequential(SeparableConv(channels + low_channels, channels), SeparableConv(channels, channels))
        self.classifier = Classifier(channels, num_classes, dropout=dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """One (B, in_channels[i], H_i, W_i) per level -> logits (B, K, H_0, W_0)."""
        first, last = maps[0], maps[-1]
        pooled = resize(self.pool(F.adaptive_avg_pool2d(last, 1)), last.shape[-2:])
        pyramid = self.bottleneck(torch.cat([pooled, *(branch(last) for branch in self.branches)], dim=1))
        pyramid = resize(pyramid, first.shape[-2:])
        return self.classifier(self.refine(torch.cat([pyramid, self.low(first)], dim=1)))  # type: ignore[no-any-return]


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
    """Four feature maps -> logits at twice the finest level's size: the head of Ranftl et al. (arXiv 2103.13413).

    In the form that UniMatch and RS-MTDF use; every resize is bilinear with aligned corners.

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
