"""Synthetic aerial images of land cover: parcels, woods, water, roads, settlements, clouds and their shadows.

Colour alone does not separate the classes: ripe fields, dirt roads and roofs share their colours, and so do dark woods,
water and shadow, or pale roofs and clouds. Texture, shape and context separate them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

FIELD, FOREST, ROAD, BUILDING, WATER, CLOUD = range(6)

Rgb = tuple[float, float, float]
Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
Points = NDArray[np.float64]
"""(N, 2), x before y."""
Pixel = TypeVar("Pixel", np.float32, np.uint8)
Area = tuple[slice, slice]
EVERYWHERE: Area = (slice(None), slice(None))


@dataclass(frozen=True)
class Look:
    """Appearance of a region: reflectance 0..1 of its surfaces, atmosphere and sensor."""

    crops: tuple[Rgb, ...]
    woods: tuple[Rgb, ...]
    roads: tuple[Rgb, ...]
    roofs: tuple[Rgb, ...]
    waters: tuple[Rgb, ...]
    parcel_px: tuple[float, float]
    """Range of the sides of parcels."""
    crown_px: float
    """Diameter of a tree crown."""
    haze: float
    """Share of scattered light, 0..1."""
    haze_color: Rgb
    response: tuple[Rgb, Rgb, Rgb]
    """Sensor response: rows are the output bands, columns red, green and blue of the surface."""
    gamma: float


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], size: float, octaves: int = 1) -> Floats:
    """Noise of about unit variance with blobs of about `size` pixels; each octave halves size and amplitude."""
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        cell = max(size / 2**octave, 1.0)
        rows, cols = int(shape[0] / cell) + 4, int(shape[1] / cell) + 4
        grid = rng.standard_normal((rows, cols), np.float32)
        # a random phase, so that the nodes of the grid differ between places
        shift_y, shift_x = rng.random(2) + 1
        matrix = np.array([[1 / cell, 0, shift_x], [0, 1 / cell, shift_y]], np.float32)
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        layer = cv2.warpAffine(grid, matrix, shape[::-1], flags=flags, borderMode=cv2.BORDER_REFLECT)
        total += layer * np.float32(1.35 / 2**octave)
    return total


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return float(rng.uniform(low, high))


def _pick(rng: np.random.Generator, colors: Sequence[Rgb]) -> Floats:
    return np.array(colors[int(rng.integers(len(colors)))], np.float32) * np.float32(rng.uniform(0.88, 1.12))


def _origin(area: Area) -> NDArray[np.int64]:
    """(x, y) of an area's first pixel."""
    return np.array([area[1].start or 0, area[0].start or 0])


def _shifted(array: NDArray[Pixel], dy: int, dx: int) -> NDArray[Pixel]:
    """The array shifted down by dy and right by dx; edges are repeated."""
    height, width = array.shape
    rows, cols = np.clip(np.arange(height) - dy, 0, height - 1), np.clip(np.arange(width) - dx, 0, width - 1)
    return array[rows[:, None], cols]


class Canvas:
    """The ground while it is painted, from fields upward; later layers cover earlier ones."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, int], look: Look) -> None:
        self.rng = rng
        self.shape = shape
        self.look = look
        self.color: Floats = np.zeros((*shape, 3), np.float32)
        self.label: NDArray[np.uint8] = np.full(shape, FIELD, np.uint8)
        self.shadow: NDArray[np.uint8] = np.zeros(shape, np.uint8)
        self.reserved: NDArray[np.uint8] = np.zeros(shape, np.uint8)
        """Occupied pixels, where no building is placed."""
        self.fall = np.array([2.0, 3.0])
        """Offset (right, down) of shadows per storey."""
        self.y, self.x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)

    def _blend(self, where: Mask, color: Floats, area: Area = EVERYWHERE) -> None:
        self.color[area][where] = color[where]

    def _around(self, points: NDArray[np.floating], margin: int) -> Area:
        """The part of the canvas within `margin` pixels of the points' bounding box; never empty."""
        height, width = self.shape
        left, top = np.clip(points.min(axis=0).astype(int) - margin, 0, (width - 1, height - 1))
        right, bottom = np.clip(points.max(axis=0).astype(int) + margin, 1, (width, height))
        return slice(top, max(bottom, top + 1)), slice(left, max(right, left + 1))

    def _oriented(self, warp: float) -> tuple[Floats, Floats]:
        """Coordinates along two perpendicular axes of random direction, warped by up to about `warp` pixels."""
        angle = _between(self.rng, 0, np.pi)
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        u = self.x * cos + self.y * sin + warp * smooth_noise(self.rng, self.shape, 170)
        v = self.y * cos - self.x * sin + warp * smooth_noise(self.rng, self.shape, 170)
        return u - u.min(), v - v.min()

    def fields(self) -> None:
        """Parcels with crop rows, grassy rims and hedges."""
        rng, (short, long) = self.rng, self.look.parcel_px
        u, v = self._oriented(7.0)
        edges = np.cumsum(rng.uniform(short, long, int(u.max() / short) + 3)).astype(np.float32)
        strip = np.searchsorted(edges, u)
        lengths = rng.uniform(1.1 * short, 2.2 * long, len(edges) + 1).astype(np.float32)
        along = v / lengths[strip] + rng.random(len(edges) + 1).astype(np.float32)[strip]
        segment = along.astype(np.int64)
        per_strip = int(segment.max()) + 1
        parcel = strip * per_strip + segment
        count = int(parcel.max()) + 1

        tones = np.array(self.look.crops, np.float32)[rng.integers(len(self.look.crops), size=count)]
        tones = tones * rng.uniform(0.85, 1.15, (count, 1)).astype(np.float32)
        period = rng.uniform(2.6, 6.5, count).astype(np.float32)[parcel]
        strength = (rng.uniform(0.05, 0.16, count) * (rng.random(count) < 0.8)).astype(np.float32)[parcel]
        across = np.where((rng.random(count) < 0.75)[parcel], u, v)
        rows = np.sin(2 * np.pi * across / period) * strength
        mottle = 0.07 * smooth_noise(rng, self.shape, 45, 3) + 0.035 * smooth_noise(rng, self.shape, 2.0)
        self.color = tones[parcel] * (1 + rows + mottle)[..., None]

        upper = np.append(edges, edges[-1] + long)[strip]
        lower = np.insert(edges, 0, 0)[strip]
        rim = np.minimum(np.minimum(u - lower, upper - u), np.minimum(along % 1, 1 - along % 1) * lengths[strip])
        grass = np.array(self.look.crops[0], np.float32) * np.float32(0.8)
        self._blend(rim < 1.3, grass * (1 + 2 * mottle)[..., None])
        hedged = (rng.random(count) < 0.22)[parcel] & (smooth_noise(rng, self.shape, 40) > -0.4)
        self._woods(hedged & (rim < 4.0))

    def forests(self) -> None:
        """Forests and copses."""
        shape, rng = self.shape, self.rng
        wooded = smooth_noise(rng, shape, _between(rng, 90, 150), 4) > _between(rng, 0.3, 1.5)
        copses = smooth_noise(rng, shape, 30, 2) > 2.6
        self._woods(wooded | copses)

    def _woods(self, where: Mask, area: Area = EVERYWHERE) -> None:
        """Tree crowns lit from the upper left, dark gaps, and the shadow at the edge."""
        rng = self.rng
        relief = smooth_noise(rng, where.shape, self.look.crown_px, 2)
        lit = relief - _shifted(relief, -1, -1)
        kinds = smooth_noise(rng, where.shape, 70, 2)
        first, second = _pick(rng, self.look.woods), _pick(rng, self.look.woods)
        base = np.where(kinds[..., None] > 0, first, second)
        shade = np.clip(1 + 0.22 * relief + 0.30 * lit, 0.35, 2.0)
        self._blend(where, base * shade[..., None], area)
        self.label[area][where] = FOREST
        grown = where.astype(np.uint8)
        for step in range(1, 4):
            self.shadow[area] |= _shifted(grown, step, step) & ~grown & 1

    def waters(self) -> None:
        """A river, lakes, both or none, with shallow water along their banks."""
        rng, shape = self.rng, self.shape
        water = np.zeros(shape, bool)
        if rng.random() < 0.5 or max(shape) > 600:
            u, _ = self._oriented(_between(rng, 25, 45))
            width = _between(rng, 9, 24) * (1 + 0.25 * smooth_noise(rng, shape, 130))
            water |= np.abs(u - _between(rng, 0.3, 0.7) * u.max()) < width
        if rng.random() < 0.45 or max(shape) > 600:
            water |= smooth_noise(rng, shape, _between(rng, 80, 150), 2) > _between(rng, 1.1, 1.9)
        if not water.any():
            return
        depth = cv2.distanceTransform(water.astype(np.uint8), cv2.DIST_L2, 3)
        shallow = np.exp(-depth / 5.0)
        tone = _pick(rng, self.look.waters)
        swell = 1 + 0.06 * smooth_noise(rng, shape, 60, 2) + 0.35 * shallow + 0.012 * smooth_noise(rng, shape, 1.5)
        bank = cv2.dilate(water.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool) & ~water
        self._blend(bank, np.array(self.look.crops[4], np.float32) * (1 + 0.1 * smooth_noise(rng, shape, 6))[..., None])
        self.label[bank] = FIELD
        self._blend(water, tone * swell[..., None])
        self.label[water] = WATER
        self.shadow[water] = 0

    def roads(self) -> list[Points]:
        """Main roads from edge to edge, and side roads that branch off them; returns all lines."""
        rng = self.rng
        scale = max(self.shape) / 256
        mains = [
            self._driest([self._crossing_line() for _ in range(4)]) for _ in range(round(_between(rng, 1, 1.9) * scale))
        ]
        sides = [
            self._driest([self._branch(line) for _ in range(4)]) for line in mains for _ in range(rng.integers(1, 4))
        ]
        for line in sides:
            self._pave(line, _between(rng, 3.0, 5.0), main=False)
        for line in mains:
            self._pave(line, _between(rng, 5.5, 8.5), main=True)
        return mains + sides

    def _driest(self, lines: Sequence[Points]) -> Points:
        """The line with the smallest share over water: allows bridges, but no roads along rivers."""
        height, width = self.shape

        def wet(line: Points) -> float:
            x, y = np.clip(line.T.astype(int), 0, [[width - 1], [height - 1]])
            return float((self.label[y, x] == WATER).mean())

        return min(lines, key=wet)

    def _branch(self, line: Points) -> Points:
        """A road that leaves `line` at a wide angle."""
        at = int(self.rng.integers(len(line) // 5, len(line) * 4 // 5))
        along = line[at + 1] - line[at]
        turn = float(self.rng.choice([-1, 1])) * _between(self.rng, 1.0, 2.1)
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        reach = rotation @ along / max(float(np.hypot(*along)), 1e-6) * _between(self.rng, 60, 230)
        return self._bent(line[at], line[at] + reach)

    def _direction(self) -> Points:
        angle = _between(self.rng, 0, 2 * np.pi)
        return np.array([np.cos(angle), np.sin(angle)])

    def _crossing_line(self) -> Points:
        height, width = self.shape
        middle = np.array([_between(self.rng, 0.2, 0.8) * width, _between(self.rng, 0.2, 0.8) * height])
        reach = self._direction() * (height + width) * 0.75
        return self._bent(middle - reach, middle + reach)

    def _bent(self, start: Points, end: Points) -> Points:
        """Points (x, y) every 4 pixels on a smooth curve from start to end."""
        length = float(np.hypot(*(end - start)))
        t = np.linspace(0, 1, max(int(length / 4), 2))
        side = np.array([start[1] - end[1], end[0] - start[0]]) / max(length, 1)
        orders = np.arange(1, max(3, int(length / 130)) + 1)
        heights = self.rng.normal(0, 0.055 * length, len(orders)) / orders**1.2
        offset = heights @ np.sin(np.pi * orders[:, None] * t)
        points: Points = start + t[:, None] * (end - start) + offset[:, None] * side
        return points

    def _pave(self, line: Points, width: float, main: bool) -> None:
        rng = self.rng
        area = self._around(line, 12)
        label, color = self.label[area], self.color[area]
        painted = self._stroke(line, width, area)
        verge = self._stroke(line, width + 5, area) & ~painted & (label != WATER)
        color[verge] = 0.55 * color[verge] + 0.45 * np.array(self.look.crops[0], np.float32)
        label[verge] = FIELD
        wear = 1 + 0.05 * smooth_noise(rng, label.shape, 14, 3) + 0.03 * smooth_noise(rng, label.shape, 1.5)
        self._blend(painted, _pick(rng, self.look.roads) * wear[..., None], area)
        if main and width > 7:
            color[self._stroke(line, 1, area) & painted] *= np.float32(1.22)
        label[painted] = ROAD
        self.shadow[area][painted] = 0
        self.reserved[area][painted] = 1

    def _stroke(self, line: Points, width: float, area: Area = EVERYWHERE) -> Mask:
        drawn = np.zeros(self.label[area].shape, np.uint8)
        points = np.round((line - _origin(area)) * 16).astype(np.int32)
        cv2.polylines(drawn, [points[:, None]], False, 1, max(round(width), 1), cv2.LINE_8, 4)
        return drawn.astype(bool)

    def settlement(self, road: Points) -> None:
        """Rows of houses with yards on both sides of a part of the road."""
        rng = self.rng
        if rng.random() < 0.12:
            return
        reach = int(rng.integers(18, 44))
        inside = np.flatnonzero(((road > 0) & (road < self.shape[::-1])).all(axis=1))
        if len(inside) < 8:
            return
        part = road[int(rng.choice(inside)) :][:reach]
        self._yards(part)
        large = rng.random() < 0.25
        for row in range(1 if large else int(rng.integers(1, 3))):
            for side in (-1, 1):
                self._house_row(part, side * (13 + 17 * row if not large else 24), large)

    def _yards(self, part: Points) -> None:
        area = self._around(part, 40)
        shape = self.label[area].shape
        near = self._stroke(part, 64, area) & (smooth_noise(self.rng, shape, 24, 2) > -0.9)
        near &= (self.label[area] != ROAD) & (self.label[area] != WATER)
        plots = smooth_noise(self.rng, shape, 9, 2)[..., None]
        lawn, yard = (np.array(self.look.crops[k], np.float32) for k in (1, 5))
        self._blend(near, np.where(plots > 0.3, yard, lawn) * (1 + 0.12 * plots), area)
        self.label[area][near] = FIELD
        self._woods(near & (smooth_noise(self.rng, shape, 9) > 1.55), area)

    def _house_row(self, part: Points, offset: float, large: bool) -> None:
        rng = self.rng
        index = 1.0
        while index < len(part) - 1:
            here = part[int(index)]
            ahead = part[int(index) + 1] - part[int(index) - 1]
            ahead = ahead / max(float(np.hypot(*ahead)), 1e-6)
            length = _between(rng, 20, 40) if large else _between(rng, 8, 15)
            depth = _between(rng, 14, 24) if large else _between(rng, 6.5, 10)
            center = here + np.array([-ahead[1], ahead[0]]) * (offset + rng.normal(0, 1.2))
            if rng.random() < 0.85:
                self._house(center, ahead, (length, depth), storeys=_between(rng, 0.8, 2.2), flat=large)
            index += (length + _between(rng, 4, 12)) / 4

    def farmsteads(self) -> None:
        """A few single buildings in the fields."""
        height, width = self.shape
        for _ in range(round(_between(self.rng, 1, 5) * height * width / 256**2)):
            center = np.array([_between(self.rng, 0, width), _between(self.rng, 0, height)])
            size = (_between(self.rng, 9, 26), _between(self.rng, 7, 13))
            self._house(center, self._direction(), size, storeys=_between(self.rng, 0.8, 1.8), flat=False)

    def _house(self, center: Points, ahead: Points, size: tuple[float, float], *, storeys: float, flat: bool) -> None:
        """A gable (or flat) roof and its shadow on the ground, unless the place is occupied."""
        rng = self.rng
        half_l, half_d = ahead * size[0] / 2, np.array([-ahead[1], ahead[0]]) * size[1] / 2
        ridge = np.array([center - half_l, center + half_l])
        corners = np.concatenate([ridge - half_d, ridge[::-1] + half_d])
        area = self._around(corners, 8)
        roof, reserved = self._polygon(corners, area), self.reserved[area]
        if not roof.any() or bool((roof & ((reserved > 0) | (self.label[area] == WATER))).any()):
            return
        hull = cv2.convexHull(np.concatenate([corners, corners + self.fall * storeys]).astype(np.float32))[:, 0]
        self.shadow[area] |= (self._polygon(hull, area) & ~roof).astype(np.uint8)
        tone = _pick(rng, self.look.roofs)
        grain = 1 + (0.05 if flat else 0.02) * rng.standard_normal(roof.shape, np.float32)
        # the slope facing the sun, up and to the left, is brighter
        relief = 0.0 if flat else 0.16 * (1 if half_d.sum() < 0 else -1)
        upper = self._polygon(np.concatenate([ridge, ridge[::-1] + half_d]), area)
        slopes = np.where(upper, 1 + relief, 1 - relief).astype(np.float32)
        self._blend(roof, tone * (slopes * grain)[..., None], area)
        self.label[area][roof] = BUILDING
        self.shadow[area][roof] = 0
        reserved |= cv2.dilate(roof.astype(np.uint8), np.ones((3, 3), np.uint8))

    def _polygon(self, corners: NDArray[np.floating], area: Area) -> Mask:
        drawn = np.zeros(self.label[area].shape, np.uint8)
        cv2.fillConvexPoly(drawn, np.round((corners - _origin(area)) * 16).astype(np.int32), 1, cv2.LINE_8, 4)
        return drawn.astype(bool)

    def lit(self) -> Floats:
        """The ground with cast shadows and the shading of rolling terrain."""
        terrain = 1 + 0.05 * smooth_noise(self.rng, self.shape, 220, 2)
        dark = np.where(self.shadow[..., None] > 0, np.array([0.42, 0.45, 0.52], np.float32), np.float32(1))
        return np.asarray(self.color * dark * terrain[..., None], np.float32)


def add_clouds(
    rng: np.random.Generator, surface: Floats, label: NDArray[np.uint8], level: float
) -> tuple[Floats, NDArray[np.uint8]]:
    """Add clouds, and their soft shadows along the sun's direction; thin rims keep the label of the ground."""
    height, width = label.shape
    dy, dx = int(rng.integers(26, 46)), int(rng.integers(18, 34))
    wide = smooth_noise(rng, (height + dy, width + dx), _between(rng, 80, 130), 5)
    veil = np.clip((wide - level) / 0.55, 0, 1)
    opacity, cast = veil[dy:, dx:], cv2.GaussianBlur(veil, (0, 0), 2.0)[:height, :width]
    shaded = surface * (1 - cast[..., None] * np.array([0.58, 0.54, 0.46], np.float32))
    billow = wide[dy:, dx:]
    white = 0.80 + 0.10 * (billow - _shifted(billow, -2, -2)) + 0.05 * (billow - level)
    cover = (0.97 * opacity)[..., None]
    clouded = shaded * (1 - cover) + cover * np.clip(white, 0.45, 1.05)[..., None]
    return np.asarray(clouded, np.float32), np.where(opacity > 0.45, np.uint8(CLOUD), label)


def sense(rng: np.random.Generator, surface: Floats, look: Look) -> NDArray[np.uint8]:
    """Simulate the sensor: band response, haze, exposure, optical blur, noise, 8 bits (1..255)."""
    seen = surface @ np.array(look.response, np.float32).T
    haze = look.haze * _between(rng, 0.7, 1.3)
    seen = seen * (1 - haze) + haze * np.array(look.haze_color, np.float32)
    seen = seen * np.float32(rng.uniform(0.84, 1.16)) * rng.uniform(0.96, 1.04, 3).astype(np.float32)
    blurred = cv2.GaussianBlur(np.asarray(seen, np.float32), (0, 0), 0.65)
    noisy = np.clip(blurred, 0, 1) ** np.float32(look.gamma) + rng.normal(0, 0.012, seen.shape).astype(np.float32)
    return np.asarray(np.clip(np.rint(noisy * 255), 1, 255), np.uint8)
