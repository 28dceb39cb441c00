"""The last pass of a run over its validation images: details for the report, and the calibration of the model."""

from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from rsseg import distributed
from rsseg.checkpoint import Calibration, read_header, write_model
from rsseg.data.sources import Source
from rsseg.errors import Interrupted
from rsseg.evaluation.model import DetailOptions, evaluate
from rsseg.evaluation.result import save_evaluation
from rsseg.inference.network import load_segmenter
from rsseg.recipe import Recipe
from rsseg.runs import RunFolder
from rsseg.training.plan import TrainPlan


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
    return f"temperature {temperatures}: calibration error on these images {before:.4f} -> {after:.4f} ({where})"


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
