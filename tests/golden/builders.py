"""Shared by the drivers of several methods: tasks, backbones for normalized images, gradients, norms."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rsseg.backbones.backbone import Backbone, BackboneInfo
from rsseg.backbones.timm_adapter import Built
from rsseg.metrics import Scores
from rsseg.task import ClassInfo, Task
from tests.golden.settings import Settings, plain

BATCH_NORM = {"BN", "SyncBN", "BN2d"}


def make_task(num_classes: int) -> Task:
    """Task with three bands of mean 0 and standard deviation 1."""
    return Task(
        name="golden",
        classes=tuple(ClassInfo(name=f"c{i}", value=i, color=(i, i, i)) for i in range(num_classes)),
        bands=("red", "green", "blue"),
        scale=(1.0,) * 3,
        offset=(0.0,) * 3,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
    )


def unnormalized(built: Built, *, patch: int | None = None, multiple: int | None = None, bands: int = 3) -> Backbone:
    """Backbone without normalization: recorded images are normalized already."""
    info = BackboneInfo(
        name="golden",
        timm_name="golden",
        kind="vit" if patch else "pyramid",
        channels=built.channels,
        strides=built.strides,
        input_multiple=multiple or patch or max(built.strides),
        patch_size=patch,
        mean=(0.0,) * bands,
        std=(1.0,) * bands,
        license="none",
    )
    return as_precise(Backbone(info, built.body))


class _Float64Backbone(Backbone):
    """Backbone that computes in float64, which the recipe's types do not include."""

    def forward_normalized(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.body(self._padded(images).double()))


def as_precise(backbone: Backbone) -> Backbone:
    """The backbone itself, or a float64 version if that is the default type."""
    if torch.get_default_dtype() != torch.float64:
        return backbone
    precise = _Float64Backbone(backbone.info, backbone.body, pad=backbone.pad)
    precise.body.double()
    return precise


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load copies of tensors strictly."""
    module.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, strict=True)


def gradients(module: nn.Module, *, missing: str = "zero") -> dict[str, Tensor]:
    """Gradients by parameter name; missing ones are zeros, or absent with `missing="leave out"`."""
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    if missing == "leave out":
        return {name: grad for name, grad in found.items() if grad is not None}
    zeros = {name: torch.zeros_like(parameter) for name, parameter in module.named_parameters()}
    return zeros | {name: grad for name, grad in found.items() if grad is not None}


def grad_of(tensor: Tensor) -> Tensor:
    """Gradient of an input after backward."""
    assert tensor.grad is not None, "no gradient reached this input"
    return tensor.grad


def norm(tensors: Iterable[Tensor]) -> float:
    """L2 norm of all values together."""
    return sum(float(tensor.detach().double().square().sum()) for tensor in tensors) ** 0.5


def total(losses: Mapping[str, Tensor]) -> Tensor:
    """Sum of the losses."""
    return torch.stack(list(losses.values())).sum()


def images_of(stored: Tensor) -> Tensor:
    """The recorded exact transform (value - 127.5) / 64 of 8-bit images; others are transformed already."""
    return (stored.to(torch.get_default_dtype()) - 127.5) / 64 if stored.dtype == torch.uint8 else stored


def per_level(value: int | Sequence[int], levels: int) -> list[int]:
    """One value per level, where a single one stands for all."""
    return [value] * levels if isinstance(value, int) else list(value)


def check_norm(config: Settings) -> None:
    """Fail unless a head's norm is batch norm; synchronization makes no difference in one process."""
    if config.get("norm_cfg") is not None:
        norm_cfg = plain(config["norm_cfg"])
        assert norm_cfg.pop("type") in BATCH_NORM
        assert norm_cfg.pop("requires_grad", True)
        assert not norm_cfg, f"norm_cfg: unknown {norm_cfg}"


def check_loss(config: Settings) -> dict[str, Any]:
    """Class weights and weight of a head's cross-entropy, which has no other settings."""
    loss = config["loss_decode"]
    loss.expect("type", "CrossEntropyLoss")
    loss.expect("use_sigmoid", False)
    loss.expect("avg_non_ignore", False)
    loss.expect("reduction", "mean")
    return {"class_weight": loss.get("class_weight"), "loss_weight": loss.get("loss_weight", 1.0)}


def optimizer_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of torch's optimizer of the same name; others fail."""
    known = {"lr", "betas", "eps", "weight_decay", "momentum", "nesterov", "dampening", "amsgrad"}
    values = {key: plain(settings[key]) for key in settings if key in known}
    return {key: tuple(value) if key == "betas" else value for key, value in values.items()}


def mmseg_scores(result: Scores) -> tuple[dict[str, list[float | None]], dict[str, float | None]]:
    """Scores per class and their means under mmsegmentation's names; None is its NaN.

    A class that is never predicted, or predicted but never right, has no F score there, and drops out of the mean.
    """
    seen = [c.f1 if c.precision is not None and c.recall is not None and c.f1 else None for c in result.classes]
    per_class: dict[str, list[float | None]] = {
        "aAcc": [result.oa],
        "IoU": [c.iou for c in result.classes],
        "Acc": [c.recall for c in result.classes],
        "Dice": [c.f1 for c in result.classes],
        "Fscore": seen,
        "Precision": [c.precision for c in result.classes],
        "Recall": [c.recall for c in result.classes],
    }
    means = {
        "aAcc": result.oa,
        "mIoU": result.miou,
        "mAcc": result.macc,
        "mDice": result.mf1,
        "mFscore": result.variants["mf1_nan_skipped"],
        "mPrecision": result.mprecision,
        "mRecall": result.macc,
    }
    return per_class, means
