"""The one predictor: validation, evaluation and scenes run the same tiles through the same code."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsseg.config import EvalConfig
from rsseg.inference.blend import Blend, Scored, Tile, blend_classes, blend_scores, decide
from rsseg.inference.tiling import TilePlan, mirror, plan_tiles
from rsseg.inference.tta import Pose, View, interpolate, poses_of, scaled_size, views_of
from rsseg.methods.base import Segmenter


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
        plan, scored = _tiles_of(segmenter, pixels, config, device)
        strips = blend_classes(scored, plan, config.blend, segmenter.task.num_classes)
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


def predict_tiles(
    segmenter: Segmenter,
    tiles: Iterable[Tile],
    *,
    batch_size: int,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    least: int = 1,
    poses: tuple[Pose, ...] = poses_of("none"),
) -> Iterator[Scored]:
    """Scores of tiles of one shape, in their order; an empty tile is passed on without a forward.

    A batch holds tiles of one row only, so that the scores of a row do not depend on where the work began.

    Args:
        segmenter: on `device`, in eval mode.
        tiles: with images in the host's memory.
        batch_size: tiles per forward.
        device: where the network runs and the scores stay.
        dtype: autocast to it, unless it is float32.
        least: see `Tiling`.
        poses: ways to lay each tile before the network; the probabilities are averaged.
    """
    forward = _Forward(segmenter, torch.device(device), dtype, least, poses)
    # A GPU works by itself: it gets the next batch before the host waits for the scores of the last one.
    late = 1 if forward.device.type == "cuda" else 0
    waiting: deque[list[Scored]] = deque()
    for _, row in groupby(tiles, key=lambda tile: tile.row):
        while batch := list(islice(row, batch_size)):
            waiting.append(forward.tiles(batch))
            if len(waiting) > late:
                yield from waiting.popleft()
    for scored in waiting:
        yield from scored


@dataclass(frozen=True)
class _Forward:
    """Images (B, C, h, w) in the host's memory -> scores (B, K, h, w) on the device; see `predict_tiles`."""

    segmenter: Segmenter
    device: torch.device
    dtype: torch.dtype = torch.float32
    least: int = 1
    poses: tuple[Pose, ...] = poses_of("none")

    def tiles(self, batch: list[Tile]) -> list[Scored]:
        """One forward for the tiles that are not empty."""
        full = [tile.image for tile in batch if not tile.is_empty]
        scores = iter(self(full[0][None] if len(full) == 1 else torch.stack(full))) if full else iter(())
        return [(tile, None if tile.is_empty else next(scores)) for tile in batch]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        if self.device.type == "cuda":
            # From pinned memory the copy runs beside the work on the last batch.
            images = images.pin_memory().to(self.device, non_blocking=True)
        if len(self.poses) == 1:
            return self._scores(images)
        posed = (pose.undo(self._scores(pose.apply(images)).float().softmax(1)) for pose in self.poses)
        total: Any = sum(posed)
        # The logarithm of a probability is a score that gives this probability.
        scores: Tensor = (total / len(self.poses)).clamp_min(1e-30).log()
        return scores.contiguous(memory_format=torch.channels_last)

    def _scores(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        images = _extended(images, max(height, self.least), max(width, self.least))
        images = images.to(self.device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.segmenter.predict_logits(images)[..., :height, :width]


def _extended(images: Tensor, height: int, width: int) -> Tensor:
    """Reflected at the right and the bottom to this size."""
    if images.shape[-2:] == (height, width):
        return images
    rows, cols = (torch.from_numpy(mirror(*pair)) for pair in zip(images.shape[-2:], (height, width), strict=True))
    return images[..., rows, :][..., cols]


def _tiles_of(
    segmenter: Segmenter, image: Tensor, config: EvalConfig, device: torch.device | str
) -> tuple[TilePlan, Iterator[Scored]]:
    tiling = choose_tiling(segmenter, config.tile, config.overlap, config.blend)
    height, width = image.shape[1:]
    plan = plan_tiles(height, width, tile=tiling.tile, overlap=tiling.overlap, multiple=tiling.multiple)
    image = _extended(image, plan.rows.covered, plan.cols.covered)
    tiles = (
        Tile(row, col, image[:, top : top + plan.rows.tile, left : left + plan.cols.tile])
        for row, top in enumerate(plan.rows.origins)
        for col, left in enumerate(plan.cols.origins)
    )
    return plan, predict_tiles(segmenter, tiles, batch_size=config.batch_size, device=device, least=tiling.least)


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
        plan, scored = _tiles_of(segmenter, seen, config, device)
        strips = blend_scores(scored, plan, config.blend, segmenter.task.num_classes)
        scores = torch.cat([strip.scores for strip in strips]).permute(2, 0, 1)
    else:
        scores = _Forward(segmenter, torch.device(device))(seen[None])[0].float()
    scores = interpolate(scores, size, align_corners=corners)
    return (scores.flip(-1) if view.flip else scores).permute(1, 2, 0)
