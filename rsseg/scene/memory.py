"""Choose tiles, batches and panels that fit into memory."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rsseg.checkpoint import Calibration
from rsseg.errors import MachineError, UsageError
from rsseg.inference.engines import Quantization, open_engine
from rsseg.inference.ensemble import EnsembleNetwork, check_tasks
from rsseg.inference.machine import Cost, free_bytes, keep_heap, memory_errors, resident_bytes
from rsseg.inference.predict import Network, NetworkFacts, Tiling, choose_tiling
from rsseg.inference.tiling import Panel, TilePlan, split_panels
from rsseg.raster import RasterInfo
from rsseg.scene.options import SceneOptions
from rsseg.scene.writer import Product

if TYPE_CHECKING:
    from rsseg.methods.base import Segmenter

_BATCH_PIXELS = 1024 * 1024
"""Pixels of a batch on a CPU: larger batches are not faster and take more memory."""
_GPU_BATCH = 16
"""Maximum number of tiles in a batch on a GPU."""
_GPU_SHARE = 0.5
"""Share of a GPU's total (not free) memory for a batch, so that the batch does not depend on other programs."""
_BUFFER_BYTES = 32 << 20
"""Memory for rows of the scene, input and output together; wider scenes are computed in panels.

Free memory has no influence on it: rows that are kept for resuming belong to one division into panels.
"""
_BASE_BYTES = 96 << 20
"""Constant part of the memory: caches of GDAL, kernels, threads."""
_FREE_SHARE = 4
"""Parallel batches take one n-th of the free memory where `max_memory` is not set."""
_MOST_BYTES = 4 << 30
"""They take no more than this."""
_TRIM_AT = 2
"""Multiple of the estimate above which free memory is returned to the system where `max_memory` is not set: returned
memory must be faulted in again."""
_PROBE = 512
"""Side in pixels at which the cost of larger tiles of a convolutional network is measured."""
OUT_OF_MEMORY = (
    "out of memory. Give --batch-size 1, a smaller --tile or --max-memory, or end other programs on the device."
)
_LEAST_TILE = 128
_SHARE_ARRAYS = 4
"""Arrays of probabilities that an ensemble needs at a time, besides one per network."""
_MOST_REDUNDANCY = 64
"""Maximum forward passes per pixel: more are a mistake, and would run for days."""


@dataclass(frozen=True)
class PreparedNetwork:
    """A network on its device, for any number of scenes.

    network: see `Network`
    model: hash of the weights that it was made from
    weights_bytes: memory of the weights
    measure: side of a square tile -> its time and memory
    held_before: bytes that the process held before
    gpu_bytes: total memory of the GPU, 0 for a CPU
    calibration: of the model's probabilities
    quantization: of a network in int8 arithmetic
    """

    network: Network
    model: str
    weights_bytes: int
    measure: Callable[[int], Cost]
    held_before: int
    gpu_bytes: int = 0
    calibration: Calibration | None = None
    quantization: Quantization | None = None
    _costs: dict[int, Cost] = field(default_factory=dict)

    def cost(self, height: int, width: int) -> Cost:
        """Time and memory of a tile; both are proportional to the pixels of a convolutional network."""
        side = max(height, width)
        if not self.network.tile.flexible:
            return self._measured(side)
        side, multiple = min(side, _PROBE), self.network.input_multiple
        computed = [-(-length // multiple) * multiple for length in (height, width, side)]
        return self._measured(side).scaled(computed[0] * computed[1] / computed[2] ** 2)

    def _measured(self, side: int) -> Cost:
        if side not in self._costs:
            self._costs[side] = self.measure(side)
        return self._costs[side]


def prepare_network(segmenter: "Segmenter", options: SceneOptions) -> PreparedNetwork:
    """Copy a network, which is not changed, to the device of the options, to be run by torch.

    Raises:
        MachineError: the device does not exist, or has too little memory.
    """
    import torch

    from rsseg.inference.device import measure_tile, resolve_device, resolve_precision
    from rsseg.inference.network import ready_to_predict
    from rsseg.inference.torch_network import PinnedCopies, TorchNetwork, Uploads

    keep_heap()
    held = resident_bytes()
    device = resolve_device(options.device)
    with memory_errors(OUT_OF_MEMORY):
        network, dtype = ready_to_predict(segmenter, device, resolve_precision(options.dtype, device))
        uploads = Uploads(network, PinnedCopies(device)) if device.type == "cuda" else None
    return PreparedNetwork(
        network=TorchNetwork(network, device, dtype, uploads),
        model=identify_model(segmenter),
        weights_bytes=sum(p.numel() * p.element_size() for p in network.parameters()),
        measure=lambda side: measure_tile(network, side, device, dtype),
        held_before=held,
        gpu_bytes=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0,
        calibration=segmenter.calibration,
    )


def prepare_model(model: Path, options: SceneOptions) -> PreparedNetwork:
    """Prepare the network of a model file for the engine of the options.

    Once the network has been exported, another engine than torch needs neither torch nor timm.

    Raises:
        WeightsError: there is no model, or it is damaged.
        UsageError: the engine cannot run this network, or not on this device, or not as quantized as wanted.
        DataError: the network cannot be calibrated with the dataset.
        MachineError: the engine is not installed, or there is no such device.
    """
    keep_heap()
    held = resident_bytes()
    how = (model, options.engine, options.device, options.dtype)
    if options.quantize == "none" and options.calibrate is None:
        ready = open_engine(*how)
    else:
        from rsseg.evaluation.quantize import open_network

        ready = open_network(*how, quantize=options.quantize, calibrate=options.calibrate)
    if ready is not None:
        return PreparedNetwork(
            ready.network,
            ready.model,
            ready.weights_bytes,
            ready.measure,
            held,
            calibration=ready.network.calibration,
            quantization=ready.quantization,
        )
    from rsseg.inference.network import load_segmenter

    return prepare_network(load_segmenter(model), options)


def join_networks(named: Sequence[tuple[str, PreparedNetwork]], options: SceneOptions) -> PreparedNetwork:
    """One network that averages the probabilities of several; their order has no effect.

    Args:
        named: networks, with their model files for messages; a single one is returned as it is.
        options: of the scenes.

    Raises:
        UsageError: no network, networks of different classes, bands or scaling, or no tile that fits all; disagreement
            of a single network or with blending.
    """
    check_tasks([(name, one.network.task) for name, one in named])
    if options.disagreement and len(named) == 1:
        raise UsageError("--disagreement is that of several models. Give --model for each of them.")
    if options.disagreement and options.blend != "crop":
        raise UsageError("--disagreement is computed per tile. Use it with --blend crop.")
    if len(named) == 1:
        return named[0][1]
    fixed = {one.network.tile.size: name for name, one in named if not one.network.tile.flexible}
    if len(fixed) > 1 and options.tile is None:
        sizes = " and ".join(f"{size} ({name})" for size, name in sorted(fixed.items()))
        raise UsageError(f"the models were trained on tiles of {sizes} pixels. Give the side for all with --tile.")
    # In one order, so that rounding is the same.
    members = sorted((one for _, one in named), key=lambda one: (one.model, str(one.calibration)))
    temperatures = tuple(None if one.calibration is None else one.calibration.temperatures for one in members)
    network = EnsembleNetwork(tuple(one.network for one in members), temperatures)
    identity = repr([(one.model, own) for one, own in zip(members, temperatures, strict=True)])

    def measure(side: int) -> Cost:
        costs = [one.cost(side, side) for one in members]
        plane = 4 * network.task.num_classes * side**2
        # Logits of all networks are kept; then some arrays of probabilities at full size take the place of activations.
        peak = max(_SHARE_ARRAYS * plane, *(cost.peak_bytes for cost in costs)) + (len(members) - 1) * plane
        return Cost(sum(cost.seconds for cost in costs), peak)

    return PreparedNetwork(
        network=network,
        model=hashlib.blake2b(identity.encode(), digest_size=16).hexdigest(),
        weights_bytes=sum(one.weights_bytes for one in members),
        measure=measure,
        held_before=min(one.held_before for one in members),
        gpu_bytes=members[0].gpu_bytes,
    )


def identify_model(segmenter: "Segmenter") -> str:
    """Hash of the weights, the classes and the type of the network."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{type(segmenter).__qualname__} {segmenter.tile} {segmenter.fill}".encode())
    digest.update(segmenter.task.model_dump_json().encode())
    for name, tensor in sorted(segmenter.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass(frozen=True)
class Fit:
    """Tiles, batch and panels, and what they cost."""

    tiling: Tiling
    plan: TilePlan
    panels: tuple[Panel, ...]
    batch_size: int
    parallel_batches: int
    cost: Cost
    memory_bytes: int
    trim_above: int
    """Bytes, libraries excluded, above which free memory is returned to the system."""
    warnings: tuple[str, ...]


def fit_memory(prepared: PreparedNetwork, info: RasterInfo, products: Sequence[Product], options: SceneOptions) -> Fit:
    """The usual choice; with `max_memory` the largest that fits: fewer parallel batches, one tile, smaller tiles.

    Free memory decides how many batches run in parallel and nothing else, so that it cannot change a class.
    """
    network = prepared.network
    tile, batch = options.tile, options.batch_size
    limit = options.max_memory or min(_MOST_BYTES, free_bytes() // _FREE_SHARE)
    warnings: tuple[str, ...] = ()
    usual = choose_tiling(network, tile, options.overlap, options.blend)
    tiling = usual
    while True:
        plan = tiling.plan(info.height, info.width)
        _check_redundancy(tiling)
        side = max(plan.rows.tile, plan.cols.tile)
        cost = prepared.cost(plan.rows.tile, plan.cols.tile)
        size = batch or _batch_size(side, cost, prepared.gpu_bytes)
        # A row is split into equal batches: full ones with a small remainder would be no faster.
        columns = len(plan.cols.origins)
        size = -(-columns // -(-columns // size))
        per_column = _bytes_per_column(plan, info, products, network, options)
        allowed = _BUFFER_BYTES if options.max_memory is None else min(_BUFFER_BYTES, options.max_memory // 8)
        panels = split_panels(plan, max(allowed // per_column, 1), shared=options.blend != "crop")
        buffers = per_column * max(panel.plan.cols.length for panel in panels)
        pixels = plan.rows.tile * plan.cols.tile
        per_batch = size * (cost.peak_bytes + 4 * pixels * _values_per_pixel(info, network, options))
        fixed, parallel = _BASE_BYTES + buffers, 1
        if not prepared.gpu_bytes:
            fixed += prepared.weights_bytes
            batches = len(plan.rows.origins) * -(-columns // size)
            # On two cores, float32 tiles with a thread each were slower than one with both (docs/performance.md).
            most = network.threads() // (2 if network.dtype == "float32" else 1)
            parallel = max(1, min(most, (limit - fixed) // per_batch, batches))
        needed = fixed + parallel * per_batch
        # Where the heap is fragmented, the next batch may take new memory for all that it needs.
        trim = limit - per_batch
        if options.max_memory is None:
            trim = min(_TRIM_AT * needed, max(trim, needed))
        fit = Fit(tiling, plan, panels, size, parallel, cost, needed, trim, warnings)
        if options.max_memory is None or fit.memory_bytes <= options.max_memory:
            return fit
        if size > 1 and options.batch_size is None:
            batch = 1
        elif network.tile.flexible and options.tile is None and side * 3 // 4 >= _LEAST_TILE:
            tile = max(side * 3 // 4 // network.input_multiple, 1) * network.input_multiple
            tiling = replace(choose_tiling(network, tile, options.overlap, options.blend), fitted=usual.fitted)
            warnings = (
                f"--max-memory makes the tiles at most {tile} instead of {usual.tile} pixels, which can change classes",
            )
        else:
            raise MachineError(
                f"the prediction needs about {fit.memory_bytes / 2**20:.0f} MB with tiles of {side}; "
                f"{options.max_memory / 2**20:.0f} MB are allowed. Raise --max-memory or give a smaller --tile."
            )


def _check_redundancy(tiling: Tiling) -> None:
    computed = -(-max(tiling.tile, tiling.least) // tiling.multiple) * tiling.multiple
    redundancy = (computed / (tiling.tile - tiling.overlap)) ** 2
    if redundancy > _MOST_REDUNDANCY:
        raise UsageError(
            f"tiles of {tiling.tile} with an overlap of {tiling.overlap} compute each pixel {redundancy:.0f} times. "
            "Give a larger --tile or a smaller --overlap."
        )


def _batch_size(side: int, cost: Cost, gpu_bytes: int) -> int:
    if not gpu_bytes:
        return max(1, _BATCH_PIXELS // side**2)
    return max(1, min(_GPU_BATCH, int(gpu_bytes * _GPU_SHARE) // max(cost.peak_bytes, 1)))


def _bytes_per_column(
    plan: TilePlan,
    info: RasterInfo,
    products: Sequence[Product],
    network: NetworkFacts,
    options: SceneOptions,
) -> int:
    """Memory of all buffers per column of a panel: a row of tiles, two finished strips, a row of blocks per output."""
    written = sum(product.pixel_bytes for product in products)
    read = plan.rows.tile * (info.count * np.dtype(info.dtype).itemsize + 2)
    finished = 2 * plan.rows.tile * (written + 1) + 2 * 512 * written
    canvas = 0 if options.blend == "crop" else 2 * 4 * plan.rows.tile * network.task.num_classes
    return read + finished + canvas


def _values_per_pixel(info: RasterInfo, network: NetworkFacts, options: SceneOptions) -> int:
    """Float32 values per pixel of a tile besides the forward pass: the image, and the logits where all are kept."""
    classes = network.task.num_classes
    if options.tta != "none":
        return info.count + 3 * classes  # logits of a view, their softmax, the sum over views
    return info.count + (0 if options.blend == "crop" else classes)
