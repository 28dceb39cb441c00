"""The authors' checkpoints (`best.pth`, `latest.pth`) as models of ours."""

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import rsseg
from rsseg.checkpoint import ModelHeader, load_into, write_model
from rsseg.errors import WeightsError
from rsseg.foreign import read_state_dict
from rsseg.methods.mtdf.network import build_segmenter
from rsseg.methods.mtdf.recipe import MTDFRecipe
from rsseg.task import Task

_RULES = (
    (r"backbone\.(.+)", r"backbone.body.network.\1"),
    (r"feature_translator_for_(\w+)\.layer\.0\.(.+)", r"translators.\1.expand.\2"),
    (r"feature_translator_for_(\w+)\.layer\.2\.(.+)", r"translators.\1.predict.\2"),
    (r"project_(\w+)\.(weight|bias)", r"translators.\1.project.\2"),
    (r"head\.projects\.(.+)", r"head.project.\1"),
    (r"head\.resize_layers\.(.+)", r"head.reassemble.\1"),
    (r"head\.scratch\.layer1_rn\.(.+)", r"head.lateral.0.\1"),
    (r"head\.scratch\.layer2_rn\.(.+)", r"head.lateral.1.\1"),
    (r"head\.scratch\.layer3_rn\.(.+)", r"head.lateral.2.\1"),
    (r"head\.scratch\.layer4_rn\.(.+)", r"head.lateral.3.\1"),
    (r"head\.scratch\.refinenet1\.(.+)", r"head.fuse.0.\1"),
    (r"head\.scratch\.refinenet2\.(.+)", r"head.fuse.1.\1"),
    (r"head\.scratch\.refinenet3\.(.+)", r"head.fuse.2.\1"),
    (r"head\.scratch\.refinenet4\.(.+)", r"head.fuse.3.\1"),
    (r"head\.scratch\.output_conv\.(.+)", r"head.predict.\1"),
)
_BLOCK_PARTS = (("out_conv", "project"), ("resConfUnit1", "skip"), ("resConfUnit2", "refine"))

_NOT_SHIPPED = ("Dino_teacher_model.", "clip_model.")
_NEVER_USED = ("backbone.mask_token", "head.scratch.refinenet4.resConfUnit1.")
"""Parameters that the authors' networks hold but do not compute with."""


def import_checkpoint(source: Path, recipe: MTDFRecipe, task: Task, *, output: Path) -> ModelHeader:
    """Turn an authors' checkpoint into a model.safetensors. The teachers that it holds twice are left out.

    Args:
        source: the .pth file. It is read without running any code in it. The recipe's `ship` chooses between the
            student's weights and their average.
        recipe: describes the network; its teachers are named `dino` and `clip`, as in the file.
        task: classes in the checkpoint's order, bands red, green, blue.
        output: file to write.

    Returns:
        The header that was written.

    Raises:
        WeightsError: not such a checkpoint, or it belongs to another recipe; says what is missing or unexpected.
    """
    entry = "model" if recipe.ship == "student" else "model_ema"
    state = read_state_dict(source, entry)
    # their distributed wrapper adds the prefix
    tensors = rename_tensors({name.removeprefix("module."): tensor for name, tensor in state.items()})
    classes = tensors.get("head.predict.2.weight")
    if classes is not None and classes.shape[0] != task.num_classes:
        raise WeightsError(
            f"{source}: has {classes.shape[0]} classes, {task.name} has {task.num_classes}. Choose its own dataset."
        )
    segmenter = build_segmenter(recipe, task)
    load_into(segmenter, tensors, str(source))
    header = ModelHeader(
        recipe=recipe.model_dump(mode="json"),
        task=task,
        backbones={"student": asdict(segmenter.backbone.info)},
        training={"imported_from": source.name, "weights": recipe.ship},
        made_with={"rsseg": rsseg.__version__, "torch": torch.__version__},
    )
    write_model(output, segmenter.state_dict(), header)
    return header


def rename_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The student's tensors under our names; teachers and parameters that take part in nothing are left out.

    Raises:
        WeightsError: a name that RS-MTDF's networks do not have.
    """
    return {
        _rename(name): tensor for name, tensor in state.items() if not name.startswith((*_NOT_SHIPPED, *_NEVER_USED))
    }


def _rename(name: str) -> str:
    for pattern, replacement in _RULES:
        if match := re.fullmatch(pattern, name):
            renamed = match.expand(replacement)
            if renamed.startswith("head.fuse."):
                for theirs, ours in _BLOCK_PARTS:
                    renamed = renamed.replace(theirs, ours)
            return renamed
    raise WeightsError(f"{name!r} is not a tensor of RS-MTDF's networks. Give a checkpoint of the authors' code.")
