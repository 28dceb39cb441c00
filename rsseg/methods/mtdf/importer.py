"""The authors' checkpoints (`best.pth`, `latest.pth`) as models of ours."""

import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

import rsseg
from rsseg.checkpoint import ModelHeader, load_into, write_model
from rsseg.errors import WeightsError
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
    tensors = rename_tensors(read_state_dict(source, entry))
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


def read_state_dict(path: Path, entry: str) -> dict[str, Tensor]:
    """One state dict of a .pth file, under the authors' names without the `module.` of their distributed wrapper.

    Scores that lie beside it may be objects of other libraries; inert stand-ins take their place, so that nothing of
    the file is run.

    Raises:
        WeightsError: the file is missing, unreadable or has no such entry.
    """
    try:
        foreign: list[Any] = [(_Inert, name) for name in get_unsafe_globals_in_checkpoint(path)]
        with safe_globals(foreign):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path}: not a readable checkpoint: {reason}. Give the authors' .pth file.") from None
    state = content.get(entry) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path}: holds no state dict named {entry!r}. Give the authors' best.pth or latest.pth.")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


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


class _Inert:
    """Stands in for any foreign class or function of a checkpoint: takes everything, does nothing."""

    def __new__(cls, *_arguments: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_arguments: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass
