"""The authors' checkpoints (.pth of their mmsegmentation fork) as models of ours."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import rsseg
from rsseg.backbones.reference_keys import convnext_from_mmpretrain, vit_from_mmpretrain
from rsseg.checkpoint import ModelHeader, load_into, write_model
from rsseg.errors import WeightsError
from rsseg.foreign import read_state_dict
from rsseg.methods.ktda.network import build_segmenter
from rsseg.methods.ktda.recipe import KTDARecipe
from rsseg.task import Task

_SEGMENTER_RULES = (
    (r"(?:fam|student_adapter)\.convert\.(.+)", r"fam.projections.\1"),
    (r"neck\.lateral_convs\.(\d+)\.conv\.(.+)", r"neck.laterals.\1.\2"),
    (r"neck\.convs\.(\d+)\.conv\.(.+)", r"neck.convs.\1.\2"),
    (r"fmm\.adapters\.(\d+)\.(\d+)\.(?:attn\.|mlp\.)?(.+)", r"fmm.stacks.\1.\2.\3"),
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
    """A checkpoint in our names: the shipped network's, the auxiliary heads' (`0.head...`), the teacher backbone's."""

    segmenter: dict[str, Tensor] = field(default_factory=dict)
    aux_heads: dict[str, Tensor] = field(default_factory=dict)
    teacher: dict[str, Tensor] = field(default_factory=dict)


def import_checkpoint(source: Path, recipe: KTDARecipe, task: Task, *, output: Path) -> ModelHeader:
    """Turn an authors' checkpoint into a model.safetensors. Teacher and auxiliary heads do not ship.

    Args:
        source: the .pth file. It is read without running any code in it.
        recipe: describes the network. FAM's grid is not in a checkpoint: the recipe's is taken.
        task: classes in the checkpoint's order, bands red, green, blue.
        output: file to write.

    Returns:
        The header that was written.

    Raises:
        WeightsError: not such a checkpoint, or it belongs to another recipe; says what is missing or unexpected.
    """
    state = read_state_dict(source)
    tensors = rename_tensors(state)
    _check_recipe(tensors.segmenter, recipe, task, source)
    segmenter = build_segmenter(recipe, task)
    load_into(segmenter, tensors.segmenter, str(source))
    header = ModelHeader(
        recipe=recipe.model_dump(mode="json"),
        task=task,
        backbones={"student": asdict(segmenter.student.info)},
        training={"imported_from": source.name},
        made_with={"rsseg": rsseg.__version__, "torch": torch.__version__},
    )
    write_model(output, segmenter.state_dict(), header)
    return header


def rename_tensors(state: Mapping[str, Tensor]) -> AuthorsTensors:
    """Sort an authors' state dict into our parts, under our names; nothing is dropped.

    Raises:
        WeightsError: a name that KTDA's networks do not have.
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
            renamed.aux_heads[f"{aux[1] or 0}.{_rename(aux[2], _AUX_RULES)}"] = tensor
        else:
            renamed.segmenter[_rename(name, _SEGMENTER_RULES)] = tensor
    return renamed


def _below(state: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    return ((name.removeprefix(prefix), tensor) for name, tensor in state.items() if name.startswith(prefix))


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    raise WeightsError(f"{name!r} is not a tensor of KTDA's networks. Give a checkpoint of the authors' KTDA code.")


def _check_recipe(tensors: Mapping[str, Tensor], recipe: KTDARecipe, task: Task, source: Path) -> None:
    """Name the settings that differ; strict loading alone would name tensors only."""
    classes = tensors.get("decoder.classifier.conv.weight")
    if classes is not None and classes.shape[0] != task.num_classes:
        raise WeightsError(
            f"{source}: has {classes.shape[0]} classes, {task.name} has {task.num_classes}. Choose its own dataset."
        )
    found, stated = _fmm_of(tensors), (recipe.fmm.type, recipe.fmm.depth) if recipe.fmm else None
    if found != stated:
        wanted = f"fmm: {{type: {found[0]}, depth: {found[1]}}}" if found else "fmm: null"
        raise WeightsError(f"{source}: was trained with `{wanted}`, the recipe differs there. Set it so.")


def _fmm_of(tensors: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """Type and depth of a checkpoint's FMM."""
    blocks = {int(name.split(".")[3]) for name in tensors if name.startswith("fmm.stacks.0.")}
    if not blocks:
        return None
    return ("vit_block" if "fmm.stacks.0.0.qkv.weight" in tensors else "mlp"), len(blocks)
