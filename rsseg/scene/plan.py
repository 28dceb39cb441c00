"""What is settled before the first pixel is read: bands, tiles, panels, memory."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from rsseg.errors import DataError, MachineError
from rsseg.inference.blend import PixelOutputs
from rsseg.inference.device import (
    Cost,
    keep_heap,
    measure_tile,
    resident_bytes,
    resolve_device,
    resolve_precision,
)
from rsseg.inference.network import ready_to_predict
from rsseg.inference.predict import Compute, Tiling, choose_tiling, poses_of
from rsseg.inference.tiling import Panel, TilePlan, plan_tiles, split_panels
from rsseg.methods.base import Segmenter
from rsseg.raster import Raster, RasterInfo, match_bands
from rsseg.scene.identity import identify_model
from rsseg.scene.options import SceneOptions, ScenePlan
from rsseg.scene.products import Product, class_product, confidence_product, probability_product
from rsseg.scene.writer import check_output
from rsseg.task import Task

_BATCH_PIXELS = 1024 * 1024
"""Pixels of a batch on a CPU: more gain nothing there, and take memory."""
_GPU_BATCH = 16
_GPU_SHARE = 0.7
"""Most tiles at once on a GPU, and the part of its free memory that they may take."""
_BUFFER_BYTES = 32 << 20
"""What rows of the scene may take, input and output together; wider scenes are computed in panels."""
_BASE_BYTES = 96 << 20
"""What does not depend on anything: caches of GDAL, kernels, threads."""
_USUAL_BYTES = 500 << 20
"""Unless more is allowed, no more tiles are computed at once than this holds."""
_TRIM_AT = 0.9
"""Part of the estimate, or of what is allowed, at which free memory is given back; it may grow between two looks."""
_LEAST_TILE = 128


@dataclass(frozen=True)
class Setup:
    """A prediction, ready to run.

    network: on the device, in eval mode
    model: hash of its weights
    panels: of `plan`
    products: final name and content of each output, the class raster first
    trim_above: bytes of the process at which free memory is given back
    """

    scene: str
    options: SceneOptions
    info: RasterInfo
    bands: tuple[int, ...]
    network: Segmenter
    model: str
    compute: Compute
    tiling: Tiling
    plan: TilePlan
    panels: tuple[Panel, ...]
    products: tuple[tuple[Path, Product], ...]
    memory_bytes: int
    trim_above: int
    seconds: float
    warnings: tuple[str, ...]

    @property
    def output(self) -> Path:
        """The class raster."""
        return self.products[0][0]

    @property
    def wanted(self) -> PixelOutputs:
        """What each tile must give."""
        return PixelOutputs(self.options.confidence, self.options.probabilities)

    @property
    def tiles(self) -> int:
        """Number of tiles, those counted twice that two panels need."""
        return sum(panel.plan.count for panel in self.panels)

    def open(self) -> Raster:
        """The scene with the bands that are used."""
        return open_scene(self.scene, self.options, self.bands, max(p.plan.cols.length for p in self.panels))

    def settings(self) -> dict[str, object]:
        """Whatever can change a pixel of the output, beside the scene and the network."""
        names = {"blend", "nodata", "zero_collar", "tta", "confidence", "probabilities", "format"}
        return self.options.model_dump(mode="json", include=names) | {
            "bands": self.bands,
            "tile": self.tiling.tile,
            "overlap": self.tiling.overlap,
            "batch_size": self.compute.batch_size,
            "panels": len(self.panels),
            "dtype": str(self.compute.dtype),
            "device": self.compute.device.type,
        }

    def describe(self) -> ScenePlan:
        """For the user."""
        return ScenePlan(
            scene=self.scene,
            output=self.output,
            height=self.info.height,
            width=self.info.width,
            bands=tuple(zip(self.network.task.bands, self.info.band_names, strict=True)),
            tile=self.tiling.tile,
            overlap=self.tiling.overlap,
            tiles=self.tiles,
            redundancy=self.plan.redundancy * self.tiles / self.plan.count,
            blend=self.options.blend,
            batch_size=self.compute.batch_size,
            lanes=self.compute.parallel_batches,
            device=str(self.compute.device),
            dtype=str(self.compute.dtype).removeprefix("torch."),
            views=len(self.compute.poses),
            panels=len(self.panels),
            memory_bytes=self.memory_bytes,
            seconds=self.seconds,
            warnings=self.warnings,
        )


@dataclass(frozen=True)
class Ready:
    """A network on its device, ready for any number of scenes.

    network: in eval mode
    model: hash of the weights that it was made from
    held_before: bytes that the process held before
    """

    network: Segmenter
    device: torch.device
    dtype: torch.dtype
    model: str
    held_before: int
    _costs: dict[int, Cost] = field(default_factory=dict)

    @classmethod
    def of(cls, segmenter: Segmenter, options: SceneOptions) -> "Ready":
        """Copy a network, which is not changed, to the device of the options.

        Raises:
            MachineError: the device is not there.
        """
        keep_heap()
        held = resident_bytes()
        device = resolve_device(options.device)
        network, dtype = ready_to_predict(segmenter, device, resolve_precision(options.dtype, device))
        return cls(network, device, dtype, identify_model(segmenter), held)

    def cost(self, side: int) -> Cost:
        """Of a square tile."""
        if side not in self._costs:
            self._costs[side] = measure_tile(self.network, side, self.device, self.dtype)
        return self._costs[side]


def settle(ready: Ready, scene: Path | str, output: Path, options: SceneOptions) -> Setup:
    """Open the scene, check the output, and choose what the user left open.

    Raises:
        UsageError: the output exists already or cannot be written there; overlap and tile do not fit.
        DataError: the scene is missing, damaged, or lacks bands.
        MachineError: the memory that is allowed does not suffice.
    """
    task = ready.network.task
    with open_scene(scene, options, None) as raster:
        try:
            bands = match_bands(raster.info, task.bands, options.bands)
        except DataError as error:
            raise DataError(f"{scene}: {error}") from None
    with open_scene(scene, options, bands) as raster:
        info, files = raster.info, raster.files
    products = _products(task, output, options)
    for name, _ in products:
        check_output(name, files, overwrite=options.overwrite)
    fit = _fit(ready, info, products, options)
    warnings = []
    if info.dtype != task.dtype:
        warnings.append(
            f"the pixels are {info.dtype}, the network was trained on {task.dtype}; they are scaled as those were"
        )
    poses = poses_of(options.tta)
    return Setup(
        scene=str(scene),
        options=options,
        info=info,
        bands=bands,
        network=ready.network,
        model=ready.model,
        compute=Compute(ready.device, fit.batch_size, ready.dtype, fit.tiling.least, poses, fit.lanes),
        tiling=fit.tiling,
        plan=fit.plan,
        panels=fit.panels,
        products=products,
        memory_bytes=fit.memory_bytes,
        trim_above=ready.held_before + int(_TRIM_AT * max(fit.memory_bytes, options.max_memory or 0)),
        seconds=fit.cost.seconds * sum(p.plan.count for p in fit.panels) * len(poses),
        warnings=tuple(warnings),
    )


def open_scene(
    scene: Path | str, options: SceneOptions, bands: tuple[int, ...] | None, columns: int | None = None
) -> Raster:
    """The scene as the options say; `columns` is the widest window that will be read."""
    return Raster(scene, bands=bands, nodata=options.nodata, zero_collar=options.zero_collar, columns=columns)


def _products(task: Task, output: Path, options: SceneOptions) -> tuple[tuple[Path, Product], ...]:
    products = [(output, class_product(task))]
    if options.confidence:
        products.append((output.with_name(f"{output.stem}_confidence.tif"), confidence_product()))
    if options.probabilities != "none":
        name = output.with_name(f"{output.stem}_probabilities.tif")
        products.append((name, probability_product(task, options.probabilities)))
    return tuple(products)


@dataclass(frozen=True)
class _Fit:
    """Tiles, batch and panels, and what they take."""

    tiling: Tiling
    plan: TilePlan
    panels: tuple[Panel, ...]
    batch_size: int
    lanes: int
    cost: Cost
    memory_bytes: int


def _fit(ready: Ready, info: RasterInfo, products: tuple[tuple[Path, Product], ...], options: SceneOptions) -> _Fit:
    """The usual choice, or with `max_memory` the largest that fits: one lane, one tile, smaller tiles."""
    network, device = ready.network, ready.device
    tile, batch = options.tile, options.batch_size
    while True:
        tiling = choose_tiling(network, tile, options.overlap, options.blend)
        plan = plan_tiles(info.height, info.width, tile=tiling.tile, overlap=tiling.overlap, multiple=tiling.multiple)
        side = max(plan.rows.tile, plan.cols.tile)
        cost = ready.cost(side)
        size = batch or _batch_size(side, cost, device)
        # A row is cut into equal batches: full ones with a small rest would compute no faster.
        columns = len(plan.cols.origins)
        size = -(-columns // -(-columns // size))
        per_column = _bytes_per_column(plan, info, products, network, options)
        allowed = _BUFFER_BYTES if options.max_memory is None else min(_BUFFER_BYTES, options.max_memory // 8)
        panels = split_panels(plan, max(allowed // per_column, 1), shared=options.blend != "crop")
        buffers = per_column * max(panel.plan.cols.length for panel in panels)
        pixels = plan.rows.tile * plan.cols.tile
        lane = size * (cost.peak_bytes + 4 * pixels * _values_per_pixel(info, network, options))
        fixed, lanes = _BASE_BYTES + buffers, 1
        if device.type == "cpu":
            fixed += _weights(network)
            fitting = ((options.max_memory or _USUAL_BYTES) - fixed) // lane
            lanes = max(1, min(torch.get_num_threads(), fitting))
        fit = _Fit(tiling, plan, panels, size, lanes, cost, fixed + lanes * lane)
        if options.max_memory is None or fit.memory_bytes <= options.max_memory:
            return fit
        if size > 1 and options.batch_size is None:
            batch = 1
        elif network.tile.flexible and options.tile is None and side // 2 >= _LEAST_TILE:
            tile = max(side // 2 // network.input_multiple, 1) * network.input_multiple
        else:
            raise MachineError(
                f"the prediction needs about {fit.memory_bytes / 2**20:.0f} MB with tiles of {tiling.tile}; "
                f"{options.max_memory / 2**20:.0f} MB are allowed. Raise --max-memory or give a smaller --tile."
            )


def _batch_size(side: int, cost: Cost, device: torch.device) -> int:
    if device.type == "cpu":
        return max(1, _BATCH_PIXELS // side**2)
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(_GPU_BATCH, int(free * _GPU_SHARE) // max(cost.peak_bytes, 1)))


def _bytes_per_column(
    plan: TilePlan,
    info: RasterInfo,
    products: Iterable[tuple[Path, Product]],
    network: Segmenter,
    options: SceneOptions,
) -> int:
    """Of everything that holds rows of a panel: a row of tiles, two finished strips, a row of blocks per output."""
    written = sum(product.pixel_bytes for _, product in products)
    read = plan.rows.tile * (info.count * np.dtype(info.dtype).itemsize + 1)
    finished = 2 * plan.rows.tile * (written + 1) + 2 * 512 * written
    canvas = 0 if options.blend == "crop" else 2 * 4 * plan.rows.tile * network.task.num_classes
    return read + finished + canvas


def _values_per_pixel(info: RasterInfo, network: Segmenter, options: SceneOptions) -> int:
    """Of a tile, in float32, beside the forward: its image, and its scores where all of them are wanted at once."""
    classes = network.task.num_classes
    if options.tta != "none":
        return info.count + 3 * classes  # of a view, their softmax, their sum
    return info.count + (0 if options.blend == "crop" else classes)


def _weights(network: Segmenter) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters())
