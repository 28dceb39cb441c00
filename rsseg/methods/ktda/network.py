"""The network that ships: student, feature alignment (FAM), multi-level neck, feature modulation (FMM) and decoder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsseg.backbones.backbone import Backbone, BackboneInfo, create_backbone
from rsseg.config import BackboneConfig
from rsseg.errors import RecipeError
from rsseg.layers.blocks import resize, resize_logits
from rsseg.layers.decoders import SegFormerHead, UPerNet
from rsseg.methods.base import FLEXIBLE_TILE, Segmenter, TileHint
from rsseg.methods.ktda.recipe import DecoderConfig, FamConfig, FmmConfig, KTDARecipe
from rsseg.task import Task


class FeatureAlignment(nn.Module):
    """FAM: projects each student level to the teacher's width (1x1 convolution) and grid (bilinear resize).

    A level larger than the grid is sub-sampled without averaging, as published.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        *,
        grid: int | None,
        patch: int = 14,
        resize_first: bool = False,
    ) -> None:
        """Build one projection per level.

        Args:
            in_channels: per student level.
            out_channels: per teacher map.
            grid: side of the square grid for images of any shape (published); None: one cell per started patch of
                the image.
            patch: the teacher's patch size in pixels; used only without `grid`.
            resize_first: resize levels that are larger than the grid before their projection, which is cheaper and
                equal up to rounding, because the weights of a bilinear resize sum to 1. Published: afterwards.
        """
        super().__init__()
        self.grid, self.patch, self.resize_first = grid, patch, resize_first
        self.projections = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(in_channels, out_channels, strict=True))
        self.apply(_truncated_normal)

    def forward(self, maps: Sequence[Tensor], image_size: Sequence[int]) -> list[Tensor]:
        """(B, in_channels[i], H_i, W_i) per level of images of `image_size` -> (B, out_channels[i], rows, columns)."""
        rows, columns = (self.grid or -(-side // self.patch) for side in image_size)
        aligned = []
        for project, level in zip(self.projections, maps, strict=True):
            if self.resize_first and level.shape[-2:].numel() > rows * columns:
                aligned.append(project(resize(level, (rows, columns))))
            else:
                aligned.append(resize(project(level), (rows, columns)))
        return aligned


class MultiLevelNeck(nn.Module):
    """Builds a pyramid from maps of one size: per level a 1x1 convolution, a resize by a factor and a 3x3 convolution.

    Levels do not mix. A single input yields one level per factor.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        *,
        scales: Sequence[float],
        sampling: Literal["factor", "ratio"] = "factor",
    ) -> None:
        """Build the convolutions.

        Args:
            in_channels: per input map: one, or as many as `scales`.
            out_channels: of every level.
            scales: size factor per level; sizes are rounded down.
            sampling: if a size was rounded, `factor` samples at multiples of 1/scale (published), which omits the end
                of the map; `ratio` spreads the samples over the whole map.
        """
        super().__init__()
        self.scales, self.sampling = tuple(scales), sampling
        self.laterals = nn.ModuleList(nn.Conv2d(width, out_channels, 1) for width in in_channels)
        self.convs = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in scales)
        for conv in (*self.laterals, *self.convs):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """(B, in_channels[i], H, W) per input -> (B, out_channels, floor(H * scale), floor(W * scale)) per scale."""
        lateral = [conv(level) for conv, level in zip(self.laterals, maps, strict=True)]
        if len(lateral) == 1:
            lateral *= len(self.scales)
        return [
            conv(self._resize(level, scale))
            for conv, level, scale in zip(self.convs, lateral, self.scales, strict=True)
        ]

    def _resize(self, level: Tensor, scale: float) -> Tensor:
        if self.sampling == "ratio":
            return resize(level, [max(1, int(side * scale)) for side in level.shape[-2:]])
        return level if scale == 1 else F.interpolate(level, scale_factor=scale, mode="bilinear", align_corners=False)


class FeatureModulation(nn.Module):
    """FMM: one stack of token blocks per level, without position embeddings, windows or shared weights."""

    def __init__(self, stacks: Sequence[Sequence[nn.Module]]) -> None:
        """`stacks[i]` are level i's blocks, each (B, tokens, channels) -> the same shape."""
        super().__init__()
        self.stacks = nn.ModuleList(nn.Sequential(*stack) for stack in stacks)
        self.apply(_truncated_normal)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """(B, C_i, H_i, W_i) per level -> the same shapes."""
        return [
            stack(level.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, level.shape[-2:])
            for stack, level in zip(self.stacks, maps, strict=True)
        ]


class BottleneckMlp(nn.Module):
    """FMM's `mlp`: channels -> channels // rank_dim -> channels, without a residual, as published."""

    def __init__(self, channels: int, *, rank_dim: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // rank_dim)
        self.fc2 = nn.Linear(channels // rank_dim, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.fc2(F.gelu(self.fc1(tokens)))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """FMM's `vit_block`: pre-norm attention over all tokens of a level, then an MLP of ratio 4, residuals on both.

    Memory grows with T, not with T squared (scaled_dot_product_attention).
    """

    def __init__(self, channels: int, *, heads: int = 8, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(channels, eps=norm_eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels, eps=norm_eps)
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        tokens = tokens + self._attend(self.norm1(tokens))
        return tokens + self.fc2(F.gelu(self.fc1(self.norm2(tokens))))  # type: ignore[no-any-return]

    def _attend(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def fused(maps: Sequence[Tensor]) -> Tensor:
    """Sum of maps of one shape, not in place."""
    return torch.stack(list(maps)).sum(dim=0)


def _truncated_normal(module: nn.Module) -> None:
    """Published initialization of FAM and FMM: normal, std 0.02, truncated at +-2 (absolute); biases 0."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


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
    return FeatureAlignment(student.channels, targets, grid=grid, patch=patch, resize_first=config.path == "side")


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
