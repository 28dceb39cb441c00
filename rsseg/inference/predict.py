"""The one predictor: validation, evaluation and scenes run the same tiles through the same code. Free of torch."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from rsseg.inference.blend import (
    CLASSES_ONLY,
    Blend,
    LogitTile,
    PixelOutputs,
    Strip,
    Tile,
    TileLogits,
    blend_classes,
    crop_classes,
    decide_kept,
)
from rsseg.inference.machine import NO_MEMORY, memory_errors
from rsseg.inference.tiling import TilePlan, mirror, plan_tiles
from rsseg.task import Task, TileHint

Item = TypeVar("Item")
TestTimeViews = Literal["none", "flip", "d4"]
"""`flip` adds the mirror image, `d4` all eight turns and mirrorings of a square."""


class Pose(NamedTuple):
    """One orientation of a tile: mirrored left to right or not, then turned by quarters."""

    mirrored: bool
    quarters: int

    def apply(self, images: Any, library: Any) -> Any:
        """(..., h, w), of NumPy or torch, in this orientation."""
        return library.rot90(library.flip(images, (-1,)) if self.mirrored else images, self.quarters, (-2, -1))

    def undo(self, values: Any, library: Any) -> Any:
        """(..., h, w) in the orientation of the image."""
        turned = library.rot90(values, -self.quarters, (-2, -1))
        return library.flip(turned, (-1,)) if self.mirrored else turned


def poses_of(views: TestTimeViews) -> tuple[Pose, ...]:
    """Orientations to average; the first is that of the image."""
    mirrorings = (False,) if views == "none" else (False, True)
    return tuple(Pose(m, q) for q in (range(4) if views == "d4" else range(1)) for m in mirrorings)


@dataclass(frozen=True)
class Tiling:
    """Tiling of images for a network, in pixels.

    least: smaller tiles are extended by reflection to this side, the training size of a network of fixed size.
    multiple: grid to align tiles to, see `plan_tiles`.
    fitted: whether `tile` is the largest side, and tiles are fitted to each image.
    """

    tile: int
    overlap: int
    least: int
    multiple: int
    fitted: bool = False

    def plan(self, height: int, width: int) -> TilePlan:
        """Tiles of an image of this size; see `plan_tiles`."""
        return plan_tiles(
            height, width, tile=self.tile, overlap=self.overlap, multiple=self.multiple, fitted=self.fitted
        )


@dataclass(frozen=True)
class Compute:
    """Settings for running the network over tiles.

    batch_size: tiles per forward pass
    least: see `Tiling`
    poses: orientations of each tile, whose probabilities are averaged
    parallel_batches: batches that a CPU computes in parallel, sharing the threads of the caller
    """

    batch_size: int = 1
    least: int = 1
    poses: tuple[Pose, ...] = poses_of("none")
    parallel_batches: int = 1


class NetworkFacts(Protocol):
    """What tiles of a network depend on; see `Segmenter`."""

    @property
    def task(self) -> Task:
        """Classes, bands and scaling."""

    @property
    def fill(self) -> tuple[float, ...]:
        """Value of pixels without data per band, scaled units."""

    @property
    def tile(self) -> TileHint:
        """Preferred tiling."""

    @property
    def input_multiple(self) -> int:
        """Sides of images are padded to multiples of it."""


class Network(NetworkFacts, Protocol):
    """A network in some runtime: images in the host's memory -> logits."""

    @property
    def engine(self) -> str:
        """The program that runs it."""

    @property
    def device(self) -> str:
        """`cpu`, `cuda` or `cuda:N`."""

    @property
    def dtype(self) -> str:
        """Type that it computes in."""

    @property
    def asynchronous(self) -> bool:
        """Whether `logits` returns before the logits are there."""

    def threads(self) -> int:
        """Threads of a CPU that it may use."""

    def use_threads(self, count: int) -> None:
        """Set the threads of the batches that the calling thread runs."""

    def logits(self, images: Sequence[NDArray[np.float32]], compute: Compute) -> Sequence[TileLogits]:
        """Logits of images float32 (C, h, w) of one size, in scaled units."""

    def tile_logits(self, tiles: Sequence[Tile], compute: Compute) -> Sequence[TileLogits]:
        """Logits of tiles of one size, none of them empty."""


def choose_tiling(network: NetworkFacts, tile: int | None, overlap: int | None, blend: Blend) -> Tiling:
    """The user's tile and overlap, or the network's own where None.

    Tiles of a convolutional network are aligned to its strides, so that their features equal those of the whole image;
    unless the user gives their side, they are fitted to the image. For `mean` they have the positions of the usual
    sliding window.
    """
    hint = network.tile
    aligned = hint.flexible and blend != "mean"
    fitted = aligned and tile is None
    tile = tile or hint.size
    if overlap is None:
        overlap = min(hint.overlap, tile // 2)
    least = 1 if hint.flexible else min(tile, hint.size)
    return Tiling(tile, overlap, least, network.input_multiple if aligned else 1, fitted)


def predict_strips(
    network: Network,
    tiles: Iterable[Tile],
    plans: Sequence[TilePlan],
    blend: Blend,
    compute: Compute,
    *,
    outputs: PixelOutputs = CLASSES_ONLY,
    report: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, Strip]]:
    """Predict the rows of an image, given its tiles panel by panel and row by row, starting with any row of each panel.

    The network does not wait between panels. Yields the number of the panel with each strip.

    Args:
        network: see `Network`.
        tiles: of the panels in their order.
        plans: positions of the tiles of each panel.
        blend: how tiles are merged.
        compute: how the network is run.
        outputs: requested outputs per pixel.
        report: called after each tile.
    """

    def counted(items: Iterable[Item]) -> Iterator[Item]:
        for item in items:
            yield item
            report()

    classes = network.task.num_classes
    computed: Iterator[tuple[Tile, Any]]
    if blend == "crop":
        computed = predict_tiles(network, tiles, decide_kept(plans, outputs), compute)
        merge: Callable[..., Iterator[Strip]] = crop_classes
    else:
        computed = predict_tile_logits(network, tiles, compute)
        merge = partial(blend_classes, blend=blend)
    for panel, own in groupby(counted(computed), key=lambda pair: pair[0].panel):
        for strip in merge(own, plans[panel], num_classes=classes, outputs=outputs):
            yield panel, strip


def predict_tile_logits(network: Network, tiles: Iterable[Tile], compute: Compute) -> Iterator[LogitTile]:
    """The logits of tiles, in the host's memory; see `predict_tiles`."""
    return predict_tiles(network, tiles, lambda _, logits: logits.whole(), compute)


def predict_tiles(
    network: Network, tiles: Iterable[Tile], reduce: Callable[[Tile, TileLogits], Item], compute: Compute
) -> Iterator[tuple[Tile, Item | None]]:
    """Reduced logits of tiles of one shape, in their order; None for an empty tile, which is not computed.

    A batch holds tiles of one row only, so that the logits of a row do not depend on the first row of a call.

    Args:
        network: see `Network`.
        tiles: with images in the host's memory.
        reduce: called with a tile and its logits on the device.
        compute: how the network is run.
    """

    def reduced(batch: list[Tile], logits: list[TileLogits | None]) -> list[tuple[Tile, Item | None]]:
        pairs = zip(batch, logits, strict=True)
        return [(tile, None if values is None else reduce(tile, values)) for tile, values in pairs]

    def forward(batch: list[Tile]) -> list[TileLogits | None]:
        full = [tile for tile in batch if not tile.is_empty]
        logits = iter(network.tile_logits(full, compute) if full else ())
        return [None if tile.is_empty else next(logits) for tile in batch]

    def work(batch: list[Tile]) -> list[tuple[Tile, Item | None]]:
        return reduced(batch, forward(batch))

    batches = _batches(tiles, compute.batch_size)
    with memory_errors(NO_MEMORY.format(device=network.device)):
        if compute.parallel_batches > 1:
            yield from _in_parallel(work, batches, network, compute.parallel_batches)
            return
        # A GPU computes asynchronously: queue the next batch before waiting for the logits of the last one.
        late = int(network.asynchronous)
        waiting: deque[tuple[list[Tile], list[TileLogits | None]]] = deque()
        for batch in batches:
            waiting.append((batch, forward(batch)))
            if len(waiting) > late:
                yield from reduced(*waiting.popleft())
        for pending in waiting:
            yield from reduced(*pending)


def _batches(tiles: Iterable[Tile], size: int) -> Iterator[list[Tile]]:
    for _, row in groupby(tiles, key=lambda tile: (tile.panel, tile.row)):
        while batch := list(islice(row, size)):
            yield batch


def _in_parallel(
    work: Callable[[list[Tile]], list[Item]], batches: Iterator[list[Tile]], network: Network, count: int
) -> Iterator[Item]:
    """Run `count` batches in parallel: cores that share one batch would synchronize after every layer."""
    threads = max(network.threads() // count, 1)
    with ThreadPoolExecutor(count, "rsseg-network", network.use_threads, (threads,)) as pool:
        running = deque(pool.submit(work, batch) for batch in islice(batches, count))
        while running:
            finished = running.popleft().result()
            running.extend(pool.submit(work, batch) for batch in islice(batches, 1))
            yield from finished


def extended(images: Any, height: int, width: int) -> Any:
    """Extend images (..., h, w), an array or a tensor, to this size by reflection at the right and bottom."""
    if tuple(images.shape[-2:]) == (height, width):
        return images
    rows, cols = (mirror(*pair) for pair in zip(images.shape[-2:], (height, width), strict=True))
    return images[..., rows, :][..., cols]
