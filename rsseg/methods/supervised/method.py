"""Plain supervised training: cross-entropy on labeled images, with the backbone trained, frozen or adapted."""

from collections.abc import Mapping, Sequence

from rsseg.data.streams import Batch, StreamSpec
from rsseg.layers.losses import pixel_accuracy
from rsseg.methods.base import LoadModel, Method, ParamGroup, Segmenter, StepOutput, start_from
from rsseg.methods.plain import PlainSegmenter, TunedNetwork, build_plain
from rsseg.methods.supervised.recipe import SupervisedRecipe
from rsseg.task import Task


def build_segmenter(recipe: SupervisedRecipe, task: Task, *, load_weights: bool = False) -> PlainSegmenter:
    """Build the network that ships, by default untrained and without opening a file; see `build_plain`."""
    crop_size = recipe.data.augment_of("labeled").crop_size
    return build_plain(recipe.backbone, recipe.decoder, task, crop_size=crop_size, load_weights=load_weights)


class SupervisedMethod(Method):
    """One loss, `seg`."""

    def __init__(self, network: TunedNetwork) -> None:
        super().__init__()
        self.network = network
        self.streams = (StreamSpec("labeled", split="train", masks=True, fill=network.shipped().fill),)

    def training_step(self, batch: Batch, step: int) -> StepOutput:  # noqa: ARG002 - part of the interface
        """Loss of one micro-step on the stream `labeled`; accuracy in percent of the labeled pixels."""
        images, masks = batch["labeled"].images, batch["labeled"].labels
        logits = self.network(images)
        return StepOutput({"seg": self.label_loss(logits, masks)}, {"acc": pixel_accuracy(logits, masks)})

    def param_groups(self) -> Mapping[str, Sequence[ParamGroup]]:
        """One optimizer, `main`; groups by learning rate and weight decay."""
        return {"main": self.network.param_groups()}

    def deployable(self) -> Segmenter:
        """The network without adapters; their current values are merged into its weights."""
        return self.network.shipped()


def build_method(recipe: SupervisedRecipe, task: Task, load_model: LoadModel | None = None) -> SupervisedMethod:
    """Build the network with the weights that the recipe names, and what of it trains.

    Raises:
        RecipeError: parts of the recipe do not fit together, or the start model is of another network.
        WeightsError: weights are missing or do not fit.
    """
    segmenter = build_segmenter(recipe, task, load_weights=True)
    start_from(segmenter, recipe.start, load_model)
    return SupervisedMethod(TunedNetwork(segmenter, recipe))
