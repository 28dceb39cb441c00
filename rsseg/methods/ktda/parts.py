"""Modules of KTDA: feature alignment (FAM), multi-level neck, and feature modulation (FMM)."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsseg.layers.blocks import resize


class FeatureAlignment(nn.Module):
    """FAM: projects each student level to the teacher's width (1x1 convolution) and grid (bilinear resize).

    A level larger than the grid is sub-sampled without averaging, as published.
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: Sequence[int], *, grid: int | None, patch: int = 14
    ) -> None:
        """Build one projection per level.

        Args:
            in_channels: per student level.
            out_channels: per teacher map.
            grid: side of the square grid for images of any shape (published); None: one cell per started patch of
                the image.
            patch: the teacher's patch size in pixels; used only without `grid`.
        """
        super().__init__()
        self.grid, self.patch = grid, patch
        self.projections = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(in_channels, out_channels, strict=True))
        self.apply(_truncated_normal)

    def forward(self, maps: Sequence[Tensor], image_size: Sequence[int]) -> list[Tensor]:
        """(B, in_channels[i], H_i, W_i) per level of images of `image_size` -> (B, out_channels[i], rows, columns)."""
        rows, columns = (self.grid or -(-side // self.patch) for side in image_size)
        return [resize(project(level), (rows, columns)) for project, level in zip(self.projections, maps, strict=True)]


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
