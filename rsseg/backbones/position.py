"""Position embeddings at other grids than the stored one. Libraries resample them in three ways that differ."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rsseg.errors import WeightsError

PositionMode = Literal["timm", "dinov2", "bicubic"]


def resample_positions(table: Tensor, grid: tuple[int, int], *, prefix: int, mode: PositionMode) -> Tensor:
    """Resize a table of position embeddings; the entries of class and register tokens are kept as they are.

    Args:
        table: (1, prefix + n * n, D), the square grid row-major after the prefix entries.
        grid: rows and columns wanted. The stored grid is returned untouched.
        prefix: entries that belong to no position.
        mode: `timm`: bicubic with antialiasing. `bicubic`: without, to an explicit size (mmpretrain). `dinov2`:
            without, and the scale factor (n_new + 0.1) / n_old itself places the samples, as in the DINOv2 repository:
            source = (i + 0.5) * n_old / (n_new + 0.1) - 0.5.

    Returns:
        (1, prefix + rows * columns, D) in the table's dtype; computed in float32.

    Raises:
        WeightsError: the table is not square.
    """
    side = math.isqrt(table.shape[1] - prefix)
    if side * side != table.shape[1] - prefix:
        raise WeightsError(
            f"a position table of {table.shape[1]} entries, {prefix} of them for prefix tokens, is not square. "
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
