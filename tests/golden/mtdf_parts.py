"""Networks that RS-MTDF's golden cases are run through: small students, and stand-ins that return recorded maps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rsseg.backbones.backbone import Backbone, BackboneInfo, assemble
from rsseg.backbones.zoo import ZooEntry
from rsseg.checkpoint import load_into
from rsseg.config import BackboneConfig
from rsseg.layers.decoders import DPTHead
from rsseg.methods.mtdf.importer import rename_tensors
from rsseg.methods.mtdf.method import Teacher
from rsseg.methods.mtdf.network import MTDFSegmenter, Translator
from rsseg.methods.mtdf.recipe import TeacherConfig
from tests.golden.builders import as_precise, make_task
from tests.golden.case import Case
from tests.golden.settings import Settings, plain

PATCH = 14
CLIP_INPUT = 224
CLIP_GRID = (16, 16)


def tokens_to_map(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, N, D) -> (B, D, *grid)."""
    return tokens.transpose(1, 2).unflatten(2, tuple(grid))


def map_to_tokens(feature_map: Tensor) -> Tensor:
    """(B, D, h, w) -> (B, N, D)."""
    return feature_map.flatten(2).transpose(1, 2)


def dinov2(hyper: Settings, *, image_size: int) -> Backbone:
    """Small DINOv2 without normalization of its images, with the final norm on every map."""
    for key, value in (("interpolate_offset", 0.1), ("antialias", False), ("layer_scale", True), ("ffn", "mlp")):
        hyper.expect(key, value)
    hyper.expect("patch_size", PATCH)
    out_indices = plain(hyper["taps"])
    arguments = {name: hyper[name] for name in ("embed_dim", "depth", "num_heads")} | {"img_size": image_size}
    entry = ZooEntry(
        name="small",
        timm_name="vit_small_patch14_dinov2",
        kind="vit",
        millions=0,
        strides=(PATCH,) * len(out_indices),
        out_indices=tuple(out_indices),
        arguments=arguments | ({"mlp_ratio": hyper["mlp_ratio"]} if "mlp_ratio" in hyper else {}),
    )
    config = BackboneConfig(name="small", out_norm="all", pos_embed="dinov2", statistics="data", pad="error")
    return as_precise(assemble(entry, config, make_task(2), load_weights=False))


class Recorded(nn.Module):
    """Returns the maps that a function gives for the images' batch size and side."""

    def __init__(self, maps: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.maps(images)


def recorded_backbone(maps: Callable[[Tensor], tuple[Tensor, ...]], channels: Sequence[int]) -> Backbone:
    """Backbone that returns recorded maps."""
    count = len(channels)
    info = BackboneInfo(
        "recorded", "recorded", "vit", tuple(channels), (PATCH,) * count, PATCH, PATCH, (0.0,) * 3, (1.0,) * 3, "none"
    )
    return Backbone(info, Recorded(maps))


def recorded_teacher(tokens: Tensor, grid: Sequence[int], **options: Any) -> Teacher:
    """Teacher that returns recorded tokens; a single row is repeated over the batch."""
    target = tokens_to_map(tokens, grid)
    backbone = recorded_backbone(lambda images: (target.expand(len(images), -1, -1, -1),), [target.shape[1]])
    config = TeacherConfig(
        name="recorded", backbone={"name": "recorded"}, teacher_input="student_normalized", **options
    )
    return Teacher(backbone, config)


def recorded_teachers(case: Case, grid: Sequence[int]) -> dict[str, Teacher]:
    """The published pair, returning the case's tokens."""
    return {
        "dino": recorded_teacher(case.tensors["in.teacher_dino"], grid),
        "clip": recorded_teacher(case.tensors["in.teacher_clip"], CLIP_GRID, input_size=CLIP_INPUT),
    }


def make_translators(hyper: Settings, width: int, hidden: int, *, project: bool = True) -> dict[str, Translator]:
    """The published pair: DINOv2 on the full crop, CLIP on a second pass."""
    options = {"student_channels": width, "hidden": hidden, "project": project}
    return {
        "dino": Translator(teacher_channels=hyper["dino_dim"], **options),
        "clip": Translator(teacher_channels=hyper["clip_dim"], input_size=CLIP_INPUT, **options),
    }


def make_student(hyper: Settings, state: Mapping[str, Tensor]) -> MTDFSegmenter:
    """The whole student with given weights under the authors' names."""
    width, task = hyper["embed_dim"], make_task(hyper["nclass"])
    hyper.expect("clip_input", CLIP_INPUT)
    backbone = dinov2(hyper, image_size=hyper["pos_grid"] * PATCH)
    own, dino, clip = plain(hyper.get("fusion", [0.8, 0.1, 0.1]))
    student = MTDFSegmenter(
        backbone,
        make_head(hyper, width),
        task,
        translators=make_translators(hyper, width, hyper["translator_hidden"]),
        fusion_weights={"dino": dino, "clip": clip},
        student_weight=own,
    )
    load_into(student, rename_tensors(state), "golden")
    return student


def make_head(hyper: Settings, width: int) -> DPTHead:
    """A head over four maps of one width; align_corners everywhere, no batch norm."""
    hyper.expect("use_bn", False)
    hyper.expect("align_corners", True)
    return DPTHead(
        [width] * 4, [PATCH] * 4, hyper["nclass"], widths=plain(hyper["out_channels"]), features=hyper["features"]
    )


def grid_of(hyper: Settings) -> tuple[int, int]:
    """Rows and columns of tokens, stated as such or as pixels."""
    if "patch_h" in hyper:
        return hyper["patch_h"], hyper["patch_w"]
    return hyper["height"] // PATCH, hyper["width"] // PATCH


def check_sizes(hyper: Settings, **actual: int) -> None:
    """Fail if a stated size differs from that of the tensors."""
    for name, size in actual.items():
        hyper.expect(name, size)


def compare_scalars(case: Case, found: Mapping[str, Tensor]) -> None:
    """Compare the scalars that the JSON repeats."""
    scalars = case.meta.get("scalars", {})
    for name, value in found.items():
        if name in scalars:
            case.close(f"scalar {name}", torch.as_tensor(value), scalars[name], "scalar")
