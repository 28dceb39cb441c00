"""Feature maps of timm networks: levels of a pyramid, or token maps of a vision transformer."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rsseg.errors import WeightsError

PositionMode = Literal["timm", "dinov2", "bicubic"]


def resample_positions(table: Tensor, grid: tuple[int, int], *, prefix: int, mode: PositionMode) -> Tensor:
    """Resize a table of position embeddings; the entries of class and register tokens are unchanged.

    Args:
        table: (1, prefix + n * n, D), the square grid row-major after the prefix entries.
        grid: rows and columns of the result. A table of this grid is returned unchanged.
        prefix: number of entries without a position.
        mode: `timm`: bicubic with antialiasing. `bicubic`: without, to an explicit size (mmpretrain). `dinov2`:
            without, at samples placed by the scale factor (n_new + 0.1) / n_old, as in the DINOv2 repository:
            source = (i + 0.5) * n_old / (n_new + 0.1) - 0.5.

    Returns:
        (1, prefix + rows * columns, D) in the table's dtype; computed in float32.

    Raises:
        WeightsError: the table is not square.
    """
    side = math.isqrt(table.shape[1] - prefix)
    if side * side != table.shape[1] - prefix:
        raise WeightsError(
            f"a position table of {table.shape[1]} entries, {prefix} of them without a position, is not square. "
            "Give weights with a square grid."
        )
    if grid == (side, side):
        return table
    kept, positions = table[:, :prefix], table[:, prefix:]
    maps = positions.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if mode == "dinov2":
        factors = [(cells + 0.1) / side for cells in grid]
        resized = F.interpolate(maps, scale_factor=factors, mode="bicubic", align_corners=False)
    else:
        resized = F.interpolate(maps, size=grid, mode="bicubic", align_corners=False, antialias=mode == "timm")
    return torch.cat([kept, resized.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels at each position of an NCHW map; eps 1e-6 as in ConvNeXt and ViT."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> same shape, channels-last in memory."""
        normed = F.layer_norm(input.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return normed.permute(0, 3, 1, 2)


class _Body(nn.Module):
    """A network whose frozen parts have no gradients and always stay in eval mode."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self._frozen: tuple[nn.Module, ...] = ()

    def _freeze(self, parts: Iterable[nn.Module]) -> None:
        self._frozen = tuple(parts)
        for part in self._frozen:
            part.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all but the frozen parts."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self


class Pyramid(_Body):
    """Levels of a network, optionally each with its own LayerNorm.

    The norm acts on the returned map only; the next stage gets the map without it.
    """

    def __init__(
        self,
        network: Any,
        *,
        indices: Mapping[int, int],
        channels: Mapping[int, int],
        normed: Sequence[int],
        stages: Sequence[Sequence[nn.Module]],
    ) -> None:
        """Wrap a network without head.

        Args:
            network: has timm's `forward_intermediates`.
            indices: level -> index of the network's intermediate map, in the order of the returned maps.
            channels: of each of these levels.
            normed: levels that get a LayerNorm.
            stages: the parts of `network` that compute level 0 (with the stem), then level 1, and so on.
        """
        super().__init__(network)
        self.indices = dict(indices)
        self.norms = nn.ModuleDict({str(level): LayerNorm2d(channels[level]) for level in indices if level in normed})
        self._stages = tuple(tuple(parts) for parts in stages)

    def freeze(self, stages: int) -> None:
        """Freeze stem and first `stages` levels; the norms of the levels still train, as in mmpretrain's ConvNeXt."""
        self._freeze(part for parts in self._stages[:stages] for part in parts)

    def parameters_by_depth(self) -> list[list[nn.Parameter]]:
        """One list per level; the stem counts with the first, a level's own norm with its level."""
        levels = [[p for part in parts for p in part.parameters()] for parts in self._stages]
        for level, norm in self.norms.items():
            levels[int(level)] += norm.parameters()
        return levels

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalized images (B, C, H, W) -> NCHW maps, one per level."""
        ascending = sorted(self.indices.values())
        maps = self.network.forward_intermediates(images, indices=ascending, intermediates_only=True)
        found = dict(zip(ascending, maps, strict=True))
        return tuple(self._normed(level, found[index]) for level, index in self.indices.items())

    def _normed(self, level: int, plain: Tensor) -> Tensor:
        key = str(level)
        return self.norms[key](plain) if key in self.norms else plain


class TokenMaps(_Body):
    """Blocks of a ViT, with the network's final norm where asked; class and register tokens are dropped."""

    def __init__(
        self, network: Any, *, out_indices: Sequence[int], normed: Sequence[int], position: PositionMode | None
    ) -> None:
        """Wrap a network without head.

        Args:
            network: timm's VisionTransformer, or if `position` is None any network with `forward_intermediates`.
            out_indices: zero-based blocks, in the order of the returned maps.
            normed: those of them that pass the final norm.
            position: resampling of the position table; None leaves positions to the network.
        """
        super().__init__(network)
        self.out_indices = tuple(out_indices)
        self.normed = frozenset(normed)
        self.position = position
        self.checkpoint = False
        """Keep only each block's input for the backward pass, which computes the block again."""
        self.again_in: Callable[[], AbstractContextManager[None]] = nullcontext
        """Context of that computation, for a caller that runs the blocks within one."""

    @property
    def position_prefix(self) -> int:
        """Number of entries of the position table without a position."""
        return 0 if self.network.no_embed_class else int(self.network.num_prefix_tokens)

    def freeze(self, blocks: int) -> None:
        """Freeze the first `blocks` blocks and all before them; with the last block also the final norm."""
        if not blocks:
            return
        network = self.network
        parts = [network.patch_embed, network.norm_pre, *network.blocks[:blocks]]
        if blocks >= len(network.blocks) and self.normed:
            parts.append(network.norm)
        for parameter in network.parameters(recurse=False):  # position table, class and register tokens
            parameter.requires_grad_(False)
        self._freeze(parts)

    def parameters_by_depth(self) -> list[list[nn.Parameter]]:
        """Embedding, then one list per block; the final norm counts with the last block."""
        last = dict(self.network.named_children()).get("norm", nn.Identity())
        blocks = [list(block.parameters()) for block in self.network.blocks]
        blocks[-1] += last.parameters()
        later = {id(p) for block in blocks for p in block}
        return [[p for p in self.network.parameters() if id(p) not in later], *blocks]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalized images (B, C, H, W), sides multiples of the patch -> (B, D, H / patch, W / patch) per index."""
        ascending = sorted(self.out_indices)
        if self.position is None:
            maps = self.network.forward_intermediates(images, indices=ascending, intermediates_only=True)
        else:
            maps = self._block_maps(images, ascending, self.position)
        found = dict(zip(ascending, maps, strict=True))
        return tuple(self._normed(found[i]) if i in self.normed else found[i] for i in self.out_indices)

    def _normed(self, plain: Tensor) -> Tensor:
        return self.network.norm(plain.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]

    def _block_maps(self, images: Tensor, ascending: Sequence[int], position: PositionMode) -> list[Tensor]:
        network = self.network
        # patch_embed as a whole accepts only the image size that the network was built for
        patches = network.patch_embed.norm(network.patch_embed.proj(images).permute(0, 2, 3, 1))
        batch, rows, columns, _ = patches.shape
        tokens = self._positioned(patches.flatten(1, 2), (rows, columns), position)
        maps = []
        for index, block in enumerate(network.blocks):
            tokens = self._block(block, tokens)
            if index in ascending:
                plain = tokens[:, network.num_prefix_tokens :]
                maps.append(plain.reshape(batch, rows, columns, -1).permute(0, 3, 1, 2))
        return maps

    def _block(self, block: nn.Module, tokens: Tensor) -> Tensor:
        if not (self.checkpoint and torch.is_grad_enabled()):
            return block(tokens)  # type: ignore[no-any-return]
        contexts = lambda: (nullcontext(), self.again_in())  # noqa: E731 - torch calls it once per block
        return checkpoint(block, tokens, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]

    def _positioned(self, patches: Tensor, grid: tuple[int, int], position: PositionMode) -> Tensor:
        network = self.network
        table = resample_positions(network.pos_embed, grid, prefix=self.position_prefix, mode=position)
        extra = [token for token in (network.cls_token, network.reg_token) if token is not None]
        prefix = [token.expand(patches.shape[0], -1, -1) for token in extra]
        if network.no_embed_class:
            tokens = torch.cat([*prefix, patches + table], dim=1)
        else:
            tokens = torch.cat([*prefix, patches], dim=1) + table
        return network.norm_pre(tokens)  # type: ignore[no-any-return]
