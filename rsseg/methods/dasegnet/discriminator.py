"""Feature discriminators: do last-stage features come from the domain whose style they bear, or from the other?"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from rsseg.errors import RecipeError


class PatchDiscriminator(nn.Module):
    """Convolutions of kernel 4: `convs` of stride 2 and two of stride 1; the last one gives one logit per patch.

    Instance norm after all but the first and the last, so that samples do not mix. Source: ST-DASegNet's AdapSeg.
    """

    def __init__(self, in_channels: int, *, base_channels: int = 64, convs: int = 2) -> None:
        super().__init__()
        widths = [base_channels * min(2**n, 8) for n in range(convs + 1)]
        self.strides = (*[2] * convs, 1, 1)
        pairs = zip([in_channels, *widths[:-1]], widths, self.strides[:-1], strict=True)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, stride=stride, padding=1) for a, b, stride in pairs)
        self.classify = nn.Conv2d(widths[-1], 1, 4, padding=1)
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, a=0.2, mode="fan_out", nonlinearity="leaky_relu")  # type: ignore[arg-type]
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> logits (B, 1, h', w'); raises `RecipeError` for a map too small for an instance norm."""
        if not accepts_map(features.shape[-2:], self.strides):
            smallest = smallest_map(self.strides)
            raise RecipeError(
                f"The discriminator got features of {features.shape[-2]} x {features.shape[-1]} pixels; with "
                f"{len(self.convs) - 1} strided convolutions it needs {smallest} x {smallest} or more. "
                "Enlarge the crop (data.augment.crop_size), or lower adversarial.convs."
            )
        maps = F.leaky_relu(self.convs[0](features), 0.2)
        for conv in self.convs[1:]:
            maps = F.leaky_relu(F.instance_norm(conv(maps)), 0.2)
        return self.classify(maps)  # type: ignore[no-any-return]


def accepts_map(size: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether kernel-4 convolutions with padding 1 fit a map of `size`, and instance norms see more than one value."""
    height, width = size
    for layer, stride in enumerate(strides):
        height, width = ((side - 2) // stride + 1 for side in (height, width))
        normalized = 0 < layer < len(strides) - 1
        if min(height, width) < 1 or (normalized and height * width < 2):
            return False
    return True


def smallest_map(strides: Sequence[int]) -> int:
    """Side of the smallest square map that a discriminator with these strides accepts."""
    side = 1
    while not accepts_map((side, side), strides):
        side += 1
    return side
