"""Grids of tiles."""

from dataclasses import dataclass
from typing import Literal

from rsseg.raster import Window


@dataclass(frozen=True)
class Grid:
    """How images are cut into squares of `tile` pixels, `stride` apart."""

    tile: int
    stride: int
    step: int | None = None
    """Distance between tiles if another than `stride`, which then only decides how many there are (as published for
    Potsdam)."""
    edge: Literal["move", "drop", "pad"] = "move"
    """What becomes of a remainder: the last tile is moved in, the remainder is dropped, or the tile is padded."""

    def windows(self, height: int, width: int) -> list[Window]:
        """Windows row by row; with `pad` they may reach beyond the image, with `move` a small image stays whole."""
        rows, cols = self._origins(height), self._origins(width)
        if self.edge == "move":
            return [Window(row, col, min(self.tile, height), min(self.tile, width)) for row in rows for col in cols]
        return [Window(row, col, self.tile, self.tile) for row in rows for col in cols]

    def resized(self, tile: int | None, stride: int | None) -> "Grid":
        """The same kind of grid with another tile or stride; a stride that is not given keeps its share of the tile."""
        tile = tile or self.tile
        step = None if self.step is None else max(self.step * tile // self.tile, 1)
        return Grid(tile, stride or max(self.stride * tile // self.tile, 1), step, self.edge)

    def _origins(self, length: int) -> list[int]:
        if self.edge == "drop":
            return whole_tile_origins(length, self.tile, self.stride, step=self.step)
        if self.edge == "pad":
            return list(range(0, max(length - self.tile + self.stride, 1), self.stride))
        return [0] if length <= self.tile else [*range(0, length - self.tile, self.stride), length - self.tile]


def whole_tile_origins(length: int, tile: int, stride: int, *, step: int | None = None) -> list[int]:
    """Left edges of the tiles that fit whole; what is left over at the end is dropped, as the published scripts do.

    Args:
        length: pixels of the scene's side.
        tile: pixels of the tile's side.
        stride: decides how many tiles there are.
        step: distance between tiles if another than `stride` was published (ISPRS Potsdam: `tile`); tiles that would
            leave the scene are moved in.
    """
    if length < tile:
        return []
    count = (length - tile) // stride + 1
    return sorted({min(i * (step or stride), length - tile) for i in range(count)})
