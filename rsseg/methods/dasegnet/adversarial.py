"""Adversarial alignment of one style's features: the discriminator and the losses on both sides."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from rsseg.errors import RecipeError
from rsseg.layers.blocks import resize_logits
from rsseg.methods.dasegnet.recipe import AdversarialConfig, GanLoss


@dataclass(frozen=True)
class Alignment:
    """Features (B, C, h, w) of one student.

    own       features of images of the domain whose style the student learns; `other`: of the other domain
    own_size  (H, W) of these images; `other_size` likewise
    """

    own: Tensor
    other: Tensor
    own_size: Sequence[int]
    other_size: Sequence[int]


@dataclass(frozen=True)
class AdversarialTerms:
    """Weighted scalars: `align` trains the student, `real` and `fake` the discriminator."""

    align: Tensor
    real: Tensor
    fake: Tensor


def adversarial_terms(discriminator: nn.Module, alignment: Alignment, config: AdversarialConfig) -> AdversarialTerms:
    """Losses of the student, which aligns the other domain's features with its own, and of the discriminator."""
    own, other = spatial_softmax(alignment.own.detach()), spatial_softmax(alignment.other)
    fooled = upsampled(without_param_grad(discriminator, other), alignment.other_size)
    if own.shape[1:] == other.shape[1:]:
        judged = discriminator(torch.cat([own, other.detach()])).split([len(own), len(other)])
    else:
        judged = (discriminator(own), discriminator(other.detach()))
    weight = config.weight if config.weight_on_discriminators else 1.0
    loss = partial(gan_loss, loss=config.loss)
    return AdversarialTerms(
        align=config.weight * loss(fooled, real=True),
        real=weight * loss(upsampled(judged[0], alignment.own_size), real=True, for_discriminator=True),
        fake=weight * loss(upsampled(judged[1], alignment.other_size), real=False, for_discriminator=True),
    )


def spatial_softmax(features: Tensor) -> Tensor:
    """Softmax over the positions of every channel, in float32: each (H, W) map of (B, C, H, W) sums to one."""
    with torch.autocast(features.device.type, enabled=False):
        return features.float().flatten(2).softmax(dim=-1).reshape(features.shape)


def gan_loss(
    logits: Tensor,
    *,
    real: bool,
    loss: GanLoss = "vanilla",
    for_discriminator: bool = False,
    real_value: float = 1.0,
    fake_value: float = 0.0,
) -> Tensor:
    """Mean loss of a discriminator's output, not weighted.

    Args:
        logits: float, any shape.
        real: whether the output should say "real".
        loss: see `AdversarialConfig`.
        for_discriminator: `hinge` differs between the discriminator and the network that must fool it; the latter only
            raises the output, regardless of `real`.
        real_value: target of real outputs for `vanilla`, `lsgan` and `l1`.
        fake_value: target of fake outputs.

    Returns:
        Scalar, float32.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        toward_real = logits if real else -logits
        target = torch.full_like(logits, real_value if real else fake_value)
        match loss:
            case "vanilla":
                return F.binary_cross_entropy_with_logits(logits, target)
            case "lsgan":
                return F.mse_loss(logits, target)
            case "l1":
                return F.l1_loss(logits, target)
            case "wgan":
                return -toward_real.mean()
            case "wgan-logistic-ns":
                return F.softplus(-toward_real).mean()
            case "hinge":
                return F.relu(1 - toward_real).mean() if for_discriminator else -logits.mean()


def upsampled(logits: Tensor, image_size: Sequence[int]) -> Tensor:
    """Patch logits at image size, float32. A 1x1 map stays 1x1, as resizing would not change the mean loss."""
    return logits if logits.shape[-2:] == (1, 1) else resize_logits(logits, image_size)


def without_param_grad(module: nn.Module, inputs: Tensor) -> Tensor:
    """`module(inputs)` with gradients for the inputs but not for the module's parameters."""
    return functional_call(module, {name: p.detach() for name, p in module.named_parameters()}, (inputs,))  # type: ignore[no-any-return]


class PatchDiscriminator(nn.Module):
    """Convolutions of kernel 4: `convs` of stride 2 and two of stride 1; the last one gives one logit per patch.

    Instance norm after all but the first and the last, so that samples stay independent. Source: ST-DASegNet's AdapSeg.
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
        """(B, C, h, w) -> logits (B, 1, h', w'); raise `RecipeError` for a map too small for an instance norm."""
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
    """Whether kernel-4 convolutions with padding 1 fit a map of `size` and instance norms get several values."""
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
