"""The shipped model after the last step: batch-norm statistics of the target place, last evaluation, calibration."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import torch

from rsseg import distributed
from rsseg.checkpoint import Calibration, read_header, write_model
from rsseg.config import AugmentConfig, BaseRecipe, NormStatisticsConfig
from rsseg.data.sources import Datasets, Source
from rsseg.data.streams import StreamSpec, training_batches
from rsseg.errors import Interrupted, RecipeError
from rsseg.evaluation.calibration import COLDEST, HOTTEST
from rsseg.evaluation.model import DetailOptions, evaluate
from rsseg.evaluation.result import save_evaluation
from rsseg.inference.network import load_segmenter
from rsseg.layers.blocks import has_batch_norm, measure_statistics
from rsseg.methods.base import Segmenter
from rsseg.recipe import Recipe
from rsseg.runs import RunFolder
from rsseg.task import Task
from rsseg.training.plan import TrainPlan

STREAM = "statistics"


def open_statistics(recipe: BaseRecipe, segmenter: Segmenter, task: Task, datasets: Datasets) -> Source | None:
    """Open the images of `norm_statistics`; None if the recipe has none.

    Raises:
        RecipeError: the network has no batch norm.
        DataError: there are no such images.
    """
    if recipe.norm_statistics is None:
        return None
    if not has_batch_norm(segmenter):
        raise RecipeError(
            f"norm_statistics: the network of {recipe.name} has no batch norm, so it has no statistics to measure. "
            "Leave it out."
        )
    return datasets.open(recipe.norm_statistics.images, "unlabeled", task, masks=False)


def ship_statistics(recipe: BaseRecipe, config: NormStatisticsConfig, images: Source, model: Path, device: str) -> None:
    """Measure the statistics of a model on `images` and replace its file."""
    segmenter = load_segmenter(model, device=device)
    plain = AugmentConfig(crop_size=recipe.data.augment.crop_size, hflip=0.0)
    select = config.images.model_copy(update={"augment": config.images.augment or plain})
    data = recipe.data.model_copy(update={"streams": {STREAM: select}})
    batches = training_batches(
        recipe.model_copy(update={"data": data}),
        [StreamSpec(STREAM, split="unlabeled", masks=False, fill=segmenter.fill)],
        segmenter.task,
        device=device,
        start_step=0,
        sources={STREAM: images},
    )
    with closing(batches):
        measure_statistics(segmenter, (batch[STREAM].images for batch in islice(batches, config.batches)))
    header = read_header(model)
    measured = {"norm_statistics": config.model_dump(mode="json")}
    write_model(model, segmenter.state_dict(), replace(header, training={**header.training, **measured}))


def evaluate_shipped(
    run: RunFolder,
    recipe: Recipe,
    plan: TrainPlan,
    validation: Source,
    streams: dict[str, Source],
    device: torch.device,
    *,
    stop: Callable[[], bool],
) -> str:
    """Score the shipped model, fit its temperatures and store both; return a summary. All ranks must call it."""
    distributed.broadcast_from_main("")  # the main process has written the model
    if distributed.max_over_ranks(int(not run.model.is_file())):
        return f"no final evaluation: {run.model} is not visible to all processes"
    segmenter = load_segmenter(run.model, device=str(device))
    where = describe_validation(recipe, plan, validation, streams)
    options = DetailOptions(fit=recipe.eval.calibrate, fitted_on=where, examples=run.evaluation("val").with_suffix(""))
    try:
        result = evaluate(segmenter, recipe, validation, device=device, stop=stop, details=options)
    except Interrupted:
        return f"interrupted before the calibration; the model is complete: rsseg eval --model {run.path}"
    calibration = result.details.calibration if result.details is not None else None
    if distributed.current_ranks().is_main:
        save_evaluation(result.model_copy(update={"seen": "selection"}), run.evaluation("val"))
        if calibration is not None and calibration.temperatures is not None:
            header = read_header(run.model)
            fitted = {"calibration": asdict(Calibration(calibration.temperatures, where))}
            write_model(run.model, segmenter.state_dict(), replace(header, training={**header.training, **fitted}))
    if calibration is None or calibration.after is None:
        return "not calibrated"
    temperatures = " ".join(f"{value:.3g}" for value in dict.fromkeys(calibration.temperatures or ()))
    before, after = calibration.before.ece or 0.0, calibration.after.ece or 0.0
    at_limit = not {COLDEST, HOTTEST}.isdisjoint(calibration.temperatures or ())
    text = f"temperature {temperatures}: calibration error on these images {before:.4f} -> {after:.4f} ({where})"
    return text + "; the limit: the probabilities hardly tell right from wrong" if at_limit else text


def describe_validation(recipe: Recipe, plan: TrainPlan, validation: Source, streams: dict[str, Source]) -> str:
    """The validation images in words, and whether they come from another domain than that of the adaptation."""
    domains = {item.domain for item in validation.items}
    named = ", ".join(sorted(domain for domain in domains if domain is not None))
    split = plan.validation
    assert split is not None  # for the type checker: `validation` was opened from it
    text = f"{split.path}, split {split.split}{f', domain {named}' if named else ''}, {split.images} images"
    target = streams.get("target")
    if target is not None and (
        plan.streams["target"].path != split.path or domains.isdisjoint(item.domain for item in target.items)
    ):
        return f"{text}; the source domain: confidences of the target domain are not calibrated"
    if recipe.norm_statistics is not None:
        return f"{text}; confidences where the batch-norm statistics were measured may differ"
    return text
