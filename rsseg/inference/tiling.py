"""Tile geometry, without torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from rsseg.errors import UsageError

_MIN_ROWS = 16
"""Of a part that is resized by itself, since the rows above and below it are resized too."""


def tile_origins(length: int, tile: int, stride: int) -> list[int]:
    """First pixels of the tiles that cover [0, length); needs 1 <= stride <= tile.

    The last tile is shifted inwards, not padded. A length up to `tile` is one tile of that length.
    """
    if length <= tile:
        return [0]
    return [*range(0, length - tile, stride), length - tile]


def mirror(length: int, target: int) -> NDArray[np.intp]:
    """Indices 0, 1, ..., length - 1, length - 2, ... that extend an axis to `target` by repeated reflection."""
    period = max(2 * (length - 1), 1)
    index = np.arange(target) % period
    return np.minimum(index, period - index)


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

    def moved(self, by: int) -> "Span":
        """Shifted by `by` pixels along the axis."""
        return Span(self.start + by, self.stop + by)

    def within(self, origin: int) -> slice:
        """The same pixels, relative to `origin`."""
        return slice(self.start - origin, self.stop - origin)


def row_factor(low: int, full: int) -> int:
    """Scale factor if ranges of `low` rows can be resized to `full` separately; 0 if that would shift their pixels."""
    factor = full // low
    return factor if factor * low == full and factor & (factor - 1) == 0 else 0


def resized_rows(rows: Span, low: int, full: int) -> tuple[Span, Span]:
    """The rows of low resolution to resize bilinearly, and the rows that they become, `rows` among them."""
    if not (factor := row_factor(low, full)):
        return Span(0, low), Span(0, full)
    # A row depends on the low-resolution rows above and below it.
    source = Span(max(rows.start // factor - 1, 0), min(-(-rows.stop // factor) + 1, low))
    return source, Span(source.start * factor, source.stop * factor)


def row_parts(rows: Span, low: int, full: int, *, most: int) -> Iterator[Span]:
    """Cut rows into parts that are resized separately, of `most` rows but at least 16; one if they cannot be."""
    step = max(most, _MIN_ROWS) if row_factor(low, full) else rows.length
    for start in range(rows.start, rows.stop, step):
        yield Span(start, min(start + step, rows.stop))


@dataclass(frozen=True)
class AxisPlan:
    """Tiles along one axis, each of `tile` pixels.

    origins: first pixel of each tile, ascending.
    """

    length: int
    tile: int
    origins: tuple[int, ...]

    @property
    def covered(self) -> int:
        """End of the last tile, which may lie beyond the axis, where the image is extended by reflection."""
        return self.origins[-1] + self.tile

    @cached_property
    def kept(self) -> tuple[Span, ...]:
        """Per tile, the pixels that are farther from its border than from any other tile's; they partition the axis."""
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


def plan_tiles(
    height: int, width: int, *, tile: int, overlap: int, multiple: int = 1, fitted: bool = False
) -> TilePlan:
    """Cover an image with square tiles; along an axis shorter than `tile`, tiles have the length of the axis.

    The plan depends on nothing but these arguments, so that two runs have the same tiles.

    Args:
        height: of the image.
        width: of the image.
        tile: side in pixels.
        overlap: pixels that neighbours share.
        multiple: the network's total stride. If tile and tile distance are multiples of it, the last tile is aligned to
            it too and may extend beyond the image; otherwise it is shifted inwards.
        fitted: `tile` is the largest side; along each axis, choose the sides and the number of tiles that compute the
            fewest pixels. Sides and distances are multiples of `multiple`, the overlap is at least `overlap`.

    Raises:
        UsageError: the overlap is not smaller than the tile.
    """
    if not 0 <= overlap < tile:
        raise UsageError(f"an overlap of {overlap} pixels does not fit tiles of {tile}; choose 0 to {tile - 1}.")
    shared = -(-overlap // multiple) * multiple
    if fitted and shared + multiple <= tile:
        rows, cols = (_fit_axis(length, tile, shared, multiple) for length in (height, width))
        return TilePlan(rows, cols, shared)
    step = 1 if tile % multiple or overlap % multiple else multiple
    rows, cols = (_plan_axis(length, tile, tile - overlap, step) for length in (height, width))
    return TilePlan(rows, cols, overlap)


@dataclass(frozen=True)
class Panel:
    """A range of columns that is computed from top to bottom before the next one; bounds the memory of wide images.

    plan: its tiles, in columns relative to `left`
    left: first column of the image that the tiles cover
    kept: the columns that the panel outputs, relative to its left edge; those of all panels partition the image
    """

    plan: TilePlan
    left: int
    kept: Span

    @property
    def target(self) -> int:
        """First column of the image that the panel outputs."""
        return self.left + self.kept.start


def split_panels(plan: TilePlan, most: int, *, shared: bool) -> tuple[Panel, ...]:
    """Cut the columns of tiles into panels of about equal width.

    Args:
        plan: of the whole image.
        most: maximum width of a panel in pixels; a panel has at least one column of tiles.
        shared: whether a pixel needs every tile that covers it, as in averaging, or only the tile that keeps it. If so,
            tiles at the edge of two panels are computed for both.
    """
    cols, tile = plan.cols, plan.cols.tile
    columns = len(cols.origins)
    per_panel = max(1, 1 + (most - tile) // max(tile - plan.overlap, 1))
    panels = -(-columns // per_panel)
    bounds = [columns * i // panels for i in range(panels + 1)]
    return tuple(_panel(plan, first, end, shared=shared) for first, end in pairwise(bounds))


def _panel(plan: TilePlan, first: int, end: int, *, shared: bool) -> Panel:
    cols = plan.cols
    kept = Span(cols.kept[first].start, cols.kept[end - 1].stop)
    used = cols.origins[first:end]
    if shared:
        used = tuple(o for o in cols.origins if o < kept.stop and o + cols.tile > kept.start)
    left = used[0]
    axis = AxisPlan(min(used[-1] + cols.tile, cols.length) - left, cols.tile, tuple(o - left for o in used))
    return Panel(TilePlan(plan.rows, axis, plan.overlap), left, Span(kept.start - left, kept.stop - left))


def _fit_axis(length: int, most: int, overlap: int, step: int) -> AxisPlan:
    """Equally spaced tiles of at most `most` pixels that compute the fewest pixels."""
    if length <= most:
        return AxisPlan(length, length, (0,))

    def stride(count: int) -> int:
        return -(-(length - overlap) // (count * step)) * step

    fewest = next(count for count in range(2, length) if stride(count) + overlap <= most)
    # More tiles share more pixels, but may need less rounding.
    count = min(range(fewest, fewest + 3), key=lambda count: count * (stride(count) + overlap))
    return AxisPlan(length, stride(count) + overlap, tuple(i * stride(count) for i in range(count)))


def _plan_axis(length: int, tile: int, stride: int, step: int) -> AxisPlan:
    origins = tile_origins(length, tile, stride)
    # Round up, so that the last pixels are covered.
    last = -(-origins[-1] // step) * step
    return AxisPlan(length, min(length, tile), (*origins[:-1], last))
