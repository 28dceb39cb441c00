"""Fewer vertices for polygons that cover an area, with their common borders kept common.

A border between two points where three or more areas meet is one line, however many polygons use it. Each such line is
simplified by itself, always in the same direction, so that both sides come to the same result. The rule for a line is
that of Douglas and Peucker (1973).
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Vertex = tuple[int, int]
"""Column and row of the corner of a pixel."""

_OUTSIDE = 256
"""Stands for the surroundings of the raster; no pixel has it."""


def junctions_of(
    read: Callable[[int, int], NDArray[np.uint8]], top: int, bottom: int, height: int, width: int
) -> NDArray[np.bool_]:
    """bool (bottom - top + 1, width + 1): corners of pixels at which three areas or more meet.

    `read` gives rows; the row above and the row below the band are needed too.
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


def split_at(ring: list[Vertex], corners: NDArray[np.bool_], top: int) -> list[Vertex]:
    """The ring with a vertex at each junction that it passes; `corners` begins at row `top`."""
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


def without_straight(ring: list[Vertex], corners: set[Vertex]) -> list[Vertex]:
    """The ring without vertices at which it does not turn; junctions stay."""
    inner = ring[:-1]
    around = zip([inner[-1], *inner[:-1]], inner, [*inner[1:], inner[0]], strict=True)
    kept = [b for a, b, c in around if b in corners or (a[0] == b[0]) != (b[0] == c[0])]
    return [*kept, kept[0]]


def simplified(ring: list[Vertex], corners: set[Vertex], tolerance: float) -> list[Vertex] | None:
    """The ring with fewer vertices, those left out at most `tolerance` pixels off the new one; None if it vanishes."""
    inner = ring[:-1]
    fixed = [i for i, vertex in enumerate(inner) if vertex in corners]
    if len(fixed) < 2:
        # One line that is closed. It begins at its junction, else at a vertex that every user of it would choose.
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
        # Nothing but a line back and forth: a third vertex makes it the smallest area that still shows.
        third = int(_distances(points, points[0], points[far]).argmax())
        result = [forward[i] for i in sorted({0, far, third})] + [forward[0]]
    return result if forward is line else result[::-1]


def _line(line: list[Vertex], tolerance: float) -> list[Vertex]:
    """From its first to its last vertex; the same for the line the other way round."""
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
    """Of points (n, 2) from the segment."""
    along = end - start
    length = float(along @ along)
    share = np.clip(((points - start) @ along) / length, 0, 1) if length else np.zeros(len(points))
    return np.asarray(np.hypot(*(points - start - share[:, None] * along).T))


def _doubled_area(ring: list[Vertex]) -> int:
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairwise(ring))
