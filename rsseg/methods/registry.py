"""Method name -> classes, explicitly. Imports are local, so that a command loads only the method that it runs."""

from typing import TYPE_CHECKING

from rsseg.recipe import Recipe
from rsseg.task import Task

if TYPE_CHECKING:
    from rsseg.methods.base import Method, Segmenter


def segmenter_for(recipe: Recipe, task: Task) -> "Segmenter":
    """The shipped network with untrained weights; nothing is downloaded and no weight file is opened."""
    match recipe.method:
        case "ktda":
            from rsseg.methods.ktda.network import build_segmenter

            return build_segmenter(recipe, task)
        case "dasegnet":
            from rsseg.methods.dasegnet.network import build_segmenter as build_dasegnet

            return build_dasegnet(recipe, task)


def method_for(recipe: Recipe, task: Task) -> "Method":
    """The training module with the pretrained weights that the recipe names.

    Raises:
        WeightsError: weights are missing, foreign or may not be fetched.
    """
    match recipe.method:
        case "ktda":
            from rsseg.methods.ktda.method import build_method

            return build_method(recipe, task)
        case "dasegnet":
            from rsseg.methods.dasegnet.build import build_method as build_dasegnet

            return build_dasegnet(recipe, task)
