"""Networks that golden cases are run through: small students, and stand-ins that return recorded maps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rsseg.backbones.backbone import Backbone, BackboneInfo
from rsseg.backbones.table import ZooEntry
from rsseg.backbones.zoo import assemble
from rsseg.checkpoint import load_into
from rsseg.config import BackboneConfig
from rsseg.layers.dpt import DPTHead
from rsseg.methods.mtdf.importer import rename_tensors
from rsseg.methods.mtdf.method import Teacher
from rsseg.methods.mtdf.network import MTDFSegmenter, Translator
from rsseg.task import ClassInfo, Task

CLIP_INPUT = 224


def make_task(num_classes: int) -> Task:
    """Three bands that normalization leaves as they are."""
    return Task(
        name="golden",
        classes=tuple(ClassInfo(name=f"c{i}", value=i, color=(i, i, i)) for i in range(num_classes)),
        bands=("red", "green", "blue"),
        scale=(1, 1, 1),
        offset=(0, 0, 0),
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )


def tokens_to_map(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, N, D) -> (B, D, *grid), float32."""
    return tokens.float().transpose(1, 2).unflatten(2, tuple(grid))


def map_to_tokens(feature_map: Tensor) -> Tensor:
    """(B, D, h, w) -> (B, N, D)."""
    return feature_map.flatten(2).transpose(1, 2)


def dinov2(hyper: Mapping[str, Any], *, image_size: int) -> Backbone:
    """A small DINOv2 with random weights that takes normalized images."""
    names = ("embed_dim", "depth", "num_heads")
    entry = ZooEntry(
        name="small",
        timm_name="vit_small_patch14_dinov2",
        kind="vit",
        millions=0,
        strides=(14,) * len(hyper["taps"]),
        out_indices=tuple(hyper["taps"]),
        arguments={name: hyper[name] for name in names} | {"img_size": image_size},
    )
    config = BackboneConfig(name="small", out_norm="all", pos_embed="dinov2", statistics="data", pad="error")
    return assemble(entry, config, make_task(2), load_weights=False)


class Recorded(nn.Module):
    """Returns the maps that a function gives for the images' batch size and side."""

    def __init__(self, maps: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.maps(images)


def recorded_backbone(maps: Callable[[Tensor], tuple[Tensor, ...]], channels: Sequence[int]) -> Backbone:
    """A backbone whose maps are recorded ones."""
    count = len(channels)
    info = BackboneInfo(
        "recorded", "recorded", "vit", tuple(channels), (14,) * count, 14, 14, (0.0,) * 3, (1.0,) * 3, "none"
    )
    return Backbone(info, Recorded(maps))


def recorded_teacher(tokens: Tensor, grid: Sequence[int], **options: Any) -> Teacher:
    """A teacher that always returns the recorded tokens; one row stands for the whole batch."""
    target = tokens_to_map(tokens, grid)
    backbone = recorded_backbone(lambda images: (target.expand(len(images), -1, -1, -1),), [target.shape[1]])
    return Teacher(backbone, student_normalized=True, **options)


def make_translators(hyper: Mapping[str, Any], width: int, hidden: int) -> dict[str, Translator]:
    """The published pair: DINOv2 on the full crop, CLIP on a second pass."""
    return {
        "dino": Translator(student_channels=width, teacher_channels=hyper["dino_dim"], hidden=hidden),
        "clip": Translator(
            student_channels=width, teacher_channels=hyper["clip_dim"], hidden=hidden, input_size=CLIP_INPUT
        ),
    }


def make_student(hyper: Mapping[str, Any], state: Mapping[str, Tensor]) -> MTDFSegmenter:
    """The whole student with given weights under the authors' names."""
    width, task = hyper["embed_dim"], make_task(hyper["nclass"])
    backbone = dinov2(hyper, image_size=hyper["pos_grid"] * 14)
    head = DPTHead([width] * 4, [14] * 4, hyper["nclass"], widths=hyper["out_channels"], features=hyper["features"])
    _, dino, clip = hyper.get("fusion", (0.8, 0.1, 0.1))
    student = MTDFSegmenter(
        backbone,
        head,
        task,
        translators=make_translators(hyper, width, hyper["translator_hidden"]),
        fusion_weights={"dino": dino, "clip": clip},
    )
    load_into(student, rename_tensors(state), "golden")
    return student


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient by name; a parameter without one fails."""
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    missing = [name for name, grad in found.items() if grad is None]
    assert not missing, f"no gradient: {missing}"
    return {name: grad for name, grad in found.items() if grad is not None}


def compare(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, rtol: float, atol: float, summed: bool = False
) -> None:
    """Every expected tensor within tolerance, by name.

    `summed`: for gradients of weights, which are sums over all positions, rtol is taken of the tensor's largest entry.
    The recorded float32 values are up to 1.9 entry-wise tolerances away from the same formula in float64.
    """
    assert expected
    for name, tensor in expected.items():
        largest = float(tensor.abs().max()) if summed else 0.0
        torch.testing.assert_close(
            actual[name].detach().to(tensor.dtype),
            tensor,
            rtol=0.0 if summed else rtol,
            atol=atol + rtol * largest,
            msg=lambda text, name=name: f"{name}: {text}",
        )
