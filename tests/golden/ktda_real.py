"""KTDA's published networks at real size, and the names in the published checkpoints."""

import re

import torch
from torch import Tensor, nn

from rsseg.backbones.backbone import create_backbone
from rsseg.methods.ktda.importer import rename_tensors
from rsseg.methods.ktda.method import make_aux_head
from rsseg.methods.ktda.network import FeatureAlignment, build_segmenter
from rsseg.recipe import load_recipe
from tests.golden.builders import make_task
from tests.golden.case import Case
from tests.golden.harness import REAL_SIZE, Drivers
from tests.golden.ktda_generated import fill, published_backbone, published_recipe
from tests.golden.ktda_whole import image_of, whole_model
from tests.golden.settings import plain

STUDENT = {"convnext-b", "convnext", "student", "backbone", "fam"}
TEACHER = {"vit-b/14", "vit-b", "vit", "visiontransformer", "dinov2-b", "dinov2-b/14", "dinov2", "teacher"}
REST = {
    "whole", "full", "complete", "model", "ktda", "distillencoderdecoder", "neck", "multilevelneck", "fmm", "vitblock",
    "uperhead", "upernet", "decode", "auxiliary", "fcnhead", "head", "heads", "and", "with", "all", "losses", "loss",
    "grass", "cloud", "published", "configuration", "geometry", "a", "the", "of", "mmpretrain", "base", "frozen",
}  # fmt: skip
"""Words that a module may consist of."""


def real_size(case: Case) -> None:
    """Compare the networks that the module names, with generated parameters; the results decide what is built."""
    words = set(re.findall(r"[a-z0-9/-]+", f"{case.meta['module'].partition(REAL_SIZE)[0]} {case.detail}".lower()))
    unknown = words - STUDENT - TEACHER - REST
    assert not unknown, f"{case.name}: no network is called {sorted(unknown)}"
    results = {key.split(".")[1] for key in (*case.tensors, *case.statistics) if key.startswith("out.")}
    single = "losses" not in " ".join(case.meta) and results <= {"student", "fam", "teacher"} | set("0123456789")
    if not single or words & {"whole", "full", "complete"}:
        whole_model(case)
    elif words & TEACHER:
        check_teacher(case)
    else:
        check_student(case)


def check_student(case: Case) -> None:
    recipe, task = published_recipe(case)
    student = published_backbone(recipe.student, task).eval()
    fam = FeatureAlignment(student.info.channels, [recipe.fam.width] * 4, grid=recipe.fam.grid).to(image_of(case).dtype)
    fill(case, [("student.", student), ("fam.", fam)])
    images = image_of(case)
    with torch.no_grad():
        maps = student(images)
        aligned = fam(maps, images.shape[-2:])
    compared = case.check_maps(maps, "out.student") + case.check_maps(aligned, "out.fam") + case.check_maps(maps, "out")
    assert compared


def check_teacher(case: Case) -> None:
    """Compare the teacher's maps; any subset may be recorded, such as the last one alone."""
    recipe, task = published_recipe(case)
    teacher = published_backbone(recipe.teacher, task).eval()
    fill(case, [("teacher.", teacher)])
    with torch.no_grad():
        maps = teacher(image_of(case))
    compared = case.check_maps(maps, "out.teacher") + case.check_maps(maps, "out")
    for key in ("out.teacher", "out.last", "out.teacher.last"):
        if case.has(key):
            case.check(maps[-1], key)
            compared += 1
    assert compared, f"{case.name}: no map is recorded"


def state_dict_keys(case: Case) -> None:
    """Compare names, shapes and types of a published checkpoint with the networks of the packaged recipe."""
    recipe = load_recipe(case.name.removeprefix("state_dict_keys_"))
    stored = {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, shape, dtype in plain(case.meta["entries"])
    }
    task = make_task(stored["decode_head.conv_seg.weight"].shape[0])
    with torch.device("meta"):
        segmenter = build_segmenter(recipe, task)
        teacher = create_backbone(recipe.teacher, task, load_weights=False) if recipe.teacher else None
        widths = segmenter.decoder.in_channels
        heads = nn.ModuleList(make_aux_head(aux, widths, task.num_classes) for aux in recipe.aux)
    tensors = rename_tensors(stored)
    assert described(tensors.segmenter) == described(segmenter.state_dict())
    assert described(tensors.aux_heads) == described(heads.state_dict())
    assert described(tensors.teacher) == (described(teacher.state_dict()) if teacher else {})
    assert len(stored) == len(tensors.segmenter) + len(tensors.aux_heads) + len(tensors.teacher)
    case.comparison.count += len(stored)


def described(state: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}


DRIVERS: Drivers = {"at real size": real_size, "state_dict_keys": state_dict_keys}
