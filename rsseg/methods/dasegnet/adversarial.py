"""Adversarial alignment of one style's features: losses of the students and of the discriminator."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from rsseg.layers.resize import resize_logits
from rsseg.methods.dasegnet.recipe import AdversarialConfig, GanLoss


@dataclass(frozen=True)
class Alignment:
    """Features (B, C, h, w) of one student.

    own          of images of the domain whose style the student has, and other of the other domain's
    own_size     (H, W) of the images behind them
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
    """The student makes the other domain's features look like its own; the discriminator tells them apart."""
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
        for_discriminator: `hinge` differs between the discriminator and the network that has to fool it; the latter
            only raises the output, whatever `real` says.
        real_value: target of real outputs for `vanilla`, `lsgan` and `l1`.
        fake_value: target of the others.

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
    """Patch logits at image size, float32. A 1x1 map stays: resized it is constant, and the loss is a mean."""
    return logits if logits.shape[-2:] == (1, 1) else resize_logits(logits, image_size)


def without_param_grad(module: nn.Module, inputs: Tensor) -> Tensor:
    """`module(inputs)` whose gradient reaches the inputs and not the module's parameters."""
    return functional_call(module, {name: p.detach() for name, p in module.named_parameters()}, (inputs,))  # type: ignore[no-any-return]
