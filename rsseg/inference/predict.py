"""The one predictor: validation, evaluation and scenes run the same tiles through the same code."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsseg.config import EvalConfig
from rsseg.inference.blend import Scored, Tile, blend_classes, blend_scores, decide
from rsseg.inference.tiling import TilePlan, plan_tiles
from rsseg.inference.tta import View, interpolate, scaled_size, views_of
from rsseg.methods.base import Segmenter, TileHint


@dataclass(frozen=True)
class Tiling:
    """How an image is cut for a network, in pixels.

    least: smaller tiles are extended by reflection to this side, the one that a network of fixed size was trained at.
    """

    tile: int
    overlap: int
    least: int


def choose_tiling(hint: TileHint, tile: int | None, overlap: int | None) -> Tiling:
    """The user's tile and overlap, or where None what suits the network."""
    tile = tile or hint.size
    if overlap is None:
        overlap = min(hint.overlap, tile // 2)
    return Tiling(tile, overlap, 1 if hint.flexible else min(tile, hint.size))


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
    return torch.where(torch.from_numpy(valid), pixels, torch.tensor(segmenter.fill)[:, None, None])


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
) -> Iterator[Scored]:
    """Scores of tiles of one shape, in their order; an empty tile is passed on without a forward.

    Args:
        segmenter: on `device`, in eval mode.
        tiles: with images in the host's memory.
        batch_size: tiles per forward.
        device: where the network runs and the scores stay.
        dtype: autocast to it, unless it is float32.
        least: see `Tiling`.
    """
    forward = _Forward(segmenter, torch.device(device), dtype, least)
    iterator = iter(tiles)
    while batch := list(islice(iterator, batch_size)):
        full = [tile for tile in batch if not tile.is_empty]
        scores = iter(forward(torch.stack([t.image for t in full]))) if full else iter(())
        for tile in batch:
            yield tile, None if tile.is_empty else next(scores)


@dataclass(frozen=True)
class _Forward:
    """Images (B, C, h, w) in the host's memory -> scores (B, K, h, w) on the device; see `predict_tiles`."""

    segmenter: Segmenter
    device: torch.device
    dtype: torch.dtype = torch.float32
    least: int = 1

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if min(height, width) < self.least:
            rows, cols = _mirror(height, max(height, self.least)), _mirror(width, max(width, self.least))
            images = images[..., rows, :][..., cols]
        images = images.to(self.device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.segmenter.predict_logits(images)[..., :height, :width]


def _mirror(length: int, target: int) -> Tensor:
    """Indices 0, 1, .. length - 1, length - 2, .. that extend an axis to `target` by repeated reflection."""
    period = max(2 * (length - 1), 1)
    index = torch.arange(target) % period
    return torch.minimum(index, period - index)


def _tiles_of(
    segmenter: Segmenter, image: Tensor, config: EvalConfig, device: torch.device | str
) -> tuple[TilePlan, Iterator[Scored]]:
    tiling = choose_tiling(segmenter.tile, config.tile, config.overlap)
    plan = plan_tiles(image.shape[1], image.shape[2], tile=tiling.tile, overlap=tiling.overlap)
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
        side = choose_tiling(segmenter.tile, config.tile, 0).tile
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
