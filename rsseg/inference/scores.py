"""Scores of a tile at full size, made where and when they are looked at."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from rsseg.inference.tiling import Span
from rsseg.layers.blocks import resize_logits

_VALUES = 1 << 20
"""Scores that a CPU makes at once, so that they stay in its cache and memory does not grow with the classes."""
_LEAST_ROWS = 16


@dataclass(frozen=True, eq=False)
class Scores:
    """What a network says about a tile: at full size, with many classes, it takes more memory than the network.

    coarse: float (1, K, h, w), which bilinear resizing brings to (1, K, H, W); without the first axis, torch would not
        see that it is channels_last, and be slow
    full: (H, W)
    size: rows and columns of it that belong to the tile, from the upper left; the rest was added for the network
    """

    coarse: Tensor
    full: tuple[int, int]
    size: tuple[int, int]

    @classmethod
    def of(cls, scores: Tensor) -> "Scores":
        """Scores (K, H, W) of full size."""
        size = (scores.shape[1], scores.shape[2])
        return cls(scores[None], size, size)

    @property
    def num_classes(self) -> int:
        """K."""
        return self.coarse.shape[1]

    def whole(self) -> Tensor:
        """Float32 (K, height, width)."""
        return self._rows(Span(0, self.size[0]))

    def bands(self, rows: Span) -> Iterator[tuple[Span, Tensor]]:
        """A range of rows in parts: which, and their scores, float32 (K, n, width).

        A GPU gets it in one, because it is asked anew for every part.
        """
        step = rows.length
        if self.coarse.device.type == "cpu" and self._factor:
            step = max(_VALUES // (self.num_classes * self.full[1]), _LEAST_ROWS)
        for start in range(rows.start, rows.stop, step):
            part = Span(start, min(start + step, rows.stop))
            yield part, self._rows(part)

    @property
    def _factor(self) -> int:
        """By how much a part of the rows can be resized by itself; 0 if it cannot, since a pixel would be elsewhere."""
        height = self.coarse.shape[2]
        factor = self.full[0] // height
        return factor if factor * height == self.full[0] and factor & (factor - 1) == 0 else 0

    def _rows(self, rows: Span) -> Tensor:
        if not (factor := self._factor):
            first, coarse, height = 0, self.coarse, self.full[0]
        else:
            # Bilinear: a row depends on the coarse ones above and below it.
            above = max(rows.start // factor - 1, 0)
            below = min(-(-rows.stop // factor) + 1, self.coarse.shape[2])
            first, coarse, height = above * factor, self.coarse[:, :, above:below], (below - above) * factor
        scores = resize_logits(coarse, (height, self.full[1]))[0]
        return scores[:, rows.start - first : rows.stop - first, : self.size[1]]
