"""The one predictor: validation, evaluation and scenes run the same tiles through the same code."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

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
from rsseg.inference.device import NO_MEMORY, memory_errors
from rsseg.inference.tiling import TilePlan, mirror, plan_tiles
from rsseg.methods.base import Segmenter

Item = TypeVar("Item")
TestTimeViews = Literal["none", "flip", "d4"]
"""`flip` adds the mirror image, `d4` all eight turns and mirrorings of a square."""


class Pose(NamedTuple):
    """One orientation of a tile: mirrored left to right or not, then turned by quarters."""

    mirrored: bool
    quarters: int

    def apply(self, images: Tensor) -> Tensor:
        """(..., h, w) in this orientation."""
        return torch.rot90(images.flip(-1) if self.mirrored else images, self.quarters, (-2, -1))

    def undo(self, values: Tensor) -> Tensor:
        """(..., h, w) in the orientation of the image."""
        turned = torch.rot90(values, -self.quarters, (-2, -1))
        return turned.flip(-1) if self.mirrored else turned


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

    device: device of the network
    batch_size: tiles per forward pass
    dtype: autocast type; float32: no autocast
    least: see `Tiling`
    poses: orientations of each tile, whose probabilities are averaged
    parallel_batches: batches that a CPU computes in parallel, sharing the threads of the caller
    """

    device: torch.device
    batch_size: int = 1
    dtype: torch.dtype = torch.float32
    least: int = 1
    poses: tuple[Pose, ...] = poses_of("none")
    parallel_batches: int = 1


def choose_tiling(segmenter: Segmenter, tile: int | None, overlap: int | None, blend: Blend) -> Tiling:
    """The user's tile and overlap, or the network's own where None.

    Tiles of a convolutional network are aligned to its strides, so that their features equal those of the whole image;
    unless the user gives their side, they are fitted to the image. For `mean` they have the positions of the usual
    sliding window.
    """
    hint = segmenter.tile
    aligned = hint.flexible and blend != "mean"
    fitted = aligned and tile is None
    tile = tile or hint.size
    if overlap is None:
        overlap = min(hint.overlap, tile // 2)
    least = 1 if hint.flexible else min(tile, hint.size)
    return Tiling(tile, overlap, least, segmenter.input_multiple if aligned else 1, fitted)


def predict_strips(
    segmenter: Segmenter,
    tiles: Iterable[Tile],
    plan: TilePlan,
    blend: Blend,
    compute: Compute,
    *,
    outputs: PixelOutputs = CLASSES_ONLY,
    report: Callable[[], None] = lambda: None,
) -> Iterator[Strip]:
    """Predict the rows of an image, given its tiles row by row, starting with any row.

    Args:
        segmenter: on the device, in eval mode.
        tiles: of `plan`.
        plan: positions of the tiles.
        blend: how tiles are merged.
        compute: how the network is run.
        outputs: requested outputs per pixel.
        report: called after each tile.
    """

    def counted(items: Iterable[Item]) -> Iterator[Item]:
        for item in items:
            yield item
            report()

    classes = segmenter.task.num_classes
    if blend == "crop":
        decided = predict_tiles(segmenter, tiles, decide_kept(plan, outputs), compute)
        return crop_classes(counted(decided), plan, classes, outputs)
    return blend_classes(counted(predict_tile_logits(segmenter, tiles, compute)), plan, blend, classes, outputs)


def predict_tile_logits(segmenter: Segmenter, tiles: Iterable[Tile], compute: Compute) -> Iterator[LogitTile]:
    """The logits of tiles, on the device; see `predict_tiles`."""
    return predict_tiles(segmenter, tiles, lambda _, logits: logits.whole(), compute)


def predict_tiles(
    segmenter: Segmenter, tiles: Iterable[Tile], reduce: Callable[[Tile, TileLogits], Item], compute: Compute
) -> Iterator[tuple[Tile, Item | None]]:
    """Reduced logits of tiles of one shape, in their order; None for an empty tile, which is not computed.

    A batch holds tiles of one row only, so that the logits of a row do not depend on the first row of a call.

    Args:
        segmenter: on the device, in eval mode.
        tiles: with images in the host's memory.
        reduce: called with a tile and its logits on the device.
        compute: how the network is run.
    """
    forward = Forward(segmenter, compute)

    def reduced(batch: list[Tile], logits: list[TileLogits | None]) -> list[tuple[Tile, Item | None]]:
        pairs = zip(batch, logits, strict=True)
        return [(tile, None if values is None else reduce(tile, values)) for tile, values in pairs]

    def work(batch: list[Tile]) -> list[tuple[Tile, Item | None]]:
        return reduced(batch, forward.tiles(batch))

    batches = _batches(tiles, compute.batch_size)
    with memory_errors(NO_MEMORY.format(device=compute.device)):
        if compute.parallel_batches > 1:
            yield from _in_parallel(work, batches, compute.parallel_batches)
            return
        # A GPU computes asynchronously: queue the next batch before waiting for the logits of the last one.
        late = 1 if compute.device.type == "cuda" else 0
        waiting: deque[tuple[list[Tile], list[TileLogits | None]]] = deque()
        for batch in batches:
            waiting.append((batch, forward.tiles(batch)))
            if len(waiting) > late:
                yield from reduced(*waiting.popleft())
        for pending in waiting:
            yield from reduced(*pending)


def _batches(tiles: Iterable[Tile], size: int) -> Iterator[list[Tile]]:
    for _, row in groupby(tiles, key=lambda tile: tile.row):
        while batch := list(islice(row, size)):
            yield batch


def _in_parallel(work: Callable[[list[Tile]], list[Item]], batches: Iterator[list[Tile]], count: int) -> Iterator[Item]:
    """Run `count` batches in parallel: cores that share one batch would synchronize after every layer."""
    threads = max(torch.get_num_threads() // count, 1)
    with ThreadPoolExecutor(count, "rsseg-network", torch.set_num_threads, (threads,)) as pool:
        running = deque(pool.submit(work, batch) for batch in islice(batches, count))
        while running:
            finished = running.popleft().result()
            running.extend(pool.submit(work, batch) for batch in islice(batches, 1))
            yield from finished


@dataclass(frozen=True)
class Forward:
    """Run the network: images (B, C, h, w) in the host's memory -> their logits on the device."""

    segmenter: Segmenter
    compute: Compute

    def tiles(self, batch: list[Tile]) -> list[TileLogits | None]:
        """Logits of the tiles from one forward pass; None for empty tiles."""
        full = [tile.load() for tile in batch if not tile.is_empty]
        logits = iter(self(full[0][None] if len(full) == 1 else torch.stack(full))) if full else iter(())
        return [None if tile.is_empty else next(logits) for tile in batch]

    def __call__(self, images: Tensor) -> list[TileLogits]:
        """The logits of each image; a batch that does not fit into memory is halved."""
        try:
            return self._forward(images)
        except torch.OutOfMemoryError:
            if len(images) == 1:
                raise
        # Outside the except clause: the exception would hold the tensors of the failed forward pass.
        return [logits for half in images.chunk(2) for logits in self(half)]

    @torch.inference_mode()
    def _forward(self, images: Tensor) -> list[TileLogits]:
        device, poses = self.compute.device, self.compute.poses
        if device.type == "cuda":
            # From pinned memory the copy overlaps with the last batch's forward pass.
            images = images.pin_memory().to(device, non_blocking=True)
        if len(poses) == 1:
            return self._logits(images)
        total: Any = sum(pose.undo(self._probabilities(pose.apply(images))) for pose in poses)
        # Logarithms of probabilities serve as logits.
        logits: Tensor = (total / len(poses)).clamp_min(1e-30).log()
        return [TileLogits.of(values) for values in logits.contiguous(memory_format=torch.channels_last)]

    def _probabilities(self, images: Tensor) -> Tensor:
        """(B, K, h, w)."""
        return torch.stack([logits.whole().softmax(0) for logits in self._logits(images)])

    def _logits(self, images: Tensor) -> list[TileLogits]:
        height, width = images.shape[-2:]
        device, dtype, least = self.compute.device, self.compute.dtype, self.compute.least
        images = extended(images, max(height, least), max(width, least))
        images = self.segmenter.padded(images.to(device).contiguous(memory_format=torch.channels_last))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            low = self.segmenter.low_resolution_logits(images)
        full = (images.shape[-2], images.shape[-1])
        return [TileLogits(values, full, (height, width)) for values in torch.split(low, 1)]


def extended(images: Tensor, height: int, width: int) -> Tensor:
    """Extend images (..., h, w) to this size by reflection at the right and bottom."""
    if images.shape[-2:] == (height, width):
        return images
    rows, cols = (torch.from_numpy(mirror(*pair)) for pair in zip(images.shape[-2:], (height, width), strict=True))
    return images[..., rows, :][..., cols]
