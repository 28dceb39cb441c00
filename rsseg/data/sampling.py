"""Which sample comes when, as a pure function of (seed, stream, position)."""

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def stream_key(stream: str) -> int:
    """A number that stands for a stream's name, the same everywhere."""
    return zlib.crc32(stream.encode())


def permutation(seed: int, stream: str, epoch: int, count: int) -> NDArray[np.int64]:
    """Order of a stream's `count` items in one epoch."""
    return np.random.default_rng([seed, stream_key(stream), epoch, 0]).permutation(count)


def sample_generator(seed: int, stream: str, position: int) -> np.random.Generator:
    """Randomness of the augmentation of the sample at `position` (counted over epochs)."""
    return np.random.default_rng([seed, stream_key(stream), position, 1])


def positions(micro_step: int, *, batch_size: int, rank: int, world_size: int) -> range:
    """Positions of a rank's share of a micro-step: every `world_size`-th of the common batch, from its rank on."""
    start = micro_step * batch_size * world_size
    return range(start + rank, start + batch_size * world_size, world_size)


class RareClassOrder:
    """Position -> item number: a class is drawn, the rarer the likelier, then an image that shows it.

    Class k is drawn with softmax((1 - share of k) / temperature). Source: Hoyer et al. 2022 (arXiv 2111.14887).
    """

    def __init__(self, seed: int, stream: str, pixels: Sequence[Sequence[int]], *, temperature: float) -> None:
        """`pixels` counts each class in each item; at least one pixel is labeled."""
        self._seed, self._key = seed, stream_key(stream)
        counts = np.asarray(pixels, np.float64)
        totals = counts.sum(0)
        self._shown = shown = np.flatnonzero(totals)
        logits = (1.0 - totals[shown] / totals.sum()) / temperature
        weights = np.exp(logits - logits.max())
        self._probabilities = weights / weights.sum()
        self._items = [np.flatnonzero(counts[:, k]) for k in shown]

    def __getitem__(self, position: int) -> int:
        """A function of seed, stream and position alone."""
        return self.draw(position)[0]

    def draw(self, position: int) -> tuple[int, int]:
        """Item number, and the class that it was drawn for."""
        rng = np.random.default_rng([self._seed, self._key, position, 2])
        drawn = rng.choice(len(self._items), p=self._probabilities)
        return int(rng.choice(self._items[drawn])), int(self._shown[drawn])


class Order:
    """Position -> item number of one stream; keeps the permutation of the last epoch asked for."""

    def __init__(self, seed: int, stream: str, count: int) -> None:
        """`count` items, at least one."""
        self._seed, self._stream, self._count = seed, stream, count
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def __getitem__(self, position: int) -> int:
        """`permutation(seed, stream, position // count)[position % count]`."""
        epoch, place = divmod(position, self._count)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, permutation(self._seed, self._stream, epoch, self._count)
        return int(self._permutation[place])
