"""Look for every file that a run needs, then say what the run will do."""

from collections.abc import Mapping

from rsseg.backbones.weights import WeightsFile, check_weights
from rsseg.config import SelectConfig
from rsseg.data.index import digest_of
from rsseg.data.sources import Datasets, Source
from rsseg.distributed import Ranks
from rsseg.errors import DataError
from rsseg.methods.base import Method
from rsseg.recipe import Recipe
from rsseg.task import Task
from rsseg.training.describe import backbone_configs
from rsseg.training.hardware import Hardware
from rsseg.training.results import SplitPlan, TrainPlan


def check_files(recipe: Recipe, task: Task, datasets: Datasets) -> dict[str, WeightsFile]:
    """Look for weights and validation images before anything is built; returns the weight file of each role.

    Raises:
        WeightsError: weights are missing; the message names the command that gets them.
        DataError: the validation split is empty or has no masks.
    """
    found = {role: check_weights(config) for role, config in backbone_configs(recipe)}
    validation_of(recipe, task, datasets)
    return {role: file for role, file in found.items() if file is not None}


def validation_of(recipe: Recipe, task: Task, datasets: Datasets) -> SplitPlan | None:
    """The images that choose the best weights; None if there are none and the recipe ships the last weights anyway."""
    try:
        labels = recipe.trainer.monitor != "entropy"
        source = datasets.open(recipe.data.val, "val", task, masks=labels)
        return split_plan(recipe, recipe.data.val, "val", source, batch_size=recipe.eval.batch_size)
    except DataError as error:
        if recipe.trainer.monitor == "last":
            return None
        raise DataError(f"{error} Without validation images, set trainer.monitor: last.") from None


def split_plan(recipe: Recipe, select: SelectConfig, split: str, source: Source, *, batch_size: int) -> SplitPlan:
    """What a selection holds."""
    return SplitPlan(
        path=str(select.path or recipe.data.path),
        split=select.split or split,
        images=len(source.items),
        digest=digest_of(source.items),
        batch_size=batch_size,
    )


def selection_of(recipe: Recipe, method: Method, validation: SplitPlan | None) -> str:
    """What chooses the weights that ship, in words: which score, on whose labels.

    If the labels of a domain that trains without them choose the weights, the run must say so.
    """
    monitor = recipe.trainer.monitor
    if validation is None or monitor == "last":
        return "the last weights ship; no score chooses them"
    if monitor == "entropy":
        return f"lowest entropy on {validation.images} images, without labels"
    chosen = _domain(recipe, recipe.data.val)
    sharing = [
        spec for spec in method.streams if _domain(recipe, recipe.data.streams.get(spec.name, SelectConfig())) == chosen
    ]
    unlabeled = bool(sharing) and not any(spec.masks for spec in sharing)
    whose = f" of the domain of stream {sharing[0].name!r}, which trains without labels" if unlabeled else ""
    return f"best {monitor} on labels of {validation.images} images{whose}"


def _domain(recipe: Recipe, select: SelectConfig) -> tuple[str, str | None]:
    return str(select.path or recipe.data.path), select.domain


def absent_classes(recipe: Recipe, method: Method, task: Task, datasets: Datasets) -> list[str]:
    """One warning per labeled stream in which a class has no pixel, as counted when the dataset was prepared."""
    warnings = []
    for spec in (spec for spec in method.streams if spec.masks):
        select = recipe.data.streams.get(spec.name, SelectConfig())
        counts = [item.classes for item in datasets.open(select, spec.split, task, masks=True).items]
        absent = [name for i, name in enumerate(task.class_names) if not any(c is None or c[i] for c in counts)]
        if absent:
            warnings.append(
                f"stream {spec.name!r}: none of its {len(counts)} images shows {', '.join(absent)}; the network cannot "
                "learn what it never sees. Take more images, or name some that do in data.streams."
            )
    return warnings


def make_plan(
    recipe: Recipe,
    task: Task,
    datasets: Datasets,
    hardware: Hardware,
    method: Method,
    weights: Mapping[str, WeightsFile],
    ranks: Ranks,
) -> TrainPlan:
    """Everything that is known before the first step; raises `DataError` for a stream without images."""
    config = recipe.trainer
    streams = {}
    for spec in method.streams:
        select = recipe.data.streams.get(spec.name, SelectConfig())
        source = datasets.open(select, spec.split, task, masks=spec.masks)
        batch_size = config.stream_batch_sizes.get(spec.name, config.batch_size)
        streams[spec.name] = split_plan(recipe, select, spec.split, source, batch_size=batch_size)
    backbones = {
        role: f"{backbone.name}, {weights[role].source if role in weights else 'random weights'}"
        for role, backbone in backbone_configs(recipe)
    }
    validation = validation_of(recipe, task, datasets)
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
        validation=validation,
        selection=selection_of(recipe, method, validation),
        classes=task.class_names,
        bands=task.bands,
        backbones=backbones,
        weight_hashes={role: file.sha256 for role, file in weights.items()},
        parameters=sum(p.numel() for p in method.deployable().parameters()),
        trainable=sum(p.numel() for p in method.parameters() if p.requires_grad),
    )
