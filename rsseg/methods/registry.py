"""Method name -> builders. Imports are local, so that a command loads only the method that it runs."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from rsseg.errors import RecipeError, WeightsError
from rsseg.recipe import Recipe, recipe_from_dict
from rsseg.task import Task

if TYPE_CHECKING:
    from rsseg.checkpoint import ModelHeader
    from rsseg.methods.base import Method, Segmenter

P = ParamSpec("P")
T = TypeVar("T")


def _bounded(build: Callable[P, T]) -> Callable[P, T]:
    """Wrap `build` so that it raises `MachineError` for a network that this machine cannot hold."""

    @wraps(build)
    def bounded(*args: P.args, **kwargs: P.kwargs) -> T:
        from rsseg.methods.base import bounded_parameters

        with bounded_parameters():
            return build(*args, **kwargs)

    return bounded


@_bounded
def segmenter_for(recipe: Recipe, task: Task) -> "Segmenter":
    """Build the network that ships, untrained, without downloading or opening a weights file."""
    match recipe.method:
        case "supervised":
            from rsseg.methods.supervised.method import build_segmenter as build_supervised

            return build_supervised(recipe, task)
        case "ktda":
            from rsseg.methods.ktda.network import build_segmenter

            return build_segmenter(recipe, task)
        case "mtdf":
            from rsseg.methods.mtdf.network import build_segmenter as build_mtdf

            return build_mtdf(recipe, task)
        case "dasegnet":
            if recipe.single is not None:
                from rsseg.methods.dasegnet.single import build_segmenter as build_single

                return build_single(recipe, task)
            from rsseg.methods.dasegnet.network import build_segmenter as build_dasegnet

            return build_dasegnet(recipe, task)


def load_model(path: Path) -> "Segmenter":
    """Load the network of a model file or run folder, on the CPU, in eval mode.

    Raises:
        WeightsError: there is no model, or it is damaged, foreign, or of another version.
    """
    from rsseg.checkpoint import calibration_of, find_model, load_tensors, read_header

    file = find_model(path)
    header = read_header(file)
    try:
        segmenter = segmenter_for(recipe_from_dict(header.recipe, str(file)), header.task)
    except RecipeError as error:
        made_with = header.made_with.get("rsseg", "of an unknown version")
        first, *others = str(error).splitlines()
        more = f" (and {len(others)} more such problems)" if others else ""
        raise WeightsError(
            f"{first.rstrip('.')}{more}: this rsseg cannot read the recipe in the model, which rsseg {made_with} made. "
            "Use the version that made it, or train the model again."
        ) from None
    load_tensors(segmenter, file)
    segmenter.calibration = calibration_of(header, file)
    return segmenter.eval()


@_bounded
def method_for(recipe: Recipe, task: Task) -> "Method":
    """Build the training module with the pretrained weights that the recipe names.

    Raises:
        WeightsError: weights are missing or do not fit.
        RecipeError: parts of the recipe do not fit together.
    """
    from rsseg.layers.losses import LabelLoss

    method = _method_for(recipe, task)
    method.label_loss = LabelLoss(recipe.loss, task)
    return method


def _method_for(recipe: Recipe, task: Task) -> "Method":
    match recipe.method:
        case "supervised":
            from rsseg.methods.supervised.method import build_method as build_supervised

            return build_supervised(recipe, task, load_model)
        case "ktda":
            from rsseg.methods.ktda.method import build_method

            return build_method(recipe, task, load_model)
        case "mtdf":
            from rsseg.methods.mtdf.method import build_method as build_mtdf

            return build_mtdf(recipe, task, load_model)
        case "dasegnet":
            if recipe.single is not None:
                from rsseg.methods.dasegnet.single import build_method as build_single

                return build_single(recipe, task, load_model)
            from rsseg.methods.dasegnet.method import build_method as build_dasegnet

            return build_dasegnet(recipe, task, load_model)


@_bounded
def import_checkpoint(source: Path, recipe: Recipe, task: Task, *, output: Path) -> "ModelHeader":
    """Convert the authors' checkpoint `source` into a model file; see the method's importer.

    Raises:
        WeightsError: not a checkpoint of the authors' code, or one of another recipe.
        RecipeError: the method has no published checkpoints.
    """
    match recipe.method:
        case "supervised":
            raise RecipeError(
                f"{recipe.name}: plain supervised training has no published checkpoints to import. "
                "Give a recipe of ktda, mtdf or dasegnet."
            )
        case "ktda":
            from rsseg.methods.ktda.importer import import_checkpoint as import_ktda

            return import_ktda(source, recipe, task, output=output)
        case "mtdf":
            from rsseg.methods.mtdf.importer import import_checkpoint as import_mtdf

            return import_mtdf(source, recipe, task, output=output)
        case "dasegnet":
            from rsseg.methods.dasegnet.importer import import_checkpoint as import_dasegnet

            return import_dasegnet(source, recipe, task, output=output)
