"""Import of the authors' checkpoints (`best.pth`, `latest.pth`)."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rsseg.checkpoint import ModelHeader
from rsseg.foreign import read_state_dict, rename
from rsseg.methods.base import check_classes, write_imported
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
    *((rf"head\.scratch\.layer{i + 1}_rn\.(.+)", rf"head.lateral.{i}.\1") for i in range(4)),
    *((rf"head\.scratch\.refinenet{i + 1}\.(.+)", rf"head.fuse.{i}.\1") for i in range(4)),
    (r"head\.scratch\.output_conv\.(.+)", r"head.predict.\1"),
)
_BLOCK_PARTS = (("out_conv", "project"), ("resConfUnit1", "skip"), ("resConfUnit2", "refine"))

_NOT_SHIPPED = ("Dino_teacher_model.", "clip_model.")
_NEVER_USED = ("backbone.mask_token", "head.scratch.refinenet4.resConfUnit1.")
"""Parameters that the authors' networks contain but do not use."""


def import_checkpoint(source: Path, recipe: MTDFRecipe, task: Task, *, output: Path) -> ModelHeader:
    """Convert an authors' checkpoint into a model.safetensors, without the teachers that it contains twice.

    Args:
        source: the .pth file; no code in it is executed. The recipe's `ship` selects the student's weights or their
            average.
        recipe: describes the network; its teachers are named `dino` and `clip`, as in the file.
        task: classes in the checkpoint's order, bands red, green, blue.
        output: file to write, see `write_imported`.
    """
    entry = "model" if recipe.ship == "student" else "model_ema"
    state = read_state_dict(source, entry)
    # their distributed wrapper adds the prefix
    tensors = rename_tensors({name.removeprefix("module."): tensor for name, tensor in state.items()})
    check_classes(tensors, "head.predict.2.weight", task, source)
    return write_imported(source, tensors, build_segmenter(recipe, task), recipe, output=output)


def rename_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The student's tensors under our names, without teachers and unused parameters.

    Raises:
        WeightsError: a name that does not belong to RS-MTDF's networks.
    """
    return {
        _rename(name): tensor for name, tensor in state.items() if not name.startswith((*_NOT_SHIPPED, *_NEVER_USED))
    }


def _rename(name: str) -> str:
    renamed = rename(name, _RULES, "RS-MTDF's networks")
    if renamed.startswith("head.fuse."):
        for theirs, ours in _BLOCK_PARTS:
            renamed = renamed.replace(theirs, ours)
    return renamed
