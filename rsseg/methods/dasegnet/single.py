"""ST-DASegNet's self-training with one plain network in place of the two students: no neck, no discriminators."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from rsseg.data.streams import Batch, Samples, StreamSpec
from rsseg.layers.blocks import unrecorded_statistics
from rsseg.layers.losses import cross_entropy, pixel_accuracy
from rsseg.methods.base import LoadModel, Method, ParamGroup, Segmenter, StepOutput, start_from
from rsseg.methods.dasegnet.method import check_batches, check_class_weights
from rsseg.methods.dasegnet.recipe import DASegNetRecipe
from rsseg.methods.dasegnet.self_training import Teacher, WeightedLabels, hide_patches, pseudo_labels, strong_view
from rsseg.methods.plain import PlainSegmenter, TunedNetwork, build_plain
from rsseg.task import Task


class SingleMethod(Method):
    """Losses: `seg` on source labels, `pseudo` and `masked` on target images labeled by the averaged network."""

    def __init__(self, recipe: DASegNetRecipe, network: TunedNetwork) -> None:
        """Store the parts; loss weights and options come from the recipe."""
        super().__init__()
        self.recipe = recipe
        self.network = network
        self.fill = fill = network.shipped().fill
        config = recipe.self_training
        self.teacher = None if config is None else Teacher(config.teacher, network, _no_random_teacher)
        self.streams: tuple[StreamSpec, ...] = (StreamSpec("source", "train", masks=True, fill=fill),)
        if config is not None:
            views = 1 if config.student_view == "strong" else 0
            self.streams += (StreamSpec("target", "train", masks=False, fill=fill, strong_views=views),)

    def training_step(self, batch: Batch, step: int) -> StepOutput:  # noqa: ARG002 - part of the interface
        """Losses of one micro-step on the streams `source` and `target`; accuracy in percent of the source's pixels."""
        source = batch["source"]
        logits = self.network(source.images)
        losses = {"seg": self.label_loss(logits, source.labels, divisor=self.recipe.loss_divisor)}
        logs = {"acc": pixel_accuracy(logits, source.labels)}
        if self.teacher is not None:
            taught, logs["pseudo_ratio"] = self._pseudo_losses(source, batch["target"])
            losses |= taught
        return StepOutput(losses, logs)

    def after_optimizer_step(self, step: int) -> None:
        """Update the teacher."""
        if self.teacher is not None:
            self.teacher.update(self.network, step)

    def param_groups(self) -> Mapping[str, Sequence[ParamGroup]]:
        """One optimizer, `main`; groups by learning rate and weight decay."""
        return {"main": self.network.param_groups()}

    def deployable(self) -> Segmenter:
        """The network that the optimizer trains, adapters merged."""
        return self.network.shipped()

    def _pseudo_losses(self, source: Samples, target: Samples) -> tuple[dict[str, Tensor], Tensor]:
        """Losses on the teacher's labels of target images, and the fraction of confident pixels."""
        config = self.recipe.self_training
        assert config is not None  # for the type checker: there is a teacher
        assert self.teacher is not None
        logits = self.teacher.averaged("segmenter")(target.images)
        pseudo = pseudo_labels(logits, target.images.shape[-2:], target.valid, config)
        losses = {"pseudo": config.weight * self._loss(*strong_view(source, target, pseudo, config))}
        if config.masked is not None:
            hidden = hide_patches(target.images, self.fill, patch=config.masked.patch, ratio=config.masked.ratio)
            losses["masked"] = config.weight * config.masked.weight * self._loss(hidden, pseudo)
        return losses, pseudo.ratio

    def _loss(self, images: Tensor, pseudo: WeightedLabels) -> Tensor:
        """Weighted cross-entropy on a harder view, which batch norms do not record: it does not resemble the images of
        prediction.
        """
        with unrecorded_statistics(self.network):
            logits = self.network(images)
        divisor = self.recipe.loss_divisor
        return cross_entropy(logits, pseudo.labels, pixel_weights=pseudo.weights, divisor=divisor)


def _no_random_teacher(_: str) -> nn.Module:
    raise AssertionError("the recipe allows only a teacher that starts as the student")


def build_segmenter(recipe: DASegNetRecipe, task: Task, *, load_weights: bool = False) -> PlainSegmenter:
    """Build the network that ships, by default untrained and without opening a file; see `build_plain`."""
    assert recipe.single is not None  # for the type checker: the registry has looked
    crop_size = recipe.data.augment_of("source").crop_size
    return build_plain(recipe.backbone, recipe.single.decoder, task, crop_size=crop_size, load_weights=load_weights)


def build_method(recipe: DASegNetRecipe, task: Task, load_model: LoadModel | None = None) -> SingleMethod:
    """Build the network with the weights that the recipe names, and its teacher.

    Raises:
        RecipeError: parts of the recipe do not fit together, or the start model is of another network.
        WeightsError: weights are missing or do not fit.
    """
    assert recipe.single is not None  # for the type checker: the registry has looked
    check_class_weights(recipe, task)
    check_batches(recipe)
    segmenter = build_segmenter(recipe, task, load_weights=True)
    start_from(segmenter, recipe.start, load_model)
    return SingleMethod(recipe, TunedNetwork(segmenter, recipe.single))
