"""Polygons of a class raster, traced band by band without cutting them where bands meet.

One polygon per 4-connected component. Coordinates are corners of pixels: column to the right, row downwards. Memory
holds one band and the polygons that reach its lower edge.

Simplification keeps the common borders of neighbours. An arc is the part of a border between two junctions, points
where three or more areas meet. Each arc is simplified by the rule of Douglas and Peucker (1973), always in the same
direction, so that both of its polygons get the same line.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from rasterio.features import shapes
from rasterio.transform import Affine

from rsseg.task import NODATA

Vertex = tuple[int, int]
"""Column and row of the corner of a pixel."""
_OUTSIDE = 256
"""Value outside the raster; no pixel has it."""
BAND_ROWS = 512
"""Rows of a band."""

Ring = list[Vertex]
"""Closed: the last vertex is the first one. The inside lies to the left if rows are counted upwards."""
ReadRows = Callable[[int, int], NDArray[np.uint8]]
"""Pixels (stop - start, width) of the rows from start to stop."""


@dataclass(frozen=True)
class PixelPolygon:
    """A 4-connected component.

    value: pixel value
    pixels: number of pixels, before simplification
    area: area by `area_of` of `trace_polygons`, before simplification
    rings: the outer one first, then holes
    """

    value: int
    pixels: int
    area: float | None
    rings: tuple[Ring, ...]


@dataclass(eq=False)
class _Piece:
    """The part of a polygon in one band, or several parts that were joined."""

    value: int
    rings: list[Ring]
    corners: set[Vertex] = field(default_factory=set)
    """Junctions on its rings, which simplification must keep."""
    sides: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """Band edges that cut this piece: row -> first and last column of each of its sides there."""
    seams: set[int] = field(default_factory=set)
    """Rows of the band edges that cut it or a part of it."""
    joined: "_Piece | None" = None

    def root(self) -> "_Piece":
        """The piece that this one was joined to."""
        piece = self
        while piece.joined is not None:
            piece = piece.joined
        return piece


def trace_polygons(
    read: ReadRows,
    height: int,
    width: int,
    *,
    simplify: float = 0.0,
    area_of: Callable[[NDArray[np.int64]], float] | None = None,
    band_rows: int = BAND_ROWS,
) -> Iterator[PixelPolygon]:
    """Yield the polygons of all valid pixels, in no particular order.

    Args:
        read: returns rows of class values; called from top to bottom.
        height: of the raster.
        width: of the raster.
        simplify: tolerance in pixels. Neighbours keep their common borders, see above; areas narrower than this may
            vanish.
        area_of: signed area of a closed ring (n, 2) along the sides of pixels.
        band_rows: rows of a band.
    """
    open_pieces: list[_Piece] = []
    for top in range(0, height, band_rows):
        bottom = min(top + band_rows, height)
        pixels = read(top, bottom)
        corners = _junctions_of(read, top, bottom, height, width) if simplify else None
        reaching: list[_Piece] = []
        starting: list[_Piece] = []
        for piece in _pieces(pixels, top, corners):
            rows = [row for _, row in piece.rings[0]]
            down, up = max(rows) == bottom < height, min(rows) == top > 0
            piece.sides = {row: _sides(piece.rings, row) for row, cut in ((top, up), (bottom, down)) if cut}
            piece.seams = set(piece.sides)
            if not piece.seams:
                yield from _polygon(piece, simplify, area_of)
            if up:
                starting.append(piece)
            if down:
                reaching.append(piece)
        _join(open_pieces, starting, top, width)
        still_open = {id(piece.root()) for piece in reaching}
        finished = {id(root): root for piece in (*open_pieces, *starting) if id(root := piece.root()) not in still_open}
        for root in finished.values():
            yield from _polygon(root, simplify, area_of)
        open_pieces = reaching


def _pieces(pixels: NDArray[np.uint8], top: int, corners: NDArray[np.bool_] | None) -> Iterator[_Piece]:
    valid = pixels != NODATA
    for shape, value in shapes(pixels, mask=valid, connectivity=4, transform=Affine.translation(0, top)):
        rings: list[Ring] = []
        piece = _Piece(int(value), rings)
        for number, points in enumerate(shape["coordinates"]):
            ring = [(int(x), int(y)) for x, y in points]
            if (_doubled_area(ring) > 0) != (number == 0):
                ring.reverse()
            if corners is not None:
                ring = _split_at(ring, corners, top)
                piece.corners.update((x, y) for x, y in ring if corners[y - top, x])
            rings.append(ring)
        yield piece


def _sides(rings: list[Ring], row: int) -> list[tuple[int, int]]:
    return [(min(x0, x1), max(x0, x1)) for ring in rings for (x0, y0), (x1, y1) in pairwise(ring) if y0 == y1 == row]


def _join(above: list[_Piece], below: list[_Piece], seam: int, width: int) -> None:
    """Join pieces of one value that share a side at the seam."""
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


def _polygon(
    piece: _Piece, simplify: float, area_of: Callable[[NDArray[np.int64]], float] | None
) -> Iterator[PixelPolygon]:
    rings = _relinked(piece.rings, piece.seams, piece.corners) if piece.seams else piece.rings
    rings.sort(key=_doubled_area, reverse=True)
    pixels = sum(_doubled_area(ring) for ring in rings) // 2
    area = None if area_of is None else sum(area_of(np.array(ring, np.int64)) for ring in rings)
    if simplify:
        rings = [short for ring in rings if (short := _simplified(ring, piece.corners, simplify))]
        if not rings or _doubled_area(rings[0]) <= 1:
            return
    yield PixelPolygon(piece.value, pixels, area, tuple(rings))


def _relinked(rings: list[Ring], seams: set[int], corners: set[Vertex]) -> list[Ring]:
    """Rings of the union: sides at seams that occur in both directions lie inside and are dropped."""
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
        found.append(_without_straight(_walk(follow, start), corners))
    return found


def _walk(follow: dict[Vertex, list[Vertex]], start: Vertex) -> Ring:
    """Remove one ring from the sides. Where two sides follow, take the right one: then no ring touches itself."""
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
        if at == start and not _continues(follow, ring):
            return ring


def _continues(follow: dict[Vertex, list[Vertex]], ring: Ring) -> bool:
    """Whether a ring that is back at its first vertex must be continued to the right instead of closed."""
    ends = follow.get(ring[0])
    if not ends:
        return False
    (x0, y0), (x1, y1) = ring[-2], ring[-1]
    dx, dy = x1 - x0, y1 - y0
    return any((e[0] - x1) * dy - (e[1] - y1) * dx > 0 for e in ends)


def _doubled_area(ring: Ring) -> int:
    """Twice the pixels within the ring; positive for an outer ring."""
    x, y = np.array(ring, np.int64).T
    return int((x[:-1] * y[1:] - x[1:] * y[:-1]).sum())


def _junctions_of(read: ReadRows, top: int, bottom: int, height: int, width: int) -> NDArray[np.bool_]:
    """bool (bottom - top + 1, width + 1): pixel corners at which three or more areas meet.

    The row above and the row below the band are read too.
    """
    rows = np.full((bottom - top + 2, width + 2), _OUTSIDE, np.int16)
    first, last = max(top - 1, 0), min(bottom + 1, height)
    rows[first - top + 1 : last - top + 1, 1:-1] = read(first, last)
    a, b, c, d = rows[:-1, :-1], rows[:-1, 1:], rows[1:, :-1], rows[1:, 1:]
    values = 1 + (b != a).astype(np.int8)
    values += (c != a) & (c != b)
    values += (d != a) & (d != b) & (d != c)
    crossing = (a == d) & (b == c) & (a != b)
    return np.asarray((values > 2) | crossing)


def _split_at(ring: list[Vertex], corners: NDArray[np.bool_], top: int) -> list[Vertex]:
    """The ring with a vertex added at each junction on it; `corners` begins at row `top`."""
    result = [ring[0]]
    for (x0, y0), (x1, y1) in pairwise(ring):
        if y0 == y1:
            low, high = sorted((x0, x1))
            on_line = [(int(x) + low + 1, y0) for x in np.flatnonzero(corners[y0 - top, low + 1 : high])]
        else:
            low, high = sorted((y0, y1))
            on_line = [(x0, int(y) + low + 1) for y in np.flatnonzero(corners[low - top + 1 : high - top, x0])]
        result += on_line if (x0, y0) < (x1, y1) else on_line[::-1]
        result.append((x1, y1))
    return result


def _without_straight(ring: list[Vertex], corners: set[Vertex]) -> list[Vertex]:
    """The ring without vertices at which it does not turn; junctions stay."""
    inner = ring[:-1]
    around = zip([inner[-1], *inner[:-1]], inner, [*inner[1:], inner[0]], strict=True)
    kept = [b for a, b, c in around if b in corners or (a[0] == b[0]) != (b[0] == c[0])]
    return [*kept, kept[0]]


def _simplified(ring: list[Vertex], corners: set[Vertex], tolerance: float) -> list[Vertex] | None:
    """The ring simplified: dropped vertices lie at most `tolerance` pixels off the new ring. None if it vanishes."""
    inner = ring[:-1]
    fixed = [i for i, vertex in enumerate(inner) if vertex in corners]
    if len(fixed) < 2:
        # One closed arc. It begins at its junction, else at a vertex that both of its polygons choose.
        start = fixed[0] if fixed else inner.index(min(inner))
        result = _closed([*inner[start:], *inner[:start], inner[start]], tolerance)
    else:
        turned = [*inner[fixed[0] :], *inner[: fixed[0]], inner[fixed[0]]]
        stops = [i - fixed[0] for i in fixed] + [len(inner)]
        result = [turned[0]]
        for start, end in pairwise(stops):
            result += _line(turned[start : end + 1], tolerance)[1:]
    if len(result) < 4 or not _doubled_area(result):
        return None
    return result


def _closed(line: list[Vertex], tolerance: float) -> list[Vertex]:
    forward = line if line[1] < line[-2] else line[::-1]
    points = np.array(forward, np.float64)
    far = int(((points - points[0]) ** 2).sum(1).argmax())
    halves = _line(forward[: far + 1], tolerance)[:-1], _line(forward[far:], tolerance)
    result = [*halves[0], *halves[1]]
    if len(result) < 4:
        # A line back and forth: a third vertex keeps the area visible.
        third = int(_distances(points, points[0], points[far]).argmax())
        result = [forward[i] for i in sorted({0, far, third})] + [forward[0]]
    return result if forward is line else result[::-1]


def _line(line: list[Vertex], tolerance: float) -> list[Vertex]:
    """An arc simplified; the same result for the reversed arc."""
    if len(line) < 3:
        return line
    turned = line[0] > line[-1]
    forward = line[::-1] if turned else line
    points = np.array(forward, np.float64)
    kept = np.zeros(len(points), np.bool_)
    kept[[0, -1]] = True
    stack = [(0, len(points) - 1)]
    while stack:
        first, last = stack.pop()
        if last - first < 2:
            continue
        distances = _distances(points[first + 1 : last], points[first], points[last])
        far = int(distances.argmax())
        if distances[far] > tolerance:
            middle = first + 1 + far
            kept[middle] = True
            stack += [(first, middle), (middle, last)]
    result = [vertex for vertex, keep in zip(forward, kept, strict=True) if keep]
    return result[::-1] if turned else result


def _distances(
    points: NDArray[np.float64], start: NDArray[np.float64], end: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Distances of points (n, 2) from a segment."""
    along = end - start
    length = float(along @ along)
    share = np.clip(((points - start) @ along) / length, 0, 1) if length else np.zeros(len(points))
    return np.asarray(np.hypot(*(points - start - share[:, None] * along).T))
