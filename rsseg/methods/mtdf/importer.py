"""The authors' checkpoints (`best.pth`, `latest.pth`) as models of ours."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rsseg.checkpoint import ModelHeader
from rsseg.foreign import read_state_dict, rename
from rsseg.methods.importing import check_classes, write_imported
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
    check_classes(tensors, "head.predict.2.weight", task, source)
    return write_imported(source, tensors, build_segmenter(recipe, task), recipe, output=output)


def rename_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The student's tensors under our names; teachers and parameters that take part in nothing are left out.

    Raises:
        WeightsError: a name that RS-MTDF's networks do not have.
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
