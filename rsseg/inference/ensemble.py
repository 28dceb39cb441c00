"""Several networks as one: the mean of their probabilities, and how much they disagree. Free of torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsseg.errors import UsageError
from rsseg.inference.blend import (
    FULL,
    Decision,
    PixelOutputs,
    Tile,
    TileLogits,
    argmax_planes,
    decide_planes,
    decide_shares,
)
from rsseg.inference.predict import Compute, Network
from rsseg.inference.tiling import Span
from rsseg.task import Task, TileHint

_TINY = np.float32(1e-30)
_GSD_RATIO = 1.5
"""Networks trained on pixels that differ by more than this factor do not fit one another."""


@dataclass(frozen=True, eq=False)
class EnsembleLogits:
    """See `rsseg.inference.blend.TileLogits`.

    members: logits of the tile, one per network
    temperatures: of each network, see `PixelOutputs`
    """

    members: tuple[TileLogits, ...]
    temperatures: tuple[tuple[float, ...] | None, ...]

    @property
    def num_classes(self) -> int:
        """K."""
        return self.members[0].num_classes

    def whole(self) -> NDArray[np.float32]:
        """(K, height, width): logarithms of the mean probabilities serve as logits."""
        pairs = zip(self.members, self._wanted(), strict=True)
        shares = [decide_planes(logits.whole(), wanted).probabilities for logits, wanted in pairs]
        return np.log(np.maximum(_planes(_mean(shares)), _TINY))

    def decide(self, rows: Span, cols: Span, outputs: PixelOutputs) -> Decision:
        """See `rsseg.inference.blend.TileLogits`; the networks' own temperatures replace that of the outputs."""
        pairs = zip(self.members, self._wanted(), strict=True)
        shares = [logits.decide(rows, cols, wanted).probabilities for logits, wanted in pairs]
        mean = _mean(shares)
        decision = decide_shares(argmax_planes(_planes(mean)), _planes(mean), outputs)
        if not outputs.disagreement:
            return decision
        return replace(decision, disagreement=np.rint(disagreement(mean, shares) * FULL).astype(np.uint8))

    def _wanted(self) -> list[PixelOutputs]:
        return [PixelOutputs(probabilities="float32", temperatures=values) for values in self.temperatures]


def disagreement(mean: NDArray[np.float32], shares: Sequence[Any]) -> NDArray[np.float32]:
    """How much networks disagree: float32 (h, w), 0 for equal probabilities, 1 if each is sure of another class.

    The mutual information between class and network (Houlsby et al. 2011, arXiv 1112.5745): the entropy of the mean
    probabilities less the mean entropy. It is the Jensen-Shannon divergence of the networks (Lin 1991), and is divided
    by its largest value, the logarithm of the number of networks or classes, whichever is smaller. Networks that are
    unsure in the same way do not disagree.

    Args:
        mean: float32 (h, w, K), mean of the probabilities.
        shares: float32 (h, w, K) of each network.
    """
    most = math.log(min(mean.shape[-1], len(shares)))
    if not most:
        return np.zeros(mean.shape[:2], np.float32)
    own: Any = sum(_entropy(values) for values in shares)
    return np.asarray(((_entropy(mean) - own / len(shares)) / np.float32(most)).clip(0, 1))


def _entropy(shares: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(-np.einsum("...k,...k->...", shares, np.log(np.maximum(shares, _TINY))))


def _mean(shares: Sequence[Any]) -> NDArray[np.float32]:
    total = shares[0] + shares[1]
    for values in shares[2:]:
        total += values
    return np.asarray(total / np.float32(len(shares)))


def _planes(shares: NDArray[np.float32]) -> NDArray[np.float32]:
    """(h, w, K) as (K, h, w)."""
    return shares.transpose(2, 0, 1)


@dataclass(frozen=True, eq=False)
class EnsembleNetwork:
    """See `rsseg.inference.predict.Network`: networks of one task that see the same tiles.

    members: at least two
    temperatures: of each, see `PixelOutputs`
    """

    members: tuple[Network, ...]
    temperatures: tuple[tuple[float, ...] | None, ...]

    @property
    def task(self) -> Task:
        """Of the first network."""
        return self.members[0].task

    @property
    def fill(self) -> tuple[float, ...]:
        """That of all networks; NaN where each fills in its own."""
        fills = {member.fill for member in self.members}
        return self.members[0].fill if len(fills) == 1 else (math.nan,) * len(self.task.bands)

    @property
    def tile(self) -> TileHint:
        """Of the network that is bound to a size, if there is one; of convolutional ones the smallest."""
        tiles = [member.tile for member in self.members]
        fixed = [tile.size for tile in tiles if not tile.flexible]
        size = max(fixed) if fixed else min(tile.size for tile in tiles)
        return TileHint(size, max(tile.overlap for tile in tiles), flexible=not fixed)

    @property
    def input_multiple(self) -> int:
        """Multiple of those of all networks."""
        return math.lcm(*(member.input_multiple for member in self.members))

    @property
    def engine(self) -> str:
        """The program or programs."""
        return "+".join(sorted({member.engine for member in self.members}))

    @property
    def device(self) -> str:
        """Common to all."""
        return self.members[0].device

    @property
    def dtype(self) -> str:
        """The type or types that they compute in."""
        return "+".join(dict.fromkeys(member.dtype for member in self.members))

    @property
    def asynchronous(self) -> bool:
        """As in `Network`."""
        return any(member.asynchronous for member in self.members)

    def threads(self) -> int:
        """As in `Network`."""
        return self.members[0].threads()

    def use_threads(self, count: int) -> None:
        """As in `Network`."""
        for member in self.members:
            member.use_threads(count)

    def logits(self, images: Sequence[NDArray[np.float32]], compute: Compute) -> list[EnsembleLogits]:
        """As in `Network`; the networks run one after the other on the same images."""
        each = [self._logits_of(member, images, compute) for member in self.members]
        return [EnsembleLogits(tuple(logits), self.temperatures) for logits in zip(*each, strict=True)]

    def tile_logits(self, tiles: Sequence[Tile], compute: Compute) -> list[EnsembleLogits]:
        """As in `Network`."""
        return self.logits([tile.load() for tile in tiles], compute)

    def _logits_of(
        self, member: Network, images: Sequence[NDArray[np.float32]], compute: Compute
    ) -> Sequence[TileLogits]:
        least = 1 if member.tile.flexible else min(compute.least, member.tile.size)
        if math.isnan(self.fill[0]):
            fill = np.array(member.fill, np.float32)[:, None, None]
            images = [np.where(np.isnan(image), fill, image) for image in images]
        return member.logits(images, replace(compute, least=least))


def check_tasks(named: Sequence[tuple[str, Task]]) -> None:
    """Raise `UsageError` if there is no network, or if they cannot be averaged: it names two models and what differs.

    Args:
        named: model files and their tasks.
    """
    if not named:
        raise UsageError("there is no model. Give at least one.")
    first, task = named[0]
    for name, other in named[1:]:
        for what, ours, theirs in (
            ("classes", _classes(task), _classes(other)),
            ("bands", ", ".join(task.bands), ", ".join(other.bands)),
            ("scaling of the pixels", _scaling(task), _scaling(other)),
        ):
            if ours != theirs:
                raise UsageError(
                    f"{first} and {name} cannot be averaged, their {what} differ: {ours}, and {theirs}. "
                    "Predict with one of them, or with models of one dataset."
                )
        if task.gsd_m and other.gsd_m and not 1 / _GSD_RATIO <= task.gsd_m / other.gsd_m <= _GSD_RATIO:
            raise UsageError(
                f"{first} and {name} cannot be averaged, they were trained on pixels of {task.gsd_m:g} m and "
                f"{other.gsd_m:g} m. Predict with one of them."
            )


def _classes(task: Task) -> str:
    return ", ".join(f"{c.name} = {c.value}" for c in task.classes)


def _scaling(task: Task) -> str:
    return ", ".join(f"{band} x {a:g} + {b:g}" for band, a, b in zip(task.bands, task.scale, task.offset, strict=True))
