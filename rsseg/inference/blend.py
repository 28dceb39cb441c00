"""Merge overlapping tiles into finished strips of rows, in order, each row once.

Every merge is a generator that holds one row of tiles, whatever the height of the image.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsseg.inference.tiling import AxisPlan, Span, TilePlan
from rsseg.layers.blocks import resize_logits
from rsseg.task import IGNORE_INDEX

Blend = Literal["crop", "hann", "mean"]
"""`crop` decides each pixel in the tile whose border is farthest; `hann` and `mean` average the tiles' logits."""

_CACHED_VALUES = 1 << 20
"""Logits that a CPU resizes at a time: they stay in its cache, and memory does not grow with the classes."""
_MIN_ROWS = 16


@dataclass(frozen=True, eq=False)
class Tile:
    """One tile of an image.

    row, col: place in the `TilePlan`
    load: returns the image, float (C, h, w) in scaled units, filled where there is no data; until it is called, a tile
    takes only the memory of the stored pixels
    valid: bool (h, w), False where the image has no data; None: all valid
    """

    row: int
    col: int
    load: Callable[[], Tensor]
    valid: NDArray[np.bool_] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no pixel has data."""
        return self.valid is not None and not self.valid.any()


@dataclass(frozen=True, eq=False)
class TileLogits:
    """Logits of a tile, resized to full size only where and when they are read.

    With many classes, logits of full size take more memory than the network.

    low: float (1, K, h, w) of low resolution, resized bilinearly to (1, K, H, W); torch recognizes the faster
    channels_last layout only with the first axis
    full: (H, W)
    size: rows and columns of it that belong to the tile, from the upper left; the rest is padding
    """

    low: Tensor
    full: tuple[int, int]
    size: tuple[int, int]

    @classmethod
    def of(cls, logits: Tensor) -> "TileLogits":
        """Logits (K, H, W) of full size."""
        size = (logits.shape[1], logits.shape[2])
        return cls(logits[None], size, size)

    @property
    def num_classes(self) -> int:
        """K."""
        return self.low.shape[1]

    def whole(self) -> Tensor:
        """Float32 (K, height, width)."""
        return self._rows(Span(0, self.size[0]))

    def bands(self, rows: Span) -> Iterator[tuple[Span, Tensor]]:
        """A range of rows in parts: the rows of each, and their logits, float32 (K, n, width).

        On a GPU there is one part, because each part costs kernel launches.
        """
        step = rows.length
        if self.low.device.type == "cpu" and self._factor:
            step = max(_CACHED_VALUES // (self.num_classes * self.full[1]), _MIN_ROWS)
        for start in range(rows.start, rows.stop, step):
            part = Span(start, min(start + step, rows.stop))
            yield part, self._rows(part)

    @property
    def _factor(self) -> int:
        """Scale factor if a range of rows can be resized separately; 0 if that would shift its pixels."""
        height = self.low.shape[2]
        factor = self.full[0] // height
        return factor if factor * height == self.full[0] and factor & (factor - 1) == 0 else 0

    def _rows(self, rows: Span) -> Tensor:
        if not (factor := self._factor):
            first, low, height = 0, self.low, self.full[0]
        else:
            # Bilinear: a row depends on the low-resolution rows above and below it.
            above = max(rows.start // factor - 1, 0)
            below = min(-(-rows.stop // factor) + 1, self.low.shape[2])
            first, low, height = above * factor, self.low[:, :, above:below], (below - above) * factor
        logits = resize_logits(low, (height, self.full[1]))[0]
        return logits[:, rows.start - first : rows.stop - first, : self.size[1]]


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


CLASSES_ONLY = PixelOutputs()
FULL = 254
"""Stored value of probability 1 in uint8; 255 is left for nodata."""


@dataclass(frozen=True, eq=False)
class Decision:
    """Outputs of an area.

    classes: uint8 (h, w) class indices; 255 for pixels without a sure class
    confidence: uint8 (h, w), probability of the class times `FULL`; None if not requested
    probabilities: uint8 (h, w, K), times `FULL`, or float16 or float32 (h, w, K); None if not requested
    """

    classes: NDArray[np.uint8]
    confidence: NDArray[np.uint8] | None = None
    probabilities: NDArray[Any] | None = None

    @classmethod
    def empty(cls, height: int, width: int, num_classes: int, outputs: PixelOutputs) -> "Decision":
        """All zeros."""
        dtype = outputs.probabilities
        return cls(
            np.zeros((height, width), np.uint8),
            np.zeros((height, width), np.uint8) if outputs.confidence else None,
            np.zeros((height, width, num_classes), dtype) if dtype != "none" else None,
        )

    def put(self, area: tuple[slice, slice], part: "Decision") -> None:
        """Write the outputs of an area."""
        self.classes[area] = part.classes
        if self.confidence is not None and part.confidence is not None:
            self.confidence[area] = part.confidence
        if self.probabilities is not None:
            self.probabilities[area] = part.probabilities


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
    logits: float32 (h, W, K), mean of the tiles
    valid: bool (h, W), as in the tiles
    """

    top: int
    logits: Tensor
    valid: NDArray[np.bool_]


LogitTile = tuple[Tile, Tensor | None]
"""A tile and its float logits (K, h, w), None if it is empty."""
DecidedTile = tuple[Tile, Decision | None]
"""A tile and the outputs of the part of it that `crop` keeps, None if it is empty."""


def argmax_classes(logits: Tensor) -> NDArray[np.uint8]:
    """Classes of logits (h, w, K) as uint8 (h, w) in the host's memory.

    The class axis comes last, where it is contiguous for a channels_last network: argmax over a leading axis is several
    times slower.
    """
    # Faster than argmax; both return the first of equal maxima.
    return logits.max(-1).indices.to(torch.uint8).cpu().numpy()


def decide(logits: Tensor, outputs: PixelOutputs) -> Decision:
    """Compute the outputs from logits (h, w, K)."""
    if outputs == CLASSES_ONLY:
        return Decision(argmax_classes(logits))
    classes, scaled = argmax_classes(logits), logits.float()
    if outputs.temperatures is not None:
        factors = torch.tensor([1 / t for t in outputs.temperatures], device=scaled.device)
        scaled = scaled * factors[scaled.max(-1, keepdim=True).indices]
    shares = scaled.softmax(-1)
    highest = shares.amax(-1) if outputs.confidence or outputs.min_confidence else None
    if highest is not None and outputs.min_confidence:
        classes[(highest < outputs.min_confidence).cpu().numpy()] = outputs.unsure
    confidence = _as_bytes(highest) if highest is not None and outputs.confidence else None
    match outputs.probabilities:
        case "none":
            return Decision(classes, confidence)
        case "float16":
            return Decision(classes, confidence, shares.half().cpu().numpy())
        case "float32":
            return Decision(classes, confidence, shares.cpu().numpy())
        case "uint8":
            return Decision(classes, confidence, _as_bytes(shares))


def _as_bytes(shares: Tensor) -> NDArray[np.uint8]:
    return shares.mul_(FULL).round_().to(torch.uint8).cpu().numpy()


def decide_kept(plan: TilePlan, outputs: PixelOutputs = CLASSES_ONLY) -> Callable[[Tile, TileLogits], Decision]:
    """Return a function that computes the outputs of the part of a tile that `crop` keeps."""

    def decide_tile(tile: Tile, logits: TileLogits) -> Decision:
        rows, cols = _kept(plan, tile)
        kept = Decision.empty(rows.length, cols.length, logits.num_classes, outputs)
        for part, values in logits.bands(rows):
            kept.put((part.within(rows.start), slice(None)), decide(values[..., cols.area].permute(1, 2, 0), outputs))
        return kept

    return decide_tile


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
        yield Strip(strip.top, decide(strip.logits, outputs), strip.valid)


def blend_logits(tiles: Iterable[LogitTile], plan: TilePlan, blend: Blend, num_classes: int) -> Iterator[LogitStrip]:
    """Average tiles, given row by row; memory is tile x width x classes float32 values.

    Pixels that only empty tiles cover have logits 0.
    """
    height, width = plan.rows.tile, plan.cols.covered
    row_weights, col_weights = _weights(plan.rows, blend), _weights(plan.cols, blend)
    # Weights are products over the axes, and so are their sums over the tiles: no array of weights is needed.
    row_totals, col_totals = _totals(plan.rows, row_weights), _totals(plan.cols, col_weights)
    canvas, valid = torch.zeros(height, width, num_classes), np.zeros((height, width), np.bool_)
    last = len(plan.cols.origins) - 1
    for tile, logits in tiles:
        left = plan.cols.origins[tile.col]
        area = slice(left, left + plan.cols.tile)
        valid[:, area] = True if tile.valid is None else tile.valid
        if logits is not None:
            weights = row_weights[tile.row][:, None, None] * col_weights[tile.col][:, None]
            canvas[:, area] += logits.permute(1, 2, 0).float().cpu() * weights
        if tile.col == last:
            final = plan.rows.final(tile.row)
            total = row_totals[final.area, None, None] * col_totals[: plan.cols.length, None]
            inside = slice(final.length), slice(plan.cols.length)
            yield LogitStrip(final.start, canvas[inside] / total, valid[inside].copy())
            kept = height - final.length
            canvas[:kept] = canvas[final.length :].clone()
            canvas[kept:] = 0
            valid[:kept] = valid[final.length :].copy()


def _kept(plan: TilePlan, tile: Tile) -> tuple[Span, Span]:
    """Rows and columns of a tile that `crop` keeps, counted within it."""
    places = ((plan.rows, tile.row), (plan.cols, tile.col))
    rows, cols = (axis.kept[i].moved(-axis.origins[i]) for axis, i in places)
    return rows, cols


def _weights(axis: AxisPlan, blend: Blend) -> list[Tensor]:
    """Per tile of an axis, float32 (tile,) weight of its pixels."""
    match blend:
        case "crop":
            weights = [torch.zeros(axis.tile) for _ in axis.origins]
            for origin, kept, weight in zip(axis.origins, axis.kept, weights, strict=True):
                weight[kept.within(origin)] = 1
            return weights
        case "hann":
            # Sampled at pixel centres, so that no weight is 0.
            phase = (torch.arange(axis.tile, dtype=torch.float64) + 0.5) * (torch.pi / axis.tile)
            return [phase.sin().square().float()] * len(axis.origins)
        case "mean":
            return [torch.ones(axis.tile)] * len(axis.origins)


def _totals(axis: AxisPlan, weights: list[Tensor]) -> Tensor:
    """float32 (covered,): sum of the tiles' weights at each pixel."""
    totals: Any = torch.zeros(axis.covered)
    for origin, weight in zip(axis.origins, weights, strict=True):
        totals[origin : origin + axis.tile] += weight
    return totals  # type: ignore[no-any-return]
