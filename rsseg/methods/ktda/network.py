"""The network that ships: student, FAM, neck, FMM and decoder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rsseg.backbones.backbone import Backbone, BackboneInfo
from rsseg.backbones.zoo import create_backbone
from rsseg.config import BackboneConfig
from rsseg.errors import RecipeError
from rsseg.layers.blocks import resize_logits
from rsseg.layers.decoders import SegFormerHead, UPerNet
from rsseg.methods.base import FLEXIBLE_TILE, Segmenter, TileHint
from rsseg.methods.ktda.parts import (
    BottleneckMlp,
    FeatureAlignment,
    FeatureModulation,
    MultiLevelNeck,
    TransformerBlock,
    fused,
)
from rsseg.methods.ktda.recipe import DecoderConfig, FamConfig, FmmConfig, KTDARecipe
from rsseg.task import Task


@dataclass(frozen=True)
class StudentPass:
    """Results of one forward pass that a training step uses.

    aligned   FAM's outputs (only their sum if fused), which are distilled; without FAM the student's levels
    features  the decoder's inputs, one per level
    logits    (B, K, h, w) at the decoder's resolution
    """

    aligned: list[Tensor]
    features: list[Tensor]
    logits: Tensor


class KTDASegmenter(Segmenter):
    """Student -> FAM -> (sum) -> neck -> FMM -> decoder; all parts except student and decoder may be None."""

    def __init__(
        self,
        task: Task,
        student: Backbone,
        decoder: UPerNet | SegFormerHead,
        *,
        fam: FeatureAlignment | None = None,
        fuse: bool = False,
        neck: MultiLevelNeck | None = None,
        fmm: FeatureModulation | None = None,
        tile: TileHint = FLEXIBLE_TILE,
    ) -> None:
        info = student.info
        super().__init__(task, input_multiple=info.input_multiple, fill=info.mean, tile=tile)
        self.student, self.fam, self.neck, self.fmm, self.decoder = student, fam, neck, fmm, decoder
        self.fuse = fuse

    def forward(self, images: Tensor) -> Tensor:
        """float (B, C, H, W) in scaled units -> float logits (B, K, H, W)."""
        return self.to_size(self.run(images).logits, images.shape[-2:])

    def low_resolution_logits(self, images: Tensor) -> Tensor:
        """See `Segmenter.low_resolution_logits`."""
        return self(images) if self.decoder.align_corners else self.run(images).logits

    def padded(self, images: Tensor) -> Tensor:
        """See `Segmenter.padded`. With a fixed grid, which spans the whole input, only tiny images are padded."""
        fixed = self.fam is not None and self.fam.grid is not None
        return images if fixed and min(images.shape[-2:]) >= self.input_multiple else super().padded(images)

    def start_parts(self) -> Mapping[str, Sequence[nn.Module]]:
        """See `Segmenter.start_parts`."""
        between = {"fam": self.fam, "neck": self.neck, "fmm": self.fmm}
        parts = {"backbone": self.student, "decoder": self.decoder} | {k: v for k, v in between.items() if v}
        return {role: (part,) for role, part in parts.items()}

    def run(self, images: Tensor) -> StudentPass:
        """Forward pass with all tensors that losses need; images as in `forward`."""
        aligned = self.align(images)
        features = self.neck(aligned) if self.neck else aligned
        features = self.fmm(features) if self.fmm else features
        return StudentPass(aligned, features, self.decoder(features))

    def align(self, images: Tensor) -> list[Tensor]:
        """Student and FAM only: the maps that are distilled."""
        levels = list(self.student(images))
        if self.fam:
            levels = self.fam(levels, images.shape[-2:])
        return [fused(levels)] if self.fuse else levels

    def to_size(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """Resize logits of any resolution as the decoder does."""
        return resize_logits(logits, size, align_corners=self.decoder.align_corners)


def build_segmenter(recipe: KTDARecipe, task: Task) -> KTDASegmenter:
    """Build the network untrained, without opening a file.

    Raises:
        RecipeError: parts of the recipe do not fit together.
    """
    student = create_backbone(recipe.student, task, load_weights=False)
    return assemble_segmenter(recipe, task, student, teacher_info(recipe.teacher, task))


def teacher_info(config: BackboneConfig | None, task: Task) -> BackboneInfo | None:
    """Widths and patch size of the teacher, found without allocating its weights."""
    if config is None:
        return None
    with torch.device("meta"):
        return create_backbone(config, task, load_weights=False).info


def assemble_segmenter(
    recipe: KTDARecipe, task: Task, student: Backbone, teacher: BackboneInfo | None
) -> KTDASegmenter:
    """Build all parts after a given student according to the recipe; see `build_segmenter`."""
    widths: Sequence[int] = student.info.channels
    fam = neck = fmm = None
    if recipe.fam and not recipe.side:
        fam = make_fam(recipe.fam, student.info, teacher)
        widths = [projection.out_channels for projection in fam.projections]  # type: ignore[misc]
    if recipe.fuse:
        if len(set(widths)) > 1:
            raise RecipeError(f"fuse: maps of different widths {list(widths)} cannot be summed. Give one fam.width.")
        widths = widths[:1]
    if recipe.neck:
        scales = recipe.neck.scales
        if len(widths) not in (1, len(scales)):
            raise RecipeError(f"neck.scales: {len(scales)} factors for {len(widths)} maps. Give one factor per map.")
        neck = MultiLevelNeck(widths, recipe.neck.width or widths[0], scales=scales, sampling=recipe.neck.sampling)
        widths = [recipe.neck.width or widths[0]] * len(scales)
    if recipe.fmm:
        fmm = make_fmm(recipe.fmm, widths)
    return KTDASegmenter(
        task,
        student,
        make_decoder(recipe.decoder, widths, task.num_classes),
        fam=fam,
        fuse=recipe.fuse,
        neck=neck,
        fmm=fmm,
        tile=_tile_hint(recipe),
    )


def make_fam(config: FamConfig, student: BackboneInfo, teacher: BackboneInfo | None) -> FeatureAlignment:
    """FAM from a student's levels to a teacher's maps; without a teacher `config` gives width and grid.

    Raises:
        RecipeError: the student cannot be aligned to the teacher's maps.
    """
    targets = _target_widths(config, len(student.channels), teacher)
    grid = None if config.grid == "auto" else config.grid
    patch = teacher.patch_size if teacher and teacher.patch_size else 1  # no teacher, no `auto`
    return FeatureAlignment(student.channels, targets, grid=grid, patch=patch)


def _target_widths(config: FamConfig, levels: int, teacher: BackboneInfo | None) -> Sequence[int]:
    """Channels per FAM level; raise unless they are the teacher's."""
    if teacher is None:
        return [config.width or 0] * levels
    if teacher.kind != "vit":
        raise RecipeError(f"teacher: {teacher.name} is not a vision transformer. `rsseg backbone ls` shows the kinds.")
    if len(teacher.channels) != levels:
        raise RecipeError(
            f"teacher.out_indices: the student has {levels} levels, the teacher gives {len(teacher.channels)} maps. "
            "Set teacher.out_indices or student.out_indices so that they agree."
        )
    if config.width and {config.width} != set(teacher.channels):
        raise RecipeError(
            f"fam.width: {config.width}, but the teacher's maps have {list(teacher.channels)} channels. Leave it out."
        )
    return teacher.channels


def make_fmm(config: FmmConfig, widths: Sequence[int]) -> FeatureModulation:
    """Build one stack of blocks per level of the given widths."""
    return FeatureModulation([_fmm_stack(config, width) for width in widths])


def _fmm_stack(config: FmmConfig, width: int) -> list[nn.Module]:
    if config.type == "mlp":
        if width < config.rank_dim:
            raise RecipeError(f"fmm.rank_dim: {config.rank_dim} is more than the {width} channels. Give a smaller one.")
        return [BottleneckMlp(width, rank_dim=config.rank_dim) for _ in range(config.depth)]
    if width % config.heads:
        raise RecipeError(f"fmm.heads: {width} channels are not divisible by {config.heads} heads. Change fmm.heads.")
    return [TransformerBlock(width, heads=config.heads, norm_eps=config.norm_eps) for _ in range(config.depth)]


def make_decoder(config: DecoderConfig, widths: Sequence[int], num_classes: int) -> UPerNet | SegFormerHead:
    """Build the decoder for levels of the given widths."""
    options: dict[str, Any] = {
        "channels": config.channels,
        "dropout": config.dropout,
        "align_corners": config.align_corners,
    }
    if config.type == "segformer":
        return SegFormerHead(widths, num_classes, **options)
    return UPerNet(widths, num_classes, pool_scales=config.pool_scales, **options)


def _tile_hint(recipe: KTDARecipe) -> TileHint:
    """Large tiles for convolutional networks; the training size with a fixed grid or attention."""
    attends = recipe.fmm is not None and recipe.fmm.type == "vit_block"
    if attends or (recipe.fam and not recipe.side and recipe.fam.grid != "auto"):
        crop = recipe.data.augment_of("labeled").crop_size
        return TileHint(size=crop, overlap=crop // 8, flexible=False)
    return FLEXIBLE_TILE
