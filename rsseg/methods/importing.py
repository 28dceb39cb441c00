"""Common part of the importers of all methods: checks, model file and its header."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

import rsseg
from rsseg.checkpoint import ModelHeader, load_into, write_model
from rsseg.config import BaseRecipe
from rsseg.errors import WeightsError
from rsseg.methods.base import Segmenter, backbone_infos
from rsseg.task import Task


def check_classes(tensors: Mapping[str, Tensor], classifier: str, task: Task, source: Path) -> None:
    """Raise `WeightsError` if the weight `classifier` (classes, ...) has another number of classes than the task."""
    weight = tensors.get(classifier)
    if weight is not None and weight.shape[:1] != (task.num_classes,):
        raise WeightsError(
            f"{source}: has {weight.shape[0] if weight.ndim else 0} classes, {task.name} has {task.num_classes}. "
            "Choose the dataset that the checkpoint was trained on."
        )


def write_imported(
    source: Path, tensors: Mapping[str, Tensor], segmenter: Segmenter, recipe: BaseRecipe, *, output: Path
) -> ModelHeader:
    """Fill a network with the renamed tensors of an authors' checkpoint and write it as a model file.

    Args:
        source: the checkpoint, for messages and the header.
        tensors: all of the network's tensors, under our names.
        segmenter: network of `recipe`; receives the tensors.
        recipe: its `ship` tells which of the checkpoint's weights `tensors` are.
        output: file to write.

    Returns:
        The header that was written.

    Raises:
        WeightsError: a tensor is missing, unexpected, or of another shape.
        MachineError: the file cannot be written.
    """
    load_into(segmenter, tensors, str(source))
    header = ModelHeader(
        recipe=recipe.model_dump(mode="json"),
        task=segmenter.task,
        backbones=backbone_infos(segmenter),
        training={"imported_from": source.name, "weights": recipe.ship},
        made_with={"rsseg": rsseg.__version__, "torch": torch.__version__},
    )
    write_model(output, segmenter.state_dict(), header)
    return header
