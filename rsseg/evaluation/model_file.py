"""Score model files on a split of a dataset, by any engine."""

from collections.abc import Sequence
from pathlib import Path

from rsseg.checkpoint import read_header
from rsseg.config import SelectConfig
from rsseg.data.index import digest_of
from rsseg.data.sources import Datasets
from rsseg.errors import UsageError
from rsseg.evaluation.model import Advance, DetailOptions, evaluate
from rsseg.evaluation.quantize import Quantize, open_network
from rsseg.evaluation.result import Evaluation
from rsseg.inference.device import resolve_device
from rsseg.inference.engines import EngineName
from rsseg.inference.network import load_averaged
from rsseg.recipe import recipe_from_dict


def evaluate_model(
    model: Path | Sequence[Path],
    *,
    data: Path | None = None,
    split: str = "test",
    device: str = "auto",
    engine: EngineName = "torch",
    quantize: Quantize = "none",
    calibrate: Path | None = None,
    progress: Advance | None = None,
    details: DetailOptions | None = None,
) -> Evaluation:
    """Score a model file on a split of its recipe's dataset, or of another one with the same classes.

    Args:
        model: model file; several: the mean of their probabilities, each at its own temperature, with the recipe of the
            first.
        data: prepared dataset; None takes the recipe's.
        split: `val` and `test` are the recipe's selections of these names, anything else is a split of the dataset.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        engine, quantize, calibrate: see `open_network`; float32 where nothing is quantized.
        progress: called after every image.
        details: see `evaluate`.

    Raises:
        WeightsError: a model cannot be loaded.
        UsageError: models of different classes, bands or scaling; several models with another engine than torch; see
            `open_network`.
        MachineError: see `open_network`.
        DataError: see `open_network`, `Datasets.open` and `evaluate`.
    """
    target = resolve_device(device)
    files = [model] if isinstance(model, Path) else list(model)
    headers = [read_header(file) for file in files]
    if len(files) > 1 and (engine, quantize, calibrate) != ("torch", "none", None):
        raise UsageError("several models are evaluated by torch only: leave out --engine, --quantize and --calibrate.")
    ready = None
    if len(files) == 1:
        ready = open_network(files[0], engine, device, "float32", quantize=quantize, calibrate=calibrate)
    network = load_averaged(files, device=device) if ready is None else ready.network
    recipe = recipe_from_dict(headers[0].recipe, str(files[0]))
    select = {"val": recipe.data.val, "test": recipe.data.test}.get(split, SelectConfig(split=split))
    if data is not None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": data})})
        select = SelectConfig(split=split)
    source = Datasets(recipe.data, recipe.seed).open(select, split, network.task, masks=True)
    result = evaluate(network, recipe, source, device=target, progress=progress, details=details)
    if ready is not None:
        result = result.model_copy(update={"engine": ready.network.engine, "quantization": ready.quantization})
    digest = digest_of(source.items)
    seen = [header.training.get("used", {}).get(digest) for header in headers]
    return result.model_copy(update={"seen": next(filter(None, seen), None)})
