"""Domain disentangled module: features that two styles of one image share, and features distinct to each."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsseg.methods.dasegnet.recipe import NeckConfig

Pair = tuple[Tensor, Tensor]
"""Source style and target style of one image, same shape."""


class DistinctPurification(nn.Module):
    """DSM: distributes each channel over the two styles by weights that sum to 1 and depend on both.

    Source: ST-DASegNet's `DSKNeck`; its softmax over two logits is the sigmoid of their difference.
    """

    def __init__(self, channels: int, config: NeckConfig) -> None:
        super().__init__()
        width = max(channels // config.reduction, config.min_width)
        self.squeeze = nn.Linear(channels, width)
        self.weigh_source = nn.Linear(width, channels)
        self.weigh_target = nn.Linear(width, channels)

    def forward(self, source: Tensor, target: Tensor) -> Pair:
        """Two (N, C, H, W) -> the same two, each times its share of the channel."""
        squeezed = self.squeeze((source + target).mean(dim=(2, 3)))
        weight = self.weigh_source.weight - self.weigh_target.weight
        bias = self.weigh_source.bias - self.weigh_target.bias
        share = torch.sigmoid(F.linear(squeezed, weight, bias))[..., None, None]
        return source * share, target * (1.0 - share)


class UniversalExtraction(nn.Module):
    """DUM: channel attention that favours channels unlike the features common to both styles.

    Source: the attention of ST-DASegNet's `DS2Neck`. The paper draws a softmax, but the code computes a soft minimum,
    as this does. Energies are sums over positions, which sharpen the attention on larger maps, or means.
    """

    def __init__(self, channels: int, config: NeckConfig) -> None:
        super().__init__()
        self.energies = config.energies
        self.out_channels = max(channels // config.reduction, config.min_width)
        self.common = _conv(channels, channels)
        self.reduce_source = _conv(channels, self.out_channels)
        self.reduce_target = _conv(channels, self.out_channels)

    def forward(self, source: Tensor, target: Tensor) -> Pair:
        """Two (N, C, H, W) -> two (N, out_channels, H, W)."""
        size = source.shape[-2:]
        common = F.relu(self.common((source + target) / 2)).flatten(2).transpose(1, 2)
        rows = (source.flatten(2), target.flatten(2))
        # energies reach the hundreds, where the soft minimum is almost hard: half precision would select other channels
        with torch.autocast(source.device.type, enabled=False):
            scale = 1.0 if self.energies == "sum" else 1.0 / common.shape[1]
            source_energy, target_energy = (scale * torch.bmm(row.float(), common.float()) for row in rows)
            attention = (torch.softmax(-source_energy, dim=-1) + torch.softmax(-target_energy, dim=-1)) / 2
        mixed_source, mixed_target = (
            torch.bmm(attention.to(row.dtype), row).reshape(row.shape[0], -1, *size) for row in rows
        )
        return F.relu(self.reduce_source(mixed_source)), F.relu(self.reduce_target(mixed_target))


class DisentangledLevel(nn.Module):
    """DSM, followed by the channels of a DUM if `universal`."""

    def __init__(self, channels: int, config: NeckConfig, *, universal: bool) -> None:
        super().__init__()
        self.distinct = DistinctPurification(channels, config)
        self.universal = UniversalExtraction(channels, config) if universal else None
        self.out_channels = channels + (self.universal.out_channels if self.universal is not None else 0)

    def forward(self, source: Tensor, target: Tensor) -> Pair:
        """Two (N, C, H, W) -> two (N, out_channels, H, W)."""
        distinct = self.distinct(source, target)
        if self.universal is None:
            return distinct  # type: ignore[no-any-return]
        universal = self.universal(source, target)
        return torch.cat([distinct[0], universal[0]], dim=1), torch.cat([distinct[1], universal[1]], dim=1)


class DisentangledNeck(nn.Module):
    """One level module per used pyramid level; other levels are returned unchanged."""

    def __init__(self, in_channels: Sequence[int], config: NeckConfig, *, used: Sequence[int] | None = None) -> None:
        """Build the levels.

        Args:
            in_channels: of each level.
            config: of all levels; `ds2` has the DUM at the last level only.
            used: levels that a decoder reads; None for all. Modules of other levels would never get gradients.
        """
        super().__init__()
        last = len(in_channels) - 1
        made = {
            str(i): DisentangledLevel(channels, config, universal=config.type == "ds2" and i == last)
            for i, channels in enumerate(in_channels)
            if used is None or i in used
        }
        self.levels = nn.ModuleDict(made)
        self.out_channels: tuple[int, ...] = tuple(
            made[str(i)].out_channels if str(i) in made else channels for i, channels in enumerate(in_channels)
        )
        """Channels of every returned level."""

    def forward(
        self, source: Sequence[Tensor], target: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Two pyramids of the same images, source style and target style -> both refined."""
        pairs = [
            self.levels[str(i)](s, t) if str(i) in self.levels else (s, t)
            for i, (s, t) in enumerate(zip(source, target, strict=True))
        ]
        return tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv
