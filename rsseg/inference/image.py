"""Predict one image in memory: tiled or resized, averaged over scales and mirror images."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsseg.config import EvalConfig
from rsseg.inference.blend import CLASSES_ONLY, Decision, PixelOutputs, Tile, blend_logits
from rsseg.inference.machine import NO_MEMORY, memory_errors
from rsseg.inference.predict import (
    Compute,
    Network,
    NetworkFacts,
    choose_tiling,
    extended,
    predict_strips,
    predict_tile_logits,
)
from rsseg.inference.tiling import TilePlan
from rsseg.inference.torch_network import TorchNetwork, decide
from rsseg.layers.blocks import resize
from rsseg.methods.base import Segmenter

Predictor = Segmenter | Network
"""A segmenter on the device, in eval mode, which torch runs; or a network in another runtime."""


class View(NamedTuple):
    """One test-time view of an image: scaled, then mirrored left to right."""

    scale: float
    flip: bool


def predict_image(
    network: Predictor,
    image: NDArray[np.float32] | Tensor,
    valid: NDArray[np.bool_] | None,
    config: EvalConfig,
    *,
    device: torch.device | str,
) -> NDArray[np.uint8]:
    """Classes of one image in memory.

    Args:
        network: see `Predictor`.
        image: float32 (C, H, W) in scaled units.
        valid: bool (H, W), False where the image has no data; the network sees `network.fill` there. None: all valid.
        config: tiling, blending and test-time augmentation; None in it uses the network's own.
        device: where the network runs.

    Returns:
        uint8 (H, W) class indices, undefined where the image has no data.

    Raises:
        MachineError: the device has too little memory for a single tile.
    """
    with memory_errors(NO_MEMORY.format(device=device)):
        strips = _strips(network, _filled(network, image, valid), config, CLASSES_ONLY, device)
        return np.concatenate([decision.classes for decision in strips])


def predict_and_sample(
    network: Predictor, image: Tensor, pixels: NDArray[np.int64], config: EvalConfig, *, device: torch.device | str
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """`predict_image`, and the probabilities of some pixels: float32 (n, K), at temperature 1.

    Args:
        network: see `Predictor`.
        image: as for `predict_image`, filled where there is no data.
        pixels: int (n,), flat positions in the image, ascending.
        config: see `predict_image`.
        device: where the network runs.
    """
    classes, sampled, first = [], [np.zeros((0, network.task.num_classes), np.float32)], 0
    with memory_errors(NO_MEMORY.format(device=device)):
        for decision in _strips(network, image, config, PixelOutputs(probabilities="float32"), device):
            assert decision.probabilities is not None  # for the type checker: they are asked for
            last = first + decision.classes.size
            inside = pixels[np.searchsorted(pixels, first) : np.searchsorted(pixels, last)] - first
            sampled.append(decision.probabilities.reshape(-1, network.task.num_classes)[inside])
            classes.append(decision.classes)
            first = last
    return np.concatenate(classes), np.concatenate(sampled)


def _strips(
    network: Predictor, pixels: Tensor, config: EvalConfig, outputs: PixelOutputs, device: torch.device | str
) -> Iterator[Decision]:
    """Rows of the image from top to bottom; all at once where the whole image passes through the network."""
    views = _views_of(config)
    if config.mode == "tiled" and config.resize_multiple is None and views == (View(1.0, False),):
        plan, tiles, compute = _tiles_of(network, pixels, config)
        running = _running(network, device)
        for _, strip in predict_strips(running, tiles, [plan], config.blend, compute, outputs=outputs):
            yield strip.decision
    elif len(views) == 1:
        yield decide(_view_logits(network, pixels, views[0], config, device), outputs)
    else:
        mean = _mean_probabilities(network, pixels, config, device)
        # Logarithms of probabilities serve as logits.
        yield decide(mean if outputs == CLASSES_ONLY else mean.clamp_min(1e-30).log(), outputs)


def predict_probabilities(
    network: Predictor,
    image: NDArray[np.float32] | Tensor,
    valid: NDArray[np.bool_] | None,
    config: EvalConfig,
    *,
    device: torch.device | str,
) -> Tensor:
    """Like `predict_image`, but float32 (H, W, K) probabilities in host memory, the mean over test-time views."""
    with memory_errors(NO_MEMORY.format(device=device)):
        return _mean_probabilities(network, _filled(network, image, valid), config, device).cpu()


def _running(network: Predictor, device: torch.device | str) -> Network:
    return TorchNetwork(network, torch.device(device)) if isinstance(network, Segmenter) else network


def _filled(network: NetworkFacts, image: NDArray[np.float32] | Tensor, valid: NDArray[np.bool_] | None) -> Tensor:
    """The image with `network.fill` where there is no data."""
    pixels = torch.as_tensor(image, dtype=torch.float32)
    if valid is None:
        return pixels
    return torch.where(torch.tensor(valid), pixels, torch.tensor(network.fill)[:, None, None])


def _views_of(config: EvalConfig) -> tuple[View, ...]:
    """All scales, each also mirrored with `flip`."""
    return tuple(View(scale, flip) for scale in config.scales for flip in ((False, True) if config.flip else (False,)))


def _mean_probabilities(network: Predictor, pixels: Tensor, config: EvalConfig, device: torch.device | str) -> Tensor:
    views = _views_of(config)
    total: Any = sum(_view_logits(network, pixels, view, config, device).softmax(-1) for view in views)
    return total / len(views)  # type: ignore[no-any-return]


def _tiles_of(network: NetworkFacts, image: Tensor, config: EvalConfig) -> tuple[TilePlan, Iterator[Tile], Compute]:
    tiling = choose_tiling(network, config.tile, config.overlap, config.blend)
    height, width = image.shape[1:]
    plan = tiling.plan(height, width)
    image = extended(image, plan.rows.covered, plan.cols.covered)
    tiles = (
        Tile(row, col, partial(_cut, image, top, left, plan))
        for row, top in enumerate(plan.rows.origins)
        for col, left in enumerate(plan.cols.origins)
    )
    return plan, tiles, Compute(config.batch_size, tiling.least)


def _cut(image: Tensor, top: int, left: int, plan: TilePlan) -> NDArray[np.float32]:
    return image[:, top : top + plan.rows.tile, left : left + plan.cols.tile].cpu().numpy()


@torch.inference_mode()
def _view_logits(
    network: Predictor, image: Tensor, view: View, config: EvalConfig, device: torch.device | str
) -> Tensor:
    """float32 logits (H, W, K) of one view of the image, at the image's own size."""
    size, running = (image.shape[1], image.shape[2]), _running(network, device)
    seen = image.flip(-1) if view.flip else image
    if config.mode == "resized":
        side = choose_tiling(network, config.tile, 0, config.blend).tile
        inner, corners = _scaled_size((side, side), view.scale, config.resize_multiple), False
    else:
        inner, corners = _scaled_size(size, view.scale, config.resize_multiple), config.resize_multiple is not None
    seen = resize(seen[None], inner, align_corners=corners)[0]
    if config.mode == "tiled" and config.resize_multiple is None:
        plan, tiles, compute = _tiles_of(network, seen, config)
        of_tiles = predict_tile_logits(running, tiles, compute)
        strips = blend_logits(of_tiles, plan, config.blend, network.task.num_classes)
        logits = torch.from_numpy(np.concatenate([strip.logits for strip in strips], axis=1))
    elif isinstance(running, TorchNetwork):
        logits = running.of(seen[None], Compute())[0].tensor()
    else:
        logits = torch.from_numpy(running.logits([seen.cpu().numpy()], Compute())[0].whole())
    logits = resize(logits[None], size, align_corners=corners)[0]
    return (logits.flip(-1) if view.flip else logits).permute(1, 2, 0)


def _scaled_size(size: tuple[int, int], scale: float, multiple: int | None) -> tuple[int, int]:
    """Height and width times `scale`, each to the nearest pixel or the nearest multiple (half up), at least one."""
    step = multiple or 1
    height, width = (max(int(side * scale / step + 0.5), 1) * step for side in size)
    return height, width
