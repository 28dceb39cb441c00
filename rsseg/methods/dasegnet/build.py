"""From a recipe to the training module, and the checks that need the whole recipe."""

from collections.abc import Callable

from torch import nn

from rsseg.backbones.zoo import create_backbone
from rsseg.data.streams import StreamSpec
from rsseg.errors import RecipeError
from rsseg.methods.dasegnet.discriminator import PatchDiscriminator, accepts_map, smallest_map
from rsseg.methods.dasegnet.method import DASegNetMethod
from rsseg.methods.dasegnet.network import DASegNet, build_decoder, build_segmenter
from rsseg.methods.dasegnet.recipe import DASegNetRecipe
from rsseg.methods.dasegnet.teacher import Teacher
from rsseg.task import Task

FreshPart = Callable[[str], nn.Module]
"""Name of a part of the student ("" for all of it) -> such a module with random weights."""


def build_method(recipe: DASegNetRecipe, task: Task) -> DASegNetMethod:
    """Both students with the weights that the recipe names, the rest untrained.

    Raises:
        RecipeError: class weights of the wrong length, crops too small for the discriminators, batches too small.
        WeightsError: weights are missing, foreign or may not be fetched.
    """
    check_class_weights(recipe, task)
    segmenter = build_segmenter(recipe, task, load_weights=True)

    def fresh(part: str) -> nn.Module:
        match part:
            case "backbone_target":
                return create_backbone(recipe.backbone, task, load_weights=False)
            case "decoder_source" | "decoder_target":
                return build_decoder(recipe.decoder, segmenter.decoder_channels, task.num_classes)
            case _:
                return build_segmenter(recipe, task)

    return assemble_method(recipe, segmenter, fresh)


def assemble_method(recipe: DASegNetRecipe, segmenter: DASegNet, fresh: FreshPart) -> DASegNetMethod:
    """Discriminators and teacher as the recipe says, round a given network; see `build_method`."""
    check_batches(recipe)
    info = segmenter.backbone_source.info
    discriminators = None
    if recipe.adversarial is not None:
        config = recipe.adversarial
        first, second = (
            PatchDiscriminator(info.channels[-1], base_channels=config.base_channels, convs=config.convs)
            for _ in range(2)
        )
        check_crops(recipe, stride=info.strides[-1], strides=first.strides)
        discriminators = (first, second)
    teacher = None
    strong_views = 0
    if recipe.self_training is not None:
        teacher = Teacher(recipe.self_training.teacher, segmenter, fresh)
        strong_views = 1 if recipe.self_training.student_view == "strong" else 0
    streams = [
        StreamSpec("source", split="train", masks=True, fill=segmenter.fill, rare_classes=recipe.rare_class_sampling)
    ]
    if recipe.uses_target:
        streams.append(StreamSpec("target", split="train", masks=False, fill=segmenter.fill, strong_views=strong_views))
    return DASegNetMethod(recipe, segmenter, discriminators=discriminators, teacher=teacher, streams=streams)


def check_class_weights(recipe: DASegNetRecipe, task: Task) -> None:
    """Raise `RecipeError` unless every list of class weights has one entry per class."""
    lists = {
        "source_decoder_weights": recipe.source_decoder_weights,
        "target_decoder_weights": recipe.target_decoder_weights,
    }
    if recipe.self_training is not None:
        weights = recipe.self_training.class_weights
        short = weights is not None and len(weights) < task.num_classes
        if not (short and recipe.self_training.missing_class_weights == "class_index"):
            lists["self_training.class_weights"] = weights
    for key, weights in lists.items():
        if weights is not None and len(weights) != task.num_classes:
            raise RecipeError(
                f"{key} has {len(weights)} entries, {task.name} has {task.num_classes} classes: "
                f"{list(task.class_names)}. Give one weight per class, in this order."
            )


def check_crops(recipe: DASegNetRecipe, *, stride: int, strides: tuple[int, ...]) -> None:
    """Raise `RecipeError` for crops whose last features are too small for discriminators with these strides."""
    for stream in recipe.stream_names():
        crop = recipe.data.augment_of(stream).crop_size
        side = -(-crop // stride)
        if not accepts_map((side, side), strides):
            raise RecipeError(
                f"stream {stream!r}: crops of {crop} pixels give features of {side} x {side}, too small for the "
                f"discriminators. The smallest legal crop_size is {smallest_map(strides) * stride}; or lower "
                "adversarial.convs."
            )


def check_batches(recipe: DASegNetRecipe) -> None:
    """Raise `RecipeError` for batches and crops that the decoder or ClassMix cannot use."""
    trainer = recipe.trainer
    used = recipe.stream_names() if recipe.uses_target else ("source",)
    smallest = min(trainer.stream_batch_sizes.get(stream, trainer.batch_size) for stream in used)
    if recipe.decoder.type == "deeplabv3plus" and smallest < 2:
        raise RecipeError(
            "trainer.batch_size: DeepLabV3+ pools each image to one value per channel, so its batch norm needs 2 or "
            "more images per stream. Set batch_size: 2 (and grad_accum_steps lower)."
        )
    mixes = recipe.self_training is not None and recipe.self_training.class_mix
    sizes = [recipe.data.augment_of(stream).crop_size for stream in recipe.stream_names()]
    if mixes and sizes[0] != sizes[1]:
        raise RecipeError(
            f"self_training.class_mix: source crops have {sizes[0]} pixels, target crops {sizes[1]}. "
            "Give both streams the same crop_size."
        )
