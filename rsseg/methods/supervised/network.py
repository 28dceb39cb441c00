"""The shipped network of plain supervised training: backbone and decoder."""

from rsseg.methods.plain import PlainSegmenter, build_plain
from rsseg.methods.supervised.recipe import SupervisedRecipe
from rsseg.task import Task


def build_segmenter(recipe: SupervisedRecipe, task: Task, *, load_weights: bool = False) -> PlainSegmenter:
    """Build the network that ships, by default untrained and without opening a file; see `build_plain`."""
    crop_size = recipe.data.augment_of("labeled").crop_size
    return build_plain(recipe.backbone, recipe.decoder, task, crop_size=crop_size, load_weights=load_weights)
