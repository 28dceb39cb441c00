"""Polygons as well-known binary (OGC 06-103r4): what GeoPackage and GeoParquet store."""

import struct
from collections.abc import Iterator, Sequence

import numpy as np

from rsseg.vector.grid import Points

Rings = Sequence[Points]
"""One polygon: its outer ring, then its holes; each closed, (n, 2)."""

_POLYGON = 3


def polygon_to_wkb(rings: Rings) -> bytes:
    """Little-endian, two dimensions."""
    parts = [struct.pack("<BII", 1, _POLYGON, len(rings))]
    for ring in rings:
        parts += [struct.pack("<I", len(ring)), np.ascontiguousarray(ring, "<f8").tobytes()]
    return b"".join(parts)


def polygons_of_wkb(data: bytes) -> list[list[Points]]:
    """The polygons in a geometry, without heights and measures; points and lines have none.

    Raises:
        ValueError: not well-known binary, or cut off.
    """
    try:
        return list(_polygons(_Cursor(data)))
    except struct.error:
        raise ValueError("the geometry is cut off") from None


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.order = data, 0, "<"

    def take(self, layout: str) -> int:
        (value,) = struct.unpack_from(self.order + layout, self.data, self.at)
        self.at += struct.calcsize(self.order + layout)
        return int(value)

    def points(self, dimensions: int) -> Points:
        count = self.take("I")
        size = 8 * dimensions * count
        if self.at + size > len(self.data):
            raise ValueError("the geometry is cut off")
        flat = np.frombuffer(self.data, f"{self.order}f8", dimensions * count, self.at)
        self.at += size
        return flat.reshape(count, dimensions)[:, :2].astype(np.float64)


def _polygons(cursor: _Cursor) -> Iterator[list[Points]]:
    order = cursor.take("B")
    if order not in (0, 1):
        raise ValueError("not a geometry")
    cursor.order = "<" if order else ">"
    code = cursor.take("I")
    # Heights and measures: flags of PostGIS, or thousands of ISO.
    extra = bool(code & 0x80000000) + bool(code & 0x40000000)
    if code & 0x20000000:
        cursor.take("I")
    code &= 0x1FFFFFFF
    extra += (0, 1, 1, 2)[code // 1000 % 4]
    match code % 1000:
        case 3:
            yield [cursor.points(2 + extra) for _ in range(cursor.take("I"))]
        case 6 | 7:
            for _ in range(cursor.take("I")):
                yield from _polygons(cursor)
        case _:
            # Its length is not needed: a point or line in a collection would follow, which no area of interest has.
            return
