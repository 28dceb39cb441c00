"""Look for every file that a run needs, then say what the run will do."""

from collections.abc import Mapping

from rsseg.backbones.weights import WeightsFile, check_weights
from rsseg.config import SelectConfig
from rsseg.data.index import SegmentationIndex
from rsseg.data.sources import open_source
from rsseg.errors import DataError
from rsseg.methods.base import Method
from rsseg.recipe import Recipe
from rsseg.task import Task
from rsseg.training.describe import backbone_configs
from rsseg.training.distributed import Ranks
from rsseg.training.hardware import Hardware
from rsseg.training.results import SplitPlan, TrainPlan


def check_files(recipe: Recipe, task: Task) -> dict[str, WeightsFile]:
    """Look for weights and validation images before anything is built; returns the weight file of each role.

    Raises:
        WeightsError: weights are missing; the message names the command that gets them.
        DataError: the validation split is empty or has no masks.
    """
    found = {role: check_weights(config) for role, config in backbone_configs(recipe)}
    validation_of(recipe, task)
    return {role: file for role, file in found.items() if file is not None}


def validation_of(recipe: Recipe, task: Task) -> SplitPlan | None:
    """The images that choose the best weights; None if there are none and the recipe ships the last weights anyway."""
    try:
        return split_plan(recipe, recipe.data.val, "val", task, masks=True, batch_size=recipe.eval.batch_size)
    except DataError as error:
        if recipe.trainer.monitor == "last":
            return None
        raise DataError(f"{error} Without validation images, set trainer.monitor: last.") from None


def split_plan(
    recipe: Recipe, select: SelectConfig, split: str, task: Task, *, masks: bool, batch_size: int
) -> SplitPlan:
    """What a selection holds; raises `DataError` if nothing, or if masks are missing."""
    source = open_source(recipe, select, split, task, masks=masks)
    path = select.path or recipe.data.path
    return SplitPlan(
        path=str(path),
        split=select.split or split,
        images=len(source.items),
        digest=SegmentationIndex.load(path).digest(source.items),
        batch_size=batch_size,
    )


def make_plan(
    recipe: Recipe, task: Task, hardware: Hardware, method: Method, weights: Mapping[str, WeightsFile], ranks: Ranks
) -> TrainPlan:
    """Everything that is known before the first step; raises `DataError` for a stream without images."""
    config = recipe.trainer
    streams = {
        spec.name: split_plan(
            recipe,
            recipe.data.streams.get(spec.name, SelectConfig()),
            spec.split,
            task,
            masks=spec.masks,
            batch_size=config.stream_batch_sizes.get(spec.name, config.batch_size),
        )
        for spec in method.streams
    }
    backbones = {
        role: f"{backbone.name}, {weights[role].source if role in weights else 'random weights'}"
        for role, backbone in backbone_configs(recipe)
    }
    return TrainPlan(
        method=recipe.method,
        name=recipe.name,
        title=recipe.title,
        reference=recipe.reference,
        device=str(hardware.device),
        device_name=hardware.name,
        amp=hardware.amp_name,
        processes=ranks.world_size,
        seed=recipe.seed,
        steps=config.steps,
        grad_accum_steps=config.grad_accum_steps,
        streams=streams,
        validation=validation_of(recipe, task),
        classes=task.class_names,
        bands=task.bands,
        backbones=backbones,
        weight_hashes={role: file.sha256 for role, file in weights.items()},
        parameters=sum(p.numel() for p in method.deployable().parameters()),
        trainable=sum(p.numel() for p in method.parameters() if p.requires_grad),
    )
