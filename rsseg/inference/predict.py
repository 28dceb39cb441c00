"""The one predictor: validation, evaluation and scenes run the same tiles through the same code."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsseg.config import EvalConfig
from rsseg.inference.blend import (
    CLASSES_ONLY,
    Blend,
    Scored,
    Strip,
    Tile,
    Wanted,
    blend_classes,
    blend_scores,
    crop_classes,
    crop_judge,
    decide,
)
from rsseg.inference.scores import Scores
from rsseg.inference.tiling import TilePlan, mirror, plan_tiles
from rsseg.inference.tta import Pose, View, interpolate, poses_of, scaled_size, views_of
from rsseg.methods.base import Segmenter

Item = TypeVar("Item")


@dataclass(frozen=True)
class Tiling:
    """How an image is cut for a network, in pixels.

    least: smaller tiles are extended by reflection to this side, the one that a network of fixed size was trained at.
    multiple: grid that tiles should lie on, see `plan_tiles`.
    """

    tile: int
    overlap: int
    least: int
    multiple: int


@dataclass(frozen=True)
class Compute:
    """How the network is run over tiles.

    device: where it is
    batch_size: tiles per forward
    dtype: autocast to it, unless it is float32
    least: see `Tiling`
    poses: ways to lay each tile before the network; the probabilities are averaged
    lanes: batches that a CPU computes at once, among which the threads of the caller are shared out
    """

    device: torch.device
    batch_size: int = 1
    dtype: torch.dtype = torch.float32
    least: int = 1
    poses: tuple[Pose, ...] = poses_of("none")
    lanes: int = 1


def choose_tiling(segmenter: Segmenter, tile: int | None, overlap: int | None, blend: Blend) -> Tiling:
    """The user's tile and overlap, or where None what suits the network.

    Tiles of a convolutional network lie on its grid, so that it computes in each what it would in the whole image. For
    `mean` they lie where the usual sliding window puts them.
    """
    hint = segmenter.tile
    tile = tile or hint.size
    if overlap is None:
        overlap = min(hint.overlap, tile // 2)
    least = 1 if hint.flexible else min(tile, hint.size)
    return Tiling(tile, overlap, least, segmenter.input_multiple if hint.flexible and blend != "mean" else 1)


def predict_image(
    segmenter: Segmenter,
    image: NDArray[np.float32] | Tensor,
    valid: NDArray[np.bool_] | None,
    config: EvalConfig,
    *,
    device: torch.device | str,
) -> NDArray[np.uint8]:
    """Classes of one image in memory.

    Args:
        segmenter: on `device`, in eval mode.
        image: float32 (C, H, W) in scaled units.
        valid: bool (H, W), False where the image has no data; the network sees `segmenter.fill` there. None: all valid.
        config: tiling, blending and test-time augmentation; None in it takes what suits the network.
        device: where the network runs.

    Returns:
        uint8 (H, W) class indices. Where the image has no data they mean nothing.
    """
    pixels = _filled(segmenter, image, valid)
    views = views_of(config)
    if config.mode == "tiled" and config.resize_multiple is None and views == (View(1.0, False),):
        plan, tiles, compute = _tiles_of(segmenter, pixels, config, device)
        strips = predict_strips(segmenter, tiles, plan, config.blend, compute)
        return np.concatenate([strip.classes for strip in strips])
    if len(views) == 1:
        return decide(_view_scores(segmenter, pixels, views[0], config, device))
    return decide(_mean_probabilities(segmenter, pixels, config, device))


def predict_probabilities(
    segmenter: Segmenter,
    image: NDArray[np.float32] | Tensor,
    valid: NDArray[np.bool_] | None,
    config: EvalConfig,
    *,
    device: torch.device | str,
) -> Tensor:
    """Like `predict_image`, but float32 (H, W, K) probabilities, the mean over test-time views."""
    return _mean_probabilities(segmenter, _filled(segmenter, image, valid), config, device)


def _filled(segmenter: Segmenter, image: NDArray[np.float32] | Tensor, valid: NDArray[np.bool_] | None) -> Tensor:
    """The pixels that the network sees."""
    pixels = torch.as_tensor(image, dtype=torch.float32)
    if valid is None:
        return pixels
    return torch.where(torch.tensor(valid), pixels, torch.tensor(segmenter.fill)[:, None, None])


def _mean_probabilities(segmenter: Segmenter, pixels: Tensor, config: EvalConfig, device: torch.device | str) -> Tensor:
    views = views_of(config)
    total: Any = sum(_view_scores(segmenter, pixels, view, config, device).softmax(-1) for view in views)
    return total / len(views)  # type: ignore[no-any-return]


def predict_strips(
    segmenter: Segmenter,
    tiles: Iterable[Tile],
    plan: TilePlan,
    blend: Blend,
    compute: Compute,
    *,
    wanted: Wanted = CLASSES_ONLY,
    report: Callable[[], None] = lambda: None,
) -> Iterator[Strip]:
    """Finished rows of an image, given its tiles row by row; the first tile may be that of any row.

    Args:
        segmenter: on the device, in eval mode.
        tiles: of `plan`.
        plan: where they lie.
        blend: how they are merged.
        compute: how the network is run.
        wanted: what is to be known of a pixel.
        report: called after each tile.
    """

    def counted(items: Iterable[Item]) -> Iterator[Item]:
        for item in items:
            yield item
            report()

    classes = segmenter.task.num_classes
    if blend == "crop":
        judged = predict_tiles(segmenter, tiles, crop_judge(plan, wanted), compute)
        return crop_classes(counted(judged), plan, classes, wanted)
    return blend_classes(counted(predict_scores(segmenter, tiles, compute)), plan, blend, classes, wanted)


def predict_scores(segmenter: Segmenter, tiles: Iterable[Tile], compute: Compute) -> Iterator[Scored]:
    """The scores of tiles, on the device; see `predict_tiles`."""
    return predict_tiles(segmenter, tiles, lambda _, scores: scores.whole(), compute)


def predict_tiles(
    segmenter: Segmenter, tiles: Iterable[Tile], reduce: Callable[[Tile, Scores], Item], compute: Compute
) -> Iterator[tuple[Tile, Item | None]]:
    """What is made of the scores of tiles of one shape, in their order; an empty tile gets no forward and None.

    A batch holds tiles of one row only, so that the scores of a row do not depend on where the work began.

    Args:
        segmenter: on the device, in eval mode.
        tiles: with images in the host's memory.
        reduce: called with a tile and its scores on the device.
        compute: how the network is run.
    """
    forward = _Forward(segmenter, compute)

    def reduced(batch: list[Tile], scores: list[Scores | None]) -> list[tuple[Tile, Item | None]]:
        pairs = zip(batch, scores, strict=True)
        return [(tile, None if values is None else reduce(tile, values)) for tile, values in pairs]

    batches = _batches(tiles, compute.batch_size)
    if compute.lanes > 1:
        yield from _in_lanes(lambda batch: reduced(batch, forward.tiles(batch)), batches, compute.lanes)
        return
    # A GPU works by itself: it gets the next batch before the host waits for the scores of the last one.
    late = 1 if compute.device.type == "cuda" else 0
    waiting: deque[tuple[list[Tile], list[Scores | None]]] = deque()
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


def _in_lanes(work: Callable[[list[Tile]], list[Item]], batches: Iterator[list[Tile]], lanes: int) -> Iterator[Item]:
    """Cores that work on batches of their own need not wait for one another after every layer."""
    threads = max(torch.get_num_threads() // lanes, 1)
    with ThreadPoolExecutor(lanes, "rsseg-network", torch.set_num_threads, (threads,)) as pool:
        running = deque(pool.submit(work, batch) for batch in islice(batches, lanes))
        while running:
            finished = running.popleft().result()
            running.extend(pool.submit(work, batch) for batch in islice(batches, 1))
            yield from finished


@dataclass(frozen=True)
class _Forward:
    """Images (B, C, h, w) in the host's memory -> their scores on the device."""

    segmenter: Segmenter
    compute: Compute

    def tiles(self, batch: list[Tile]) -> list[Scores | None]:
        """One forward for the tiles that are not empty; None for those that are."""
        full = [tile.load() for tile in batch if not tile.is_empty]
        scores = iter(self(full[0][None] if len(full) == 1 else torch.stack(full))) if full else iter(())
        return [None if tile.is_empty else next(scores) for tile in batch]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> list[Scores]:
        device, poses = self.compute.device, self.compute.poses
        if device.type == "cuda":
            # From pinned memory the copy runs beside the work on the last batch.
            images = images.pin_memory().to(device, non_blocking=True)
        if len(poses) == 1:
            return self._scores(images)
        total: Any = sum(pose.undo(self._shares(pose.apply(images))) for pose in poses)
        # The logarithm of a probability is a score that gives this probability.
        scores: Tensor = (total / len(poses)).clamp_min(1e-30).log()
        return [Scores.of(values) for values in scores.contiguous(memory_format=torch.channels_last)]

    def _shares(self, images: Tensor) -> Tensor:
        """Probabilities (B, K, h, w)."""
        return torch.stack([scores.whole().softmax(0) for scores in self._scores(images)])

    def _scores(self, images: Tensor) -> list[Scores]:
        height, width = images.shape[-2:]
        device, dtype, least = self.compute.device, self.compute.dtype, self.compute.least
        images = _extended(images, max(height, least), max(width, least))
        images = self.segmenter.padded(images.to(device).contiguous(memory_format=torch.channels_last))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            coarse = self.segmenter.low_resolution_logits(images)
        full = (images.shape[-2], images.shape[-1])
        return [Scores(values, full, (height, width)) for values in torch.split(coarse, 1)]


def _extended(images: Tensor, height: int, width: int) -> Tensor:
    """Reflected at the right and the bottom to this size."""
    if images.shape[-2:] == (height, width):
        return images
    rows, cols = (torch.from_numpy(mirror(*pair)) for pair in zip(images.shape[-2:], (height, width), strict=True))
    return images[..., rows, :][..., cols]


def _tiles_of(
    segmenter: Segmenter, image: Tensor, config: EvalConfig, device: torch.device | str
) -> tuple[TilePlan, Iterator[Tile], Compute]:
    tiling = choose_tiling(segmenter, config.tile, config.overlap, config.blend)
    height, width = image.shape[1:]
    plan = plan_tiles(height, width, tile=tiling.tile, overlap=tiling.overlap, multiple=tiling.multiple)
    image = _extended(image, plan.rows.covered, plan.cols.covered)
    tiles = (
        Tile(row, col, partial(_cut, image, top, left, plan))
        for row, top in enumerate(plan.rows.origins)
        for col, left in enumerate(plan.cols.origins)
    )
    return plan, tiles, Compute(torch.device(device), batch_size=config.batch_size, least=tiling.least)


def _cut(image: Tensor, top: int, left: int, plan: TilePlan) -> Tensor:
    return image[:, top : top + plan.rows.tile, left : left + plan.cols.tile]


@torch.inference_mode()
def _view_scores(
    segmenter: Segmenter, image: Tensor, view: View, config: EvalConfig, device: torch.device | str
) -> Tensor:
    """float32 logits (H, W, K) of the image seen through a view, at the image's own size."""
    size = (image.shape[1], image.shape[2])
    seen = image.flip(-1) if view.flip else image
    if config.mode == "resized":
        side = choose_tiling(segmenter, config.tile, 0, config.blend).tile
        inner, corners = scaled_size((side, side), view.scale, config.resize_multiple), False
    else:
        inner, corners = scaled_size(size, view.scale, config.resize_multiple), config.resize_multiple is not None
    seen = interpolate(seen, inner, align_corners=corners)
    if config.mode == "tiled" and config.resize_multiple is None:
        plan, tiles, compute = _tiles_of(segmenter, seen, config, device)
        strips = blend_scores(predict_scores(segmenter, tiles, compute), plan, config.blend, segmenter.task.num_classes)
        scores = torch.cat([strip.scores for strip in strips]).permute(2, 0, 1)
    else:
        scores = _Forward(segmenter, Compute(torch.device(device)))(seen[None])[0].whole()
    scores = interpolate(scores, size, align_corners=corners)
    return (scores.flip(-1) if view.flip else scores).permute(1, 2, 0)
