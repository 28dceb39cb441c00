"""Method name -> builders. Imports are local, so that a command loads only the method that it runs."""

from pathlib import Path
from typing import TYPE_CHECKING

from rsseg.recipe import Recipe
from rsseg.task import Task

if TYPE_CHECKING:
    from rsseg.checkpoint import ModelHeader
    from rsseg.methods.base import Method, Segmenter


def segmenter_for(recipe: Recipe, task: Task) -> "Segmenter":
    """Build the network that ships, untrained, without downloading or opening a weights file."""
    match recipe.method:
        case "ktda":
            from rsseg.methods.ktda.network import build_segmenter

            return build_segmenter(recipe, task)
        case "mtdf":
            from rsseg.methods.mtdf.network import build_segmenter as build_mtdf

            return build_mtdf(recipe, task)
        case "dasegnet":
            from rsseg.methods.dasegnet.network import build_segmenter as build_dasegnet

            return build_dasegnet(recipe, task)


def method_for(recipe: Recipe, task: Task) -> "Method":
    """Build the training module with the pretrained weights that the recipe names.

    Raises:
        WeightsError: weights are missing or do not fit.
    """
    match recipe.method:
        case "ktda":
            from rsseg.methods.ktda.method import build_method

            return build_method(recipe, task)
        case "mtdf":
            from rsseg.methods.mtdf.method import build_method as build_mtdf

            return build_mtdf(recipe, task)
        case "dasegnet":
            from rsseg.methods.dasegnet.method import build_method as build_dasegnet

            return build_dasegnet(recipe, task)


def import_checkpoint(source: Path, recipe: Recipe, task: Task, *, output: Path) -> "ModelHeader":
    """Convert the authors' checkpoint `source` into a model file; see the method's importer.

    Raises:
        WeightsError: not a checkpoint of the authors' code, or one of another recipe.
    """
    match recipe.method:
        case "ktda":
            from rsseg.methods.ktda.importer import import_checkpoint as import_ktda

            return import_ktda(source, recipe, task, output=output)
        case "mtdf":
            from rsseg.methods.mtdf.importer import import_checkpoint as import_mtdf

            return import_mtdf(source, recipe, task, output=output)
        case "dasegnet":
            from rsseg.methods.dasegnet.importer import import_checkpoint as import_dasegnet

            return import_dasegnet(source, recipe, task, output=output)
