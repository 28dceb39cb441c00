"""Vision transformers: tokens of chosen blocks as maps of one stride."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from rsseg.backbones.position import PositionMode, resample_positions


class TokenMaps(nn.Module):
    """Blocks of a ViT, with the network's final norm where asked; class and register tokens are dropped."""

    def __init__(
        self, network: Any, *, out_indices: Sequence[int], normed: Sequence[int], position: PositionMode | None
    ) -> None:
        """Take a network apart from its head.

        Args:
            network: timm's VisionTransformer, or if `position` is None any network with `forward_intermediates`.
            out_indices: zero-based blocks, in the order in which maps are returned.
            normed: those of them that pass the final norm.
            position: how the position table is resampled; None leaves positions to the network.
        """
        super().__init__()
        self.network = network
        self.out_indices = tuple(out_indices)
        self.normed = frozenset(normed)
        self.position = position
        self._frozen: tuple[nn.Module, ...] = ()

    @property
    def position_prefix(self) -> int:
        """Entries of the position table that belong to no position."""
        return 0 if self.network.no_embed_class else int(self.network.num_prefix_tokens)

    def freeze(self, blocks: int) -> None:
        """Keep the first `blocks` blocks and all before them as they are; with the last block also the final norm."""
        if not blocks:
            return
        network = self.network
        parts = [network.patch_embed, network.norm_pre, *network.blocks[:blocks]]
        if blocks >= len(network.blocks) and self.normed:
            parts.append(network.norm)
        for parameter in network.parameters(recurse=False):  # position table, class and register tokens
            parameter.requires_grad_(False)
        self._frozen = tuple(parts)
        for part in self._frozen:
            part.requires_grad_(False).eval()

    def parameters_by_depth(self) -> list[list[nn.Parameter]]:
        """Embedding, then one list per block; the final norm counts with the last block."""
        last = dict(self.network.named_children()).get("norm", nn.Identity())
        blocks = [list(block.parameters()) for block in self.network.blocks]
        blocks[-1] += last.parameters()
        later = {id(p) for block in blocks for p in block}
        return [[p for p in self.network.parameters() if id(p) not in later], *blocks]

    def train(self, mode: bool = True) -> Self:
        """Switch everything but the frozen blocks."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

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
        # the projection alone: patch_embed as a whole insists on the size that the network was made for
        patches = network.patch_embed.norm(network.patch_embed.proj(images).permute(0, 2, 3, 1))
        batch, rows, columns, _ = patches.shape
        tokens = self._positioned(patches.flatten(1, 2), (rows, columns), position)
        maps = []
        for index, block in enumerate(network.blocks):
            tokens = block(tokens)
            if index in ascending:
                plain = tokens[:, network.num_prefix_tokens :]
                maps.append(plain.reshape(batch, rows, columns, -1).permute(0, 3, 1, 2))
        return maps

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
