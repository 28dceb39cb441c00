"""From overlapping tiles to finished strips of rows, in order, each row once.

Every merge is a generator that holds one row of tiles, whatever the height of the image.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsseg.inference.scores import Scores
from rsseg.inference.tiling import AxisPlan, Span, TilePlan

Blend = Literal["crop", "hann", "mean"]
"""`crop` decides each pixel in the tile whose border is farthest; `hann` and `mean` average the tiles' scores."""


@dataclass(frozen=True, eq=False)
class Tile:
    """One tile of an image.

    row, col: place in the `TilePlan`
    load: makes the image, float (C, h, w) in scaled units, filled where there is no data; until it is called a tile
        takes no more memory than the pixels of the file
    valid: bool (h, w), False where the image has no data; None if all have
    """

    row: int
    col: int
    load: Callable[[], Tensor]
    valid: NDArray[np.bool_] | None = None

    @property
    def is_empty(self) -> bool:
        """No pixel has data."""
        return self.valid is not None and not self.valid.any()


@dataclass(frozen=True)
class Wanted:
    """What is to be known of each pixel beside its class."""

    confidence: bool = False
    probabilities: Literal["none", "uint8", "float16"] = "none"


CLASSES_ONLY = Wanted()
FULL = 254
"""Stored value of probability 1 in uint8; 255 is left for nodata."""


@dataclass(frozen=True, eq=False)
class Decision:
    """What is decided about an area.

    classes: uint8 (h, w) class indices
    confidence: uint8 (h, w), probability of the class times `FULL`; None if not wanted
    probabilities: uint8 (h, w, K), times `FULL`, or float16 (h, w, K); None if not wanted
    """

    classes: NDArray[np.uint8]
    confidence: NDArray[np.uint8] | None = None
    probabilities: NDArray[Any] | None = None

    @classmethod
    def empty(cls, height: int, width: int, num_classes: int, wanted: Wanted) -> "Decision":
        """All zeros."""
        kind = wanted.probabilities
        return cls(
            np.zeros((height, width), np.uint8),
            np.zeros((height, width), np.uint8) if wanted.confidence else None,
            np.zeros((height, width, num_classes), kind) if kind != "none" else None,
        )

    def put(self, area: tuple[slice, slice], part: "Decision") -> None:
        """Fill an area."""
        self.classes[area] = part.classes
        if self.confidence is not None and part.confidence is not None:
            self.confidence[area] = part.confidence
        if self.probabilities is not None:
            self.probabilities[area] = part.probabilities


@dataclass(frozen=True, eq=False)
class Strip:
    """Finished rows of an image.

    top: first row
    decision: of h rows
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
class ScoreStrip:
    """Finished rows of an image.

    top: first row
    scores: float32 (h, W, K), mean of the tiles
    valid: bool (h, W), as in the tiles
    """

    top: int
    scores: Tensor
    valid: NDArray[np.bool_]


Scored = tuple[Tile, Tensor | None]
"""A tile and its float scores (K, h, w), None if it is empty."""
Judged = tuple[Tile, Decision | None]
"""A tile and what is decided about the part that it keeps, None if it is empty."""


def decide(scores: Tensor) -> NDArray[np.uint8]:
    """Classes of scores (h, w, K) as uint8 (h, w) in the host's memory.

    The class axis comes last, where it is contiguous for a channels_last network: argmax over a leading axis is several
    times slower.
    """
    # Not argmax, which takes longer for the same: the first of the largest.
    return scores.max(-1).indices.to(torch.uint8).cpu().numpy()


def judge(scores: Tensor, wanted: Wanted) -> Decision:
    """What is decided by scores (h, w, K)."""
    if wanted == CLASSES_ONLY:
        return Decision(decide(scores))
    shares = scores.float().softmax(-1)
    confidence = shares.amax(-1).mul_(FULL).round_().to(torch.uint8).cpu().numpy() if wanted.confidence else None
    match wanted.probabilities:
        case "none":
            return Decision(decide(scores), confidence)
        case "float16":
            return Decision(decide(scores), confidence, shares.half().cpu().numpy())
        case "uint8":
            return Decision(decide(scores), confidence, shares.mul_(FULL).round_().to(torch.uint8).cpu().numpy())


def crop_judge(plan: TilePlan, wanted: Wanted = CLASSES_ONLY) -> Callable[[Tile, Scores], Decision]:
    """Decides the part of a tile that it keeps."""

    def judge_kept(tile: Tile, scores: Scores) -> Decision:
        rows, cols = _kept(plan, tile)
        kept = Decision.empty(rows.length, cols.length, scores.num_classes, wanted)
        for part, values in scores.bands(rows):
            kept.put((part.within(rows.start), slice(None)), judge(values[..., cols.area].permute(1, 2, 0), wanted))
        return kept

    return judge_kept


def crop_classes(tiles: Iterable[Judged], plan: TilePlan, num_classes: int, wanted: Wanted) -> Iterator[Strip]:
    """Put together what is decided; tiles come row by row, the first may be that of any row.

    Memory does not depend on the number of classes where the class alone is wanted.
    """
    last, width = len(plan.cols.origins) - 1, plan.cols.length
    for tile, decided in tiles:
        rows, cols = plan.rows.kept[tile.row], plan.cols.kept[tile.col]
        if tile.col == 0:
            decision = Decision.empty(rows.length, width, num_classes, wanted)
            strip = Strip(rows.start, decision, np.zeros((rows.length, width), np.bool_))
        if decided is not None:
            decision.put((slice(None), cols.area), decided)
        inside = tuple(span.area for span in _kept(plan, tile))
        strip.valid[:, cols.area] = True if tile.valid is None else tile.valid[inside]
        if tile.col == last:
            yield strip


def blend_classes(
    tiles: Iterable[Scored], plan: TilePlan, blend: Blend, num_classes: int, wanted: Wanted = CLASSES_ONLY
) -> Iterator[Strip]:
    """Decide what `blend_scores` merges; memory is as there."""
    for strip in blend_scores(tiles, plan, blend, num_classes):
        yield Strip(strip.top, judge(strip.scores, wanted), strip.valid)


def blend_scores(tiles: Iterable[Scored], plan: TilePlan, blend: Blend, num_classes: int) -> Iterator[ScoreStrip]:
    """Merge tiles, given row by row, into scores; memory is tile x width x classes float32 values.

    Pixels that only empty tiles cover have scores 0.
    """
    height, width = plan.rows.tile, plan.cols.covered
    row_weights, col_weights = _weights(plan.rows, blend), _weights(plan.cols, blend)
    # The weight of a pixel is a product over the axes, and so is its sum over the tiles: no canvas of weights.
    row_totals, col_totals = _totals(plan.rows, row_weights), _totals(plan.cols, col_weights)
    canvas, valid = torch.zeros(height, width, num_classes), np.zeros((height, width), np.bool_)
    last = len(plan.cols.origins) - 1
    for tile, scores in tiles:
        left = plan.cols.origins[tile.col]
        area = slice(left, left + plan.cols.tile)
        valid[:, area] = True if tile.valid is None else tile.valid
        if scores is not None:
            weights = row_weights[tile.row][:, None, None] * col_weights[tile.col][:, None]
            canvas[:, area] += scores.permute(1, 2, 0).float().cpu() * weights
        if tile.col == last:
            final = plan.rows.final(tile.row)
            total = row_totals[final.area, None, None] * col_totals[: plan.cols.length, None]
            inside = slice(final.length), slice(plan.cols.length)
            yield ScoreStrip(final.start, canvas[inside] / total, valid[inside].copy())
            kept = height - final.length
            canvas[:kept] = canvas[final.length :].clone()
            canvas[kept:] = 0
            valid[:kept] = valid[final.length :].copy()


def _kept(plan: TilePlan, tile: Tile) -> tuple[Span, Span]:
    """Rows and columns of a tile that it keeps with `crop`, counted within it."""
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
            # Half a pixel off the border, so that no weight is 0.
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
