"""Which sample comes when, as a pure function of (seed, stream, position)."""

import zlib

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
