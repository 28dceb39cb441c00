"""The shipped network of plain supervised training: backbone and decoder."""

from collections.abc import Sequence

from torch import Tensor, nn

from rsseg.backbones.backbone import Backbone, BackboneInfo
from rsseg.backbones.table import find_entry
from rsseg.backbones.zoo import create_backbone
from rsseg.config import BackboneConfig
from rsseg.errors import RecipeError
from rsseg.layers.blocks import resize_logits
from rsseg.layers.decoders import LinearHead, SegFormerHead, SeparableASPPHead, UPerNet
from rsseg.layers.dpt import PYRAMID_FACTORS, DPTHead, TokenPyramid
from rsseg.methods.base import Segmenter, TileHint
from rsseg.methods.supervised.recipe import DecoderConfig, SupervisedRecipe
from rsseg.task import Task


class SupervisedSegmenter(Segmenter):
    """Backbone -> decoder -> logits, resized to the image."""

    def __init__(
        self, task: Task, backbone: Backbone, decoder: nn.Module, *, align_corners: bool, crop_size: int
    ) -> None:
        """Store the parts.

        Args:
            task: classes and bands.
            backbone: images to maps.
            decoder: maps to logits of any resolution.
            align_corners: of the resize to the image.
            crop_size: side of the training crops in pixels, also the tile size of a transformer.
        """
        info = backbone.info
        attends = info.kind == "vit"
        tile = TileHint(crop_size, crop_size // 4, flexible=False) if attends else TileHint(1280, 128, flexible=True)
        super().__init__(task, input_multiple=info.input_multiple, fill=info.mean, tile=tile)
        self.backbone, self.decoder = backbone, decoder
        self.align_corners, self.crop_size = align_corners, crop_size

    def forward(self, images: Tensor) -> Tensor:
        """float (B, C, H, W) in scaled units -> float logits (B, K, H, W)."""
        return self.decode(self.backbone(images), images.shape[-2:])

    def low_resolution_logits(self, images: Tensor) -> Tensor:
        """See `Segmenter.low_resolution_logits`."""
        return self(images) if self.align_corners else self.decoder(self.backbone(images))  # type: ignore[no-any-return]

    def with_backbone(self, backbone: Backbone) -> "SupervisedSegmenter":
        """A segmenter that shares this decoder, with another backbone of the same architecture."""
        return SupervisedSegmenter(
            self.task, backbone, self.decoder, align_corners=self.align_corners, crop_size=self.crop_size
        )

    def decode(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """The backbone's maps -> float32 logits (B, K, *size)."""
        return resize_logits(self.decoder(maps), size, align_corners=self.align_corners)


def build_segmenter(recipe: SupervisedRecipe, task: Task) -> SupervisedSegmenter:
    """Build the network untrained, without opening a file.

    Raises:
        RecipeError: backbone and decoder do not fit together.
    """
    return assemble_segmenter(recipe, task, create_backbone(backbone_config(recipe), task, load_weights=False))


def assemble_segmenter(recipe: SupervisedRecipe, task: Task, backbone: Backbone) -> SupervisedSegmenter:
    """Build the decoder of a recipe on a given backbone; see `build_segmenter`."""
    config = recipe.decoder
    try:
        decoder = make_decoder(config, backbone.info, task.num_classes)
    except ValueError as error:
        raise RecipeError(
            f"decoder.type: {config.type!r} does not fit {backbone.info.name}: {error}. "
            "Choose another decoder, or set backbone.out_indices."
        ) from None
    align_corners = {"segformer": config.align_corners, "upernet": config.align_corners, "dpt": True}
    return SupervisedSegmenter(
        task,
        backbone,
        decoder,
        align_corners=align_corners.get(config.type, False),
        crop_size=recipe.data.augment_of("labeled").crop_size,
    )


def make_decoder(config: DecoderConfig, info: BackboneInfo, num_classes: int) -> nn.Module:
    """Build an untrained decoder: the backbone's maps -> logits (B, K, h, w).

    Raises:
        ValueError: the decoder cannot use these maps.
    """
    match config.type:
        case "segformer":
            return SegFormerHead(
                info.channels,
                num_classes,
                channels=config.channels or 256,
                dropout=config.dropout,
                align_corners=config.align_corners,
            )
        case "linear":
            return LinearHead(info.channels, num_classes)
        case "dpt":
            return DPTHead(
                info.channels, info.strides, num_classes, widths=config.widths, features=config.channels or 64
            )
        case "upernet":
            head: nn.Module = UPerNet(
                info.channels,
                num_classes,
                channels=config.channels or 512,
                pool_scales=config.pool_scales,
                dropout=config.dropout,
                align_corners=config.align_corners,
            )
        case "deeplabv3plus":
            head = SeparableASPPHead(
                info.channels,
                num_classes,
                channels=config.channels or 512,
                dilations=config.dilations,
                low_channels=config.low_channels,
                dropout=config.dropout,
            )
    if info.kind == "pyramid":
        return head
    factors = (4, 1) if config.type == "deeplabv3plus" else PYRAMID_FACTORS
    return nn.Sequential(TokenPyramid(info.channels, factors), head)


def backbone_config(recipe: SupervisedRecipe) -> BackboneConfig:
    """The recipe's backbone with the maps that the decoder reads: DeepLabV3+ the first and the last."""
    config = recipe.backbone
    if recipe.decoder.type != "deeplabv3plus":
        return config
    indices = config.out_indices or find_entry(config.name).out_indices
    return config.model_copy(update={"out_indices": (indices[0], indices[-1])})
