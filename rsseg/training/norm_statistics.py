"""Re-estimate the batch-norm statistics of the shipped network on images of the target place."""

from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

from rsseg.checkpoint import read_header, write_model
from rsseg.config import AugmentConfig, BaseRecipe, NormStatisticsConfig
from rsseg.data.sources import Datasets, Source
from rsseg.data.streams import StreamSpec, training_batches
from rsseg.errors import RecipeError
from rsseg.inference.network import load_segmenter
from rsseg.layers.blocks import has_batch_norm, measure_statistics
from rsseg.methods.base import Segmenter
from rsseg.task import Task

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
