"""The pipeline of a scene: reader thread -> tiles -> network -> blend -> writer thread, in bounded memory."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rsseg.inference.blend import Scored, Strip, Tile, blend_classes
from rsseg.inference.device import keep_heap, ready_to_predict, resolve_device, resolve_precision
from rsseg.inference.predict import Tiling, choose_tiling, predict_tiles
from rsseg.inference.tiling import TilePlan, plan_tiles
from rsseg.methods.base import Segmenter
from rsseg.raster import Raster, RasterInfo, match_bands
from rsseg.scene.options import ClassArea, Progress, SceneOptions, ScenePlan, SceneResult
from rsseg.scene.source import read_tiles
from rsseg.scene.writer import NODATA, SceneWriter, check_output
from rsseg.task import Task

_AHEAD = 2
"""Tiles that the reader may be ahead of the network, and strips that the network may be ahead of the writer."""
_BATCH_PIXELS = 1024 * 1024
"""Pixels of a batch where the user does not say how many tiles: more gain nothing on a CPU, and take memory."""


@dataclass(frozen=True)
class _Setup:
    """Everything that is settled before the first pixel is read."""

    info: RasterInfo
    """Of the bands that are used."""
    bands: tuple[int, ...]
    tiling: Tiling
    plan: TilePlan
    batch_size: int
    device: torch.device
    dtype: torch.dtype
    warnings: tuple[str, ...]


def plan_scene(
    segmenter: Segmenter, scene: Path | str, output: Path | str, options: SceneOptions | None = None
) -> ScenePlan:
    """What `predict_scene` would do; reads no pixel and writes nothing. Raises what it would raise for bad input."""
    options = options or SceneOptions()
    setup = _settle(segmenter, scene, Path(output), options)
    rows, width = setup.plan.rows.tile, setup.info.width
    pixel_bytes = setup.info.count * np.dtype(setup.info.dtype).itemsize + 1
    canvas = 0 if options.blend == "crop" else 4 * segmenter.task.num_classes
    return ScenePlan(
        scene=str(scene),
        output=Path(output),
        height=setup.info.height,
        width=width,
        bands=tuple(zip(segmenter.task.bands, setup.info.band_names, strict=True)),
        tile=setup.tiling.tile,
        overlap=setup.tiling.overlap,
        tiles=setup.plan.count,
        redundancy=setup.plan.redundancy,
        blend=options.blend,
        batch_size=setup.batch_size,
        device=str(setup.device),
        dtype=str(setup.dtype).removeprefix("torch."),
        buffer_bytes=rows * width * (pixel_bytes + canvas + _AHEAD),
        warnings=setup.warnings,
    )


def predict_scene(
    segmenter: Segmenter,
    scene: Path | str,
    output: Path | str,
    options: SceneOptions | None = None,
    *,
    progress: Progress | None = None,
) -> SceneResult:
    """Write the classes of a raster of any size as a GeoTIFF on the same grid.

    The output holds each class's `value`, and 255 where the scene has no data, with colours and class names. The scene
    is read once, window by window.

    Args:
        segmenter: in any mode, on any device; not changed.
        scene: whatever GDAL reads, also a URL.
        output: GeoTIFF to make; it appears when it is complete. Missing folders are made.
        options: None in it takes what suits the network and the machine.
        progress: called with how many of how many tiles are done.

    Raises:
        UsageError: the output exists already or cannot be written there; overlap and tile do not fit.
        DataError: the scene is missing, damaged, or lacks bands.
        MachineError: the disk is full, or the device is not there.
    """
    keep_heap()
    output, options = Path(output), options or SceneOptions()
    setup = _settle(segmenter, scene, output, options)
    network, dtype = ready_to_predict(segmenter, setup.device, setup.dtype)
    start = time.perf_counter()
    values = _pixel_values(segmenter.task)
    counts = np.zeros(256, np.int64)
    with (
        _open(scene, options, setup.bands) as raster,
        # Closed before the raster is: the reader's thread must not read on.
        closing(_ahead(read_tiles(raster, setup.plan, network))) as tiles,
        SceneWriter(output, setup.info, segmenter.task, cloud_optimized=options.format == "cog") as writer,
    ):

        def write(strip: Strip) -> None:
            rows = np.where(strip.valid, values[strip.classes], np.uint8(NODATA))
            np.add(counts, np.bincount(rows.ravel(), minlength=256), out=counts)
            writer.write(rows)

        scored = predict_tiles(
            network,
            tiles,
            batch_size=setup.batch_size,
            device=setup.device,
            dtype=dtype,
            least=setup.tiling.least,
        )
        counted = _counted(scored, setup.plan.count, progress)
        strips = blend_classes(counted, setup.plan, options.blend, segmenter.task.num_classes)
        _in_background(write, strips)
    seconds = time.perf_counter() - start
    pixels = setup.info.height * setup.info.width
    return SceneResult(
        output=output,
        height=setup.info.height,
        width=setup.info.width,
        valid_share=1 - int(counts[NODATA]) / pixels,
        areas=_areas(counts, segmenter.task, setup.info),
        tiles=setup.plan.count,
        seconds=seconds,
        megapixels_per_second=pixels / 1e6 / seconds,
        device=str(setup.device),
        dtype=str(dtype).removeprefix("torch."),
        warnings=setup.warnings,
    )


def _settle(segmenter: Segmenter, scene: Path | str, output: Path, options: SceneOptions) -> _Setup:
    task = segmenter.task
    with _open(scene, options, None) as raster:
        bands = match_bands(raster.info, task.bands, options.bands)
    with _open(scene, options, bands) as raster:
        info = raster.info
    check_output(output, str(scene), overwrite=options.overwrite)
    device = resolve_device(options.device)
    tiling = choose_tiling(segmenter.tile, options.tile, options.overlap)
    warnings = []
    if info.dtype != task.dtype:
        warnings.append(
            f"the pixels are {info.dtype}, the network was trained on {task.dtype}; they are scaled as those were"
        )
    return _Setup(
        info=info,
        bands=bands,
        tiling=tiling,
        plan=plan_tiles(info.height, info.width, tile=tiling.tile, overlap=tiling.overlap),
        batch_size=options.batch_size or max(1, _BATCH_PIXELS // tiling.tile**2),
        device=device,
        dtype=resolve_precision(options.dtype, device),
        warnings=tuple(warnings),
    )


def _open(scene: Path | str, options: SceneOptions, bands: tuple[int, ...] | None) -> Raster:
    return Raster(scene, bands=bands, nodata=options.nodata, zero_collar=options.zero_collar)


def _ahead(items: Iterable[Tile]) -> Generator[Tile]:
    """The items, made in a thread of their own, at most `_AHEAD` early."""
    iterator = iter(items)
    end = object()
    with ThreadPoolExecutor(1, "rsseg-reader") as thread:
        coming: deque[Future[Any]] = deque(thread.submit(next, iterator, end) for _ in range(_AHEAD))
        while (item := coming.popleft().result()) is not end:
            coming.append(thread.submit(next, iterator, end))
            yield item


def _in_background(write: Callable[[Strip], None], strips: Iterable[Strip]) -> None:
    """Write the strips in a thread of its own, at most `_AHEAD` late."""
    with ThreadPoolExecutor(1, "rsseg-writer") as thread:
        written: deque[Future[None]] = deque()
        for strip in strips:
            if len(written) == _AHEAD:
                written.popleft().result()
            written.append(thread.submit(write, strip))
        for pending in written:
            pending.result()


def _counted(scored: Iterable[Scored], total: int, progress: Progress | None) -> Iterator[Scored]:
    for done, item in enumerate(scored, start=1):
        yield item
        if progress is not None:
            progress(done, total)


def _pixel_values(task: Task) -> NDArray[np.uint8]:
    """Class index -> pixel value."""
    return np.array([c.value for c in task.classes], np.uint8)


def _areas(counts: NDArray[np.int64], task: Task, info: RasterInfo) -> tuple[ClassArea, ...]:
    """Per class; the determinant of the transform is the area of a pixel, also a turned or oblong one."""
    total = max(int(counts[:NODATA].sum()), 1)
    pixel_area = None
    if info.crs is not None and info.crs.is_projected:
        pixel_area = abs(info.transform.determinant) * info.crs.linear_units_factor[1] ** 2
    return tuple(
        ClassArea(
            name=c.name,
            value=c.value,
            pixels=int(counts[c.value]),
            share=int(counts[c.value]) / total,
            square_meters=None if pixel_area is None else int(counts[c.value]) * pixel_area,
            hectares=None if pixel_area is None else int(counts[c.value]) * pixel_area / 1e4,
        )
        for c in task.classes
    )
