"""From a class raster to polygons, band by band, without cutting polygons where bands meet.

Coordinates are corners of pixels: column to the right, row downwards. A polygon is what hangs together over the sides
of its pixels. Memory holds one band and the polygons that reach its lower edge.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from rasterio.features import shapes
from rasterio.transform import Affine

from rsseg.task import NODATA
from rsseg.vector.arcs import Vertex, junctions_of, simplified, split_at, without_straight

BAND_ROWS = 512
"""Rows that are traced at once."""

Ring = list[Vertex]
"""Closed: the last vertex is the first one. The inside lies to the left if rows are counted upwards."""
ReadRows = Callable[[int, int], NDArray[np.uint8]]
"""Pixels (stop - start, width) of the rows from start to stop."""


@dataclass(frozen=True)
class PixelPolygon:
    """value: of its pixels; pixels: how many, before any simplification; rings: the outer one first, then holes."""

    value: int
    pixels: int
    rings: tuple[Ring, ...]


@dataclass(eq=False)
class _Piece:
    """What one band has of a polygon, or pieces that turned out to belong together."""

    value: int
    rings: list[Ring]
    corners: set[Vertex] = field(default_factory=set)
    """Junctions on its rings, which simplifying must keep."""
    sides: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """Rows in which this piece was cut off, with first and last column of each of its sides there."""
    seams: set[int] = field(default_factory=set)
    """Rows in which it or a part of it was cut."""
    joined: "_Piece | None" = None

    def root(self) -> "_Piece":
        """The piece that this one became a part of."""
        piece = self
        while piece.joined is not None:
            piece = piece.joined
        return piece


def trace_polygons(
    read: ReadRows, height: int, width: int, *, simplify: float = 0.0, band_rows: int = BAND_ROWS
) -> Iterator[PixelPolygon]:
    """Polygons of all pixels that are not nodata, in no particular order.

    Args:
        read: gives rows of class values; is asked from top to bottom.
        height: of the raster.
        width: of the raster.
        simplify: pixels by which a border may move. Polygons keep sharing their borders, since each piece of border
            between two points where three areas meet is simplified once; areas narrower than this may vanish.
        band_rows: rows that are traced at once.
    """
    open_pieces: list[_Piece] = []
    for top in range(0, height, band_rows):
        bottom = min(top + band_rows, height)
        pixels = read(top, bottom)
        corners = junctions_of(read, top, bottom, height, width) if simplify else None
        reaching: list[_Piece] = []
        starting: list[_Piece] = []
        for piece in _pieces(pixels, top, corners):
            rows = [row for _, row in piece.rings[0]]
            down, up = max(rows) == bottom < height, min(rows) == top > 0
            piece.sides = {row: _sides(piece.rings, row) for row, cut in ((top, up), (bottom, down)) if cut}
            piece.seams = set(piece.sides)
            if not piece.seams:
                yield from _polygon(piece, simplify)
            if up:
                starting.append(piece)
            if down:
                reaching.append(piece)
        _join(open_pieces, starting, top, width)
        still_open = {id(piece.root()) for piece in reaching}
        finished = {id(root): root for piece in (*open_pieces, *starting) if id(root := piece.root()) not in still_open}
        for root in finished.values():
            yield from _polygon(root, simplify)
        open_pieces = reaching


def _pieces(pixels: NDArray[np.uint8], top: int, corners: NDArray[np.bool_] | None) -> Iterator[_Piece]:
    valid = pixels != NODATA
    for shape, value in shapes(pixels, mask=valid, connectivity=4, transform=Affine.translation(0, top)):
        rings: list[Ring] = []
        piece = _Piece(int(value), rings)
        for number, points in enumerate(shape["coordinates"]):
            ring = [(int(x), int(y)) for x, y in points]
            if (_area(ring) > 0) != (number == 0):
                ring.reverse()
            if corners is not None:
                ring = split_at(ring, corners, top)
                piece.corners.update((x, y) for x, y in ring if corners[y - top, x])
            rings.append(ring)
        yield piece


def _sides(rings: list[Ring], row: int) -> list[tuple[int, int]]:
    return [(min(x0, x1), max(x0, x1)) for ring in rings for (x0, y0), (x1, y1) in pairwise(ring) if y0 == y1 == row]


def _join(above: list[_Piece], below: list[_Piece], seam: int, width: int) -> None:
    """Let pieces of one value that share a side at the seam become one."""
    owners = np.full((2, width), -1, np.int64)
    for owner, pieces in zip(owners, (above, below), strict=True):
        for number, piece in enumerate(pieces):
            for start, end in piece.sides[seam]:
                owner[start:end] = number
    both = (owners >= 0).all(axis=0)
    for number, other in np.unique(owners[:, both], axis=1).T:
        first, second = above[number].root(), below[other].root()
        if first.value == second.value and first is not second:
            first.rings += second.rings
            first.corners |= second.corners
            first.seams |= second.seams
            second.joined, second.rings, second.corners = first, [], set()


def _polygon(piece: _Piece, simplify: float) -> Iterator[PixelPolygon]:
    rings = _relinked(piece.rings, piece.seams, piece.corners) if piece.seams else piece.rings
    rings.sort(key=_area, reverse=True)
    pixels = sum(_area(ring) for ring in rings)
    if simplify:
        rings = [short for ring in rings if (short := simplified(ring, piece.corners, simplify))]
        if not rings or _area(rings[0]) <= 0:
            return
    yield PixelPolygon(piece.value, int(pixels), tuple(rings))


def _relinked(rings: list[Ring], seams: set[int], corners: set[Vertex]) -> list[Ring]:
    """The rings of the union: sides at seams that are passed in both directions lie inside and are dropped."""
    inner: set[tuple[Vertex, Vertex]] = set()
    follow: dict[Vertex, list[Vertex]] = {}

    def add(start: Vertex, end: Vertex) -> None:
        follow.setdefault(start, []).append(end)

    for ring in rings:
        for start, end in pairwise(ring):
            if start[1] != end[1] or start[1] not in seams:
                add(start, end)
                continue
            step, row = (1 if end[0] > start[0] else -1), start[1]
            for x in range(start[0], end[0], step):
                side, opposite = ((x, row), (x + step, row)), ((x + step, row), (x, row))
                inner.remove(opposite) if opposite in inner else inner.add(side)
    for start, end in inner:
        add(start, end)
    found = []
    while follow:
        start = next(iter(follow))
        found.append(without_straight(_walk(follow, start), corners))
    return found


def _walk(follow: dict[Vertex, list[Vertex]], start: Vertex) -> Ring:
    """Take one ring out of the sides. Where two go on, the right one: then no ring touches itself."""
    ring, at, came = [start], start, None
    while True:
        ends = follow[at]
        end = ends[0]
        if len(ends) > 1 and came is not None:
            dx, dy = at[0] - came[0], at[1] - came[1]
            end = next(e for e in ends if (e[0] - at[0]) * dy - (e[1] - at[1]) * dx > 0)
        ends.remove(end)
        if not ends:
            del follow[at]
        ring.append(end)
        came, at = at, end
        if at == start and not _goes_on(follow, ring):
            return ring


def _goes_on(follow: dict[Vertex, list[Vertex]], ring: Ring) -> bool:
    """Back at its first vertex, whether the right way from there is one that it did not begin with."""
    ends = follow.get(ring[0])
    if not ends:
        return False
    (x0, y0), (x1, y1) = ring[-2], ring[-1]
    dx, dy = x1 - x0, y1 - y0
    return any((e[0] - x1) * dy - (e[1] - y1) * dx > 0 for e in ends)


def _area(ring: Ring) -> int:
    """Twice would be the cross products' sum; positive for an outer ring."""
    points = np.array(ring, np.int64)
    x, y = points[:, 0], points[:, 1]
    return int((x[:-1] * y[1:] - x[1:] * y[:-1]).sum()) // 2
