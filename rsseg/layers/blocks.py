"""Building blocks that decoders share."""

from torch import Tensor, nn


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
