"""Import of the authors' checkpoints (.pth of their mmsegmentation fork)."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from rsseg.backbones.loading import convnext_from_mmpretrain, vit_from_mmpretrain
from rsseg.checkpoint import ModelHeader
from rsseg.errors import WeightsError
from rsseg.foreign import odd_tensors_refused, read_state_dict, rename
from rsseg.methods.base import check_classes, write_imported
from rsseg.methods.ktda.network import build_segmenter
from rsseg.methods.ktda.recipe import KTDARecipe
from rsseg.task import Task

_NETWORK = "KTDA's networks"

_SEGMENTER_RULES = (
    (r"(?:fam|student_adapter)\.convert\.(.+)", r"fam.projections.\1"),
    (r"neck\.lateral_convs\.(\d+)\.conv\.(.+)", r"neck.laterals.\1.\2"),
    (r"neck\.convs\.(\d+)\.conv\.(.+)", r"neck.convs.\1.\2"),
    (r"fmm\.adapters\.(\d)\.(\d{1,2})\.(?:attn\.|mlp\.)?(.+)", r"fmm.stacks.\1.\2.\3"),
    (r"decode_head\.psp_modules\.(\d+)\.1\.(.+)", r"decoder.pools.\1.\2"),
    (r"decode_head\.bottleneck\.(.+)", r"decoder.pyramid.\1"),
    (r"decode_head\.lateral_convs\.(.+)", r"decoder.laterals.\1"),
    (r"decode_head\.fpn_convs\.(.+)", r"decoder.smooths.\1"),
    (r"decode_head\.(?:fpn_bottleneck|fusion_conv)\.(.+)", r"decoder.fusion.\1"),
    (r"decode_head\.convs\.(.+)", r"decoder.projections.\1"),
    (r"decode_head\.conv_seg\.(.+)", r"decoder.classifier.conv.\1"),
)

_AUX_RULES = (
    (r"convs\.(.+)", r"head.convs.\1"),
    (r"conv_cat\.(.+)", r"head.join.\1"),
    (r"conv_seg\.(.+)", r"head.classifier.conv.\1"),
)


@dataclass(frozen=True)
class AuthorsTensors:
    """A checkpoint under our names: shipped network, auxiliary heads (`0.head...`) and teacher backbone."""

    segmenter: dict[str, Tensor] = field(default_factory=dict)
    aux_heads: dict[str, Tensor] = field(default_factory=dict)
    teacher: dict[str, Tensor] = field(default_factory=dict)


def import_checkpoint(source: Path, recipe: KTDARecipe, task: Task, *, output: Path) -> ModelHeader:
    """Convert an authors' checkpoint into a model.safetensors, without teacher and auxiliary heads.

    Args:
        source: the .pth file; no code in it is executed.
        recipe: describes the network; also gives FAM's grid, which a checkpoint does not store.
        task: classes in the checkpoint's order, bands red, green, blue.
        output: file to write, see `write_imported`.
    """
    state = read_state_dict(source)
    with odd_tensors_refused(source, _NETWORK):
        tensors = rename_tensors(state).segmenter
    check_classes(tensors, "decoder.classifier.conv.weight", task, source)
    _check_modulation(tensors, recipe, source)
    student = recipe.model_copy(update={"ship": "student"})  # the authors' files contain no average
    return write_imported(source, tensors, build_segmenter(recipe, task), student, output=output)


def rename_tensors(state: Mapping[str, Tensor]) -> AuthorsTensors:
    """Split an authors' state dict into our parts under our names, without dropping tensors.

    Raises:
        WeightsError: a name that does not belong to KTDA's networks.
    """
    student = dict(_below(state, "backbone."))
    teacher = dict(_below(state, "teach_backbone."))
    renamed = AuthorsTensors(teacher=vit_from_mmpretrain(teacher))
    for name, tensor in convnext_from_mmpretrain(student).items():
        renamed.segmenter[f"student.{name}"] = tensor
    for name, tensor in state.items():
        if name.startswith(("backbone.", "teach_backbone.")):
            continue
        if aux := re.fullmatch(r"auxiliary_head\.(?:(\d+)\.)?(.+)", name):
            renamed.aux_heads[f"{aux[1] or 0}.{rename(aux[2], _AUX_RULES, _NETWORK)}"] = tensor
        else:
            renamed.segmenter[rename(name, _SEGMENTER_RULES, _NETWORK)] = tensor
    return renamed


def _below(state: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    return ((name.removeprefix(prefix), tensor) for name, tensor in state.items() if name.startswith(prefix))


def _check_modulation(tensors: Mapping[str, Tensor], recipe: KTDARecipe, source: Path) -> None:
    """Raise if the FMM differs from the recipe's, and name the setting; strict loading would only name tensors."""
    found, stated = _fmm_of(tensors), (recipe.fmm.type, recipe.fmm.depth) if recipe.fmm else None
    if found != stated:
        wanted = f"fmm: {{type: {found[0]}, depth: {found[1]}}}" if found else "fmm: null"
        raise WeightsError(f"{source}: was trained with `{wanted}`, unlike the recipe. Set it in the recipe.")


def _fmm_of(tensors: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """Type and depth of a checkpoint's FMM; None without one."""
    blocks = {int(name.split(".")[3]) for name in tensors if name.startswith("fmm.stacks.0.")}
    if not blocks:
        return None
    return ("vit_block" if "fmm.stacks.0.0.qkv.weight" in tensors else "mlp"), len(blocks)
