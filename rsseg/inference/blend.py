"""Logits of tiles, and their merge into finished strips of rows, in order, each row once.

Every merge is a generator that holds one row of tiles, whatever the height of the image. Free of torch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from rsseg.inference.tiling import AxisPlan, Span, TilePlan, resized_rows, row_parts
from rsseg.task import IGNORE_INDEX

Blend = Literal["crop", "hann", "mean"]
"""`crop` decides each pixel in the tile whose border is farthest; `hann` and `mean` average the tiles' logits."""


_CACHED_VALUES = 1 << 18
"""Logits that are resized and decided at a time: they stay in the cache of a core."""


class StoredPixels(NamedTuple):
    """Pixels of a tile as the file has them.

    pixels: (h, w, C) of any type
    good: bool (h, w), where they are data
    """

    pixels: NDArray[Any]
    good: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Tile:
    """One tile of an image.

    row, col: place in the `TilePlan` of its panel
    load: returns the image, float32 (C, h, w) in scaled units, filled where there is no data; until it is called, a
    tile takes only the memory of the stored pixels
    valid: bool (h, w), False where the image has no data; None: all valid
    stored: what `load` scales, for a device that scales itself
    panel: number of its panel
    """

    row: int
    col: int
    load: Callable[[], NDArray[np.float32]]
    valid: NDArray[np.bool_] | None = None
    stored: StoredPixels | None = None
    panel: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether no pixel has data."""
        return self.valid is not None and not self.valid.any()


class TileLogits(Protocol):
    """Logits of a tile, on the network's device; resized to full size only where and when they are read.

    With many classes, logits of full size take more memory than the network.
    """

    @property
    def num_classes(self) -> int:
        """K."""

    def whole(self) -> NDArray[np.float32]:
        """(K, height, width) in the host's memory."""

    def decide(self, rows: Span, cols: Span, outputs: "PixelOutputs") -> "Decision":
        """Outputs of a part of the tile."""


@dataclass(frozen=True)
class PixelOutputs:
    """Outputs per pixel besides its class."""

    confidence: bool = False
    probabilities: Literal["none", "uint8", "float16", "float32"] = "none"
    temperatures: tuple[float, ...] | None = None
    """Per class: the logits of a pixel are divided by that of its class before the softmax; None: 1. Classes do not
    depend on it."""
    min_confidence: float = 0.0
    """Pixels whose class has a lower probability get the class `unsure`."""
    unsure: int = IGNORE_INDEX
    """Class index; 255 for no data."""
    applicability: bool = False
    """How near the features are to those of the training data; only of a network that judges them."""
    disagreement: bool = False
    """How much the networks of an ensemble disagree; only of an ensemble."""

    @property
    def need_probabilities(self) -> bool:
        """Whether the classes alone do not suffice."""
        return self.confidence or self.probabilities != "none" or self.min_confidence > 0


CLASSES_ONLY = PixelOutputs()
FULL = 254
"""Stored value of probability 1 in uint8; 255 is left for nodata."""


@dataclass(frozen=True, eq=False)
class Decision:
    """Outputs of an area.

    classes: uint8 (h, w) class indices; 255 for pixels without a sure class
    confidence: uint8 (h, w), probability of the class times `FULL`; None if not requested
    probabilities: uint8 (h, w, K), times `FULL`, or float16 or float32 (h, w, K); None if not requested
    applicability, disagreement: uint8 (h, w), times `FULL`; None if not requested
    """

    classes: NDArray[np.uint8]
    confidence: NDArray[np.uint8] | None = None
    probabilities: NDArray[Any] | None = None
    applicability: NDArray[np.uint8] | None = None
    disagreement: NDArray[np.uint8] | None = None

    @classmethod
    def empty(cls, height: int, width: int, num_classes: int, outputs: PixelOutputs) -> "Decision":
        """All zeros."""
        dtype = outputs.probabilities
        return cls(
            np.zeros((height, width), np.uint8),
            np.zeros((height, width), np.uint8) if outputs.confidence else None,
            np.zeros((height, width, num_classes), dtype) if dtype != "none" else None,
            np.zeros((height, width), np.uint8) if outputs.applicability else None,
            np.zeros((height, width), np.uint8) if outputs.disagreement else None,
        )

    def put(self, area: tuple[slice, slice], part: "Decision") -> None:
        """Write the outputs of an area."""
        self.classes[area] = part.classes
        if self.confidence is not None and part.confidence is not None:
            self.confidence[area] = part.confidence
        if self.probabilities is not None:
            self.probabilities[area] = part.probabilities
        if self.applicability is not None and part.applicability is not None:
            self.applicability[area] = part.applicability
        if self.disagreement is not None and part.disagreement is not None:
            self.disagreement[area] = part.disagreement


@dataclass(frozen=True, eq=False)
class Strip:
    """Finished rows of an image.

    top: first row
    decision: outputs of h rows
    valid: bool (h, W), as in the tiles
    """

    top: int
    decision: Decision
    valid: NDArray[np.bool_]

    @property
    def classes(self) -> NDArray[np.uint8]:
        """uint8 (h, W) class indices."""
        return self.decision.classes


@dataclass(frozen=True, eq=False)
class LogitStrip:
    """Finished rows of an image.

    top: first row
    logits: float32 (K, h, W), mean of the tiles
    valid: bool (h, W), as in the tiles
    """

    top: int
    logits: NDArray[np.float32]
    valid: NDArray[np.bool_]


LogitTile = tuple[Tile, NDArray[np.float32] | None]
"""A tile and its logits (K, h, w), None if it is empty."""
DecidedTile = tuple[Tile, Decision | None]
"""A tile and the outputs of the part of it that `crop` keeps, None if it is empty."""


def decide_kept(
    plans: Sequence[TilePlan], outputs: PixelOutputs = CLASSES_ONLY
) -> Callable[[Tile, TileLogits], Decision]:
    """Return a function that computes the outputs of the part of a tile that `crop` keeps; `plans` of the panels."""

    def decide_tile(tile: Tile, logits: TileLogits) -> Decision:
        return logits.decide(*_kept(plans[tile.panel], tile), outputs)

    return decide_tile


def argmax_planes(logits: Iterable[NDArray[np.float32]]) -> NDArray[np.uint8]:
    """Classes uint8 (h, w) of logits (K, h, w), given plane by plane; the first of equal maxima."""
    # Without branches and masks: many times faster than NumPy's argmax over a leading axis.
    planes = iter(logits)
    best = next(planes).copy()
    classes = np.zeros(best.shape, np.uint8)
    for index, plane in enumerate(planes, start=1):
        found = (plane > best).view(np.uint8)
        np.maximum(best, plane, out=best)
        found *= np.uint8(index)
        np.maximum(classes, found, out=classes)  # later classes have higher numbers
    return classes


def decide_planes(logits: NDArray[np.float32], outputs: PixelOutputs) -> Decision:
    """Compute the outputs from logits (K, h, w)."""
    classes = argmax_planes(logits)
    if not outputs.need_probabilities:
        return Decision(classes)
    scaled = logits - logits.max(0)
    if outputs.temperatures is not None:
        scaled /= np.array(outputs.temperatures, np.float32)[classes]
    shares = np.exp(scaled)
    shares /= shares.sum(0)
    return decide_shares(classes, shares, outputs)


def decide_shares(classes: NDArray[np.uint8], shares: NDArray[np.float32], outputs: PixelOutputs) -> Decision:
    """Compute the outputs from probabilities (K, h, w) and their classes (h, w), which may be changed."""
    highest = shares.max(0)
    confidence = np.rint(highest * FULL).astype(np.uint8) if outputs.confidence else None
    if outputs.min_confidence:
        classes[highest < outputs.min_confidence] = outputs.unsure
    match outputs.probabilities:
        case "none":
            return Decision(classes, confidence)
        case "float16":
            return Decision(classes, confidence, shares.transpose(1, 2, 0).astype(np.float16))
        case "float32":
            return Decision(classes, confidence, shares.transpose(1, 2, 0))
        case "uint8":
            return Decision(classes, confidence, np.rint(shares * FULL).astype(np.uint8).transpose(1, 2, 0))


@dataclass(frozen=True, eq=False)
class ArrayLogits:
    """See `TileLogits`, in the host's memory.

    low: float32 (K, h, w) of low resolution, resized bilinearly to (K, *full)
    full: (H, W)
    size: rows and columns of it that belong to the tile, from the upper left; the rest is padding
    """

    low: NDArray[np.float32]
    full: tuple[int, int]
    size: tuple[int, int]

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.low)

    def whole(self) -> NDArray[np.float32]:
        """(K, height, width)."""
        return np.stack(list(self._planes(Span(0, self.size[0]))))

    def decide(self, rows: Span, cols: Span, outputs: PixelOutputs) -> Decision:
        """See `TileLogits`."""
        kept = Decision.empty(rows.length, cols.length, self.num_classes, outputs)
        most = _CACHED_VALUES // (self.num_classes * self.full[1])
        for part in row_parts(rows, self.low.shape[1], self.full[0], most=most):
            planes = (plane[:, cols.area] for plane in self._planes(part))
            decision = (
                decide_planes(np.stack(list(planes)), outputs)
                if outputs.need_probabilities
                else Decision(argmax_planes(planes))
            )
            kept.put((part.within(rows.start), slice(None)), decision)
        return kept

    def _planes(self, rows: Span) -> Iterator[NDArray[np.float32]]:
        """Rows of the logits of each class, (n, width)."""
        source, resized = resized_rows(rows, self.low.shape[1], self.full[0])
        area, size = rows.within(resized.start), (self.full[1], resized.length)
        for plane in self.low[:, source.area]:
            whole = plane if plane.shape == size[::-1] else cv2.resize(plane, size, interpolation=cv2.INTER_LINEAR)
            yield whole[area, : self.size[1]]


def crop_classes(
    tiles: Iterable[DecidedTile], plan: TilePlan, num_classes: int, outputs: PixelOutputs
) -> Iterator[Strip]:
    """Join the kept parts of tiles; tiles come row by row, starting with any row.

    Memory does not depend on the number of classes if only the class is requested.
    """
    last, width = len(plan.cols.origins) - 1, plan.cols.length
    for tile, decided in tiles:
        rows, cols = plan.rows.kept[tile.row], plan.cols.kept[tile.col]
        if tile.col == 0:
            decision = Decision.empty(rows.length, width, num_classes, outputs)
            strip = Strip(rows.start, decision, np.zeros((rows.length, width), np.bool_))
        if decided is not None:
            decision.put((slice(None), cols.area), decided)
        inside = tuple(span.area for span in _kept(plan, tile))
        strip.valid[:, cols.area] = True if tile.valid is None else tile.valid[inside]
        if tile.col == last:
            yield strip


def blend_classes(
    tiles: Iterable[LogitTile], plan: TilePlan, blend: Blend, num_classes: int, outputs: PixelOutputs = CLASSES_ONLY
) -> Iterator[Strip]:
    """Compute the outputs of the strips of `blend_logits`, in the same memory."""
    for strip in blend_logits(tiles, plan, blend, num_classes):
        yield Strip(strip.top, decide_planes(strip.logits, outputs), strip.valid)


def blend_logits(tiles: Iterable[LogitTile], plan: TilePlan, blend: Blend, num_classes: int) -> Iterator[LogitStrip]:
    """Average tiles, given row by row; memory is tile x width x classes float32 values.

    Pixels that only empty tiles cover have logits 0.
    """
    height, width = plan.rows.tile, plan.cols.covered
    row_weights, col_weights = _weights(plan.rows, blend), _weights(plan.cols, blend)
    # Weights are products over the axes, and so are their sums over the tiles: no array of weights is needed.
    row_totals, col_totals = _totals(plan.rows, row_weights), _totals(plan.cols, col_weights)
    canvas, valid = np.zeros((num_classes, height, width), np.float32), np.zeros((height, width), np.bool_)
    last = len(plan.cols.origins) - 1
    for tile, logits in tiles:
        left = plan.cols.origins[tile.col]
        area = slice(left, left + plan.cols.tile)
        valid[:, area] = True if tile.valid is None else tile.valid
        if logits is not None:
            canvas[:, :, area] += logits * (row_weights[tile.row][:, None] * col_weights[tile.col])
        if tile.col == last:
            final = plan.rows.final(tile.row)
            total = row_totals[final.area, None] * col_totals[: plan.cols.length]
            rows, cols = slice(final.length), slice(plan.cols.length)
            yield LogitStrip(final.start, canvas[:, rows, cols] / total, valid[rows, cols].copy())
            kept = height - final.length
            canvas[:, :kept] = canvas[:, final.length :].copy()
            canvas[:, kept:] = 0
            valid[:kept] = valid[final.length :].copy()


def _kept(plan: TilePlan, tile: Tile) -> tuple[Span, Span]:
    """Rows and columns of a tile that `crop` keeps, counted within it."""
    places = ((plan.rows, tile.row), (plan.cols, tile.col))
    rows, cols = (axis.kept[i].moved(-axis.origins[i]) for axis, i in places)
    return rows, cols


def _weights(axis: AxisPlan, blend: Blend) -> list[NDArray[np.float32]]:
    """Per tile of an axis, float32 (tile,) weight of its pixels."""
    match blend:
        case "crop":
            weights = [np.zeros(axis.tile, np.float32) for _ in axis.origins]
            for origin, kept, weight in zip(axis.origins, axis.kept, weights, strict=True):
                weight[kept.within(origin)] = 1
            return weights
        case "hann":
            # Sampled at pixel centres, so that no weight is 0.
            phase = (np.arange(axis.tile) + 0.5) * (np.pi / axis.tile)
            return [np.square(np.sin(phase)).astype(np.float32)] * len(axis.origins)
        case "mean":
            return [np.ones(axis.tile, np.float32)] * len(axis.origins)


def _totals(axis: AxisPlan, weights: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """float32 (covered,): sum of the tiles' weights at each pixel."""
    totals = np.zeros(axis.covered, np.float32)
    for origin, weight in zip(axis.origins, weights, strict=True):
        totals[origin : origin + axis.tile] += weight
    return totals
