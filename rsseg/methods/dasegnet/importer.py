"""Import of the authors' checkpoints (.pth of their mmsegmentation fork)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from rsseg.backbones.loading import mit_to_timm
from rsseg.checkpoint import ModelHeader
from rsseg.errors import RecipeError, WeightsError
from rsseg.foreign import odd_tensors_refused, read_state_dict, rename
from rsseg.methods.base import check_classes, write_imported
from rsseg.methods.dasegnet.network import build_segmenter
from rsseg.methods.dasegnet.recipe import DASegNetRecipe
from rsseg.task import Task

_NETWORK = "ST-DASegNet"

_NECK_LEVEL = (
    (r"fc\.(.+)", r"distinct.squeeze.\1"),
    (r"fcs\.0\.(.+)", r"distinct.weigh_source.\1"),
    (r"fcs\.1\.(.+)", r"distinct.weigh_target.\1"),
    (r"conv\.conv\.(.+)", r"universal.common.\1"),
    (r"conv_s\.conv\.(.+)", r"universal.reduce_source.\1"),
    (r"conv_t\.conv\.(.+)", r"universal.reduce_target.\1"),
)

_DECODER = (
    (r"conv_seg\.(.+)", r"classifier.conv.\1"),
    (r"convs\.(.+)", r"projections.\1"),
    (r"fusion_conv\.(.+)", r"fusion.\1"),
    (r"image_pool\.1\.(.+)", r"pool.\1"),
    (r"aspp_modules\.(\d+)\.(.+)", r"branches.\1.\2"),
    (r"sep_bottleneck\.(\d+)\.(.+)", r"refine.\1.\2"),
    (r"c1_bottleneck\.(.+)", r"low.\1"),
    (r"bottleneck\.(.+)", r"bottleneck.\1"),
)

_SEPARABLE = (
    (".depthwise_conv.conv.", ".depthwise."),
    (".depthwise_conv.bn.", ".bn."),
    (".pointwise_conv.", ".pointwise."),
)

_RESNET = ((r"^stem\.7\.", "bn1."), (r"^stem\.([0-6])\.", r"conv1.\1."))

_PARTS = {
    "backbone_s": "backbone_source",
    "backbone_t": "backbone_target",
    "decode_head_s": "decoder_source",
    "decode_head_t": "decoder_target",
    "dsk_neck": "neck",
    "discriminator_s": "disc_source",
    "discriminator_t": "disc_target",
    "cross_EMA_decoder_s": "decoder_source",
    "cross_EMA_decoder_t": "decoder_target",
    "cross_EMA_decoder": "decoder_target",
    "cross_EMA_backbone": "backbone_target",
}
"""The authors' module names -> ours; parts of the teacher map to the module they average."""


@dataclass(frozen=True)
class AuthorsTensors:
    """A checkpoint under our names.

    segmenter       the network that ships, names as in its state dict
    discriminators  `disc_source...`, `disc_target...`
    teacher         `decoder_source...` and so on, of the averaged copies
    """

    segmenter: dict[str, Tensor] = field(default_factory=dict)
    discriminators: dict[str, Tensor] = field(default_factory=dict)
    teacher: dict[str, Tensor] = field(default_factory=dict)


def import_checkpoint(source: Path, recipe: DASegNetRecipe, task: Task, *, output: Path) -> ModelHeader:
    """Convert an authors' checkpoint into a model.safetensors, without teacher and discriminators.

    Args:
        source: the .pth file; no code in it is executed.
        recipe: describes the network.
        task: classes in the checkpoint's order, bands red, green, blue.
        output: file to write, see `write_imported`.
    """
    if recipe.single is not None:
        raise RecipeError(f"{recipe.name}: the authors' checkpoints have two students; give a recipe without `single`.")
    state = read_state_dict(source)
    with odd_tensors_refused(source, _NETWORK):
        tensors = rename_tensors(state).segmenter
    check_classes(tensors, "decoder_source.classifier.conv.weight", task, source)
    segmenter = build_segmenter(recipe, task)
    unread = unread_neck_levels(tensors, segmenter.state_dict())
    read = {name: value for name, value in tensors.items() if name not in unread}
    student = recipe.model_copy(
        update={"ship": "student"}
    )  # the average in the file is the teacher, which does not ship
    return write_imported(source, read, segmenter, student, output=output)


def unread_neck_levels(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> set[str]:
    """Neck tensors of levels that the decoders do not read (DeepLabV3+ reads two), which the authors' files have."""

    def level(name: str) -> str | None:
        found = re.match(r"neck\.levels\.\d+\.", name)
        return found[0] if found else None

    read = {level(name) for name in wanted}
    return {name for name in tensors if level(name) not in read and level(name) is not None}


def rename_tensors(state: Mapping[str, Tensor]) -> AuthorsTensors:
    """Split an authors' state dict into our parts under our names, without dropping tensors.

    Raises:
        WeightsError: a name that does not belong to ST-DASegNet.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part not in _PARTS:
            raise WeightsError(
                f"{name[:200]!r} is not a tensor of ST-DASegNet. Give a checkpoint of the authors' code."
            )
        parts.setdefault(part, {})[rest] = tensor
    renamed = AuthorsTensors()
    for part, tensors in parts.items():
        if part.startswith("discriminator"):
            chosen, tensors = renamed.discriminators, rename_discriminator(tensors)
        else:
            chosen = renamed.teacher if part.startswith("cross_EMA") else renamed.segmenter
            tensors = _rename_part(part, tensors)
        chosen |= {f"{_PARTS[part]}.{name}": tensor for name, tensor in tensors.items()}
    return renamed


def rename_backbone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """mmsegmentation's MixVisionTransformer or ResNetV1c -> our `Backbone`."""
    if any(name.startswith("stem.") for name in tensors):
        renamed = {}
        for name, tensor in tensors.items():
            for pattern, replacement in _RESNET:
                name = re.sub(pattern, replacement, name)
            renamed[name] = tensor
    else:
        renamed = mit_to_timm(tensors)
    return {f"body.network.{name}": tensor for name, tensor in renamed.items()}


def rename_neck(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`dsk_neck1` and so on -> `DisentangledNeck`."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"dsk_neck([1-9])\.(.+)", name)
        if not found:
            raise WeightsError(
                f"dsk_neck.{name[:200]}: not a level of the neck. Give a checkpoint of the authors' code."
            )
        renamed |= {
            f"levels.{int(found[1]) - 1}.{ours}": value for ours, value in rename_neck_level({found[2]: tensor}).items()
        }
    return renamed


def rename_neck_level(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`DSKNeck` or `DS2Neck` -> `DisentangledLevel`."""
    return {rename(name, _NECK_LEVEL, _NETWORK): tensor for name, tensor in tensors.items()}


def rename_decoder(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`SegformerHead` -> `SegFormerHead`, `DepthwiseSeparableASPPHead` -> `SeparableASPPHead`."""
    renamed = {}
    for name, tensor in tensors.items():
        name = rename(name, _DECODER, _NETWORK)
        for theirs, ours in _SEPARABLE:
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed


def rename_discriminator(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`AdapSegDiscriminator` -> `PatchDiscriminator`."""
    rules = ((r"discriminator\.(\d+)\.conv\.(.+)", r"convs.\1.\2"), (r"discriminator\.\d+\.(.+)", r"classify.\1"))
    return {rename(name, rules, _NETWORK): tensor for name, tensor in tensors.items()}


def _rename_part(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    match _PARTS[part].partition("_")[0]:
        case "backbone":
            return rename_backbone(tensors)
        case "neck":
            return rename_neck(tensors)
        case _:
            return rename_decoder(tensors)
