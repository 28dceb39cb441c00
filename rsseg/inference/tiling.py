"""Where tiles lie in an image: pure geometry, free of torch."""

from dataclasses import dataclass
from functools import cached_property

from rsseg.errors import UsageError


def tile_origins(length: int, tile: int, stride: int) -> list[int]:
    """First pixels of the tiles that cover [0, length); needs 1 <= stride <= tile.

    The last tile is moved in, not padded. A length up to `tile` is one tile of that length.
    """
    if length <= tile:
        return [0]
    return [*range(0, length - tile, stride), length - tile]


@dataclass(frozen=True)
class Span:
    """A range of pixels along one axis, [start, stop)."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of pixels."""
        return self.stop - self.start

    @property
    def area(self) -> slice:
        """For indexing."""
        return slice(self.start, self.stop)

    def within(self, origin: int) -> slice:
        """The same pixels, counted from `origin`."""
        return slice(self.start - origin, self.stop - origin)


@dataclass(frozen=True)
class AxisPlan:
    """Tiles along one axis, all of `tile` pixels.

    origins: first pixel of each tile, ascending.
    """

    length: int
    tile: int
    origins: tuple[int, ...]

    @cached_property
    def kept(self) -> tuple[Span, ...]:
        """Per tile, the pixels for which its border is farther than that of any other tile; they partition the axis."""
        cuts = [(a + b + self.tile) // 2 for a, b in zip(self.origins, self.origins[1:], strict=False)]
        return tuple(Span(a, b) for a, b in zip([0, *cuts], [*cuts, self.length], strict=True))

    def final(self, index: int) -> Span:
        """Pixels that tile `index` covers and no later tile does."""
        stop = self.origins[index + 1] if index + 1 < len(self.origins) else self.length
        return Span(self.origins[index], stop)


@dataclass(frozen=True)
class TilePlan:
    """Tiles of an image, taken row by row; all have the same shape."""

    rows: AxisPlan
    cols: AxisPlan
    overlap: int
    """Pixels that neighbouring tiles share; the last tile of an axis may share more."""

    @property
    def count(self) -> int:
        """Number of tiles."""
        return len(self.rows.origins) * len(self.cols.origins)

    @property
    def redundancy(self) -> float:
        """Pixels computed per pixel of the image."""
        return self.count * self.rows.tile * self.cols.tile / (self.rows.length * self.cols.length)


def plan_tiles(height: int, width: int, *, tile: int, overlap: int) -> TilePlan:
    """Cover an image with square tiles; along an axis shorter than `tile` they have its length.

    Raises:
        UsageError: the overlap is not smaller than the tile.
    """
    if not 0 <= overlap < tile:
        raise UsageError(f"an overlap of {overlap} pixels does not fit tiles of {tile}; choose 0 to {tile - 1}.")
    rows, cols = (
        AxisPlan(length, min(length, tile), tuple(tile_origins(length, tile, tile - overlap)))
        for length in (height, width)
    )
    return TilePlan(rows, cols, overlap)
