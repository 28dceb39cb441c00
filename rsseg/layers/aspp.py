"""The DeepLabV3+ decoder with depthwise separable atrous convolutions."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsseg.layers.blocks import Classifier, ConvBNReLU
from rsseg.layers.resize import resize


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

    Source: Chen et al. 2018 (arXiv 1802.02611). In train mode it needs two samples per batch norm: the pooled branch
    has one value per sample and channel.
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
        """Make the branches.

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
