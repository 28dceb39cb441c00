"""The pipeline of a scene: reader thread -> tiles -> network -> blending -> writer thread, in bounded memory."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rasterio
from numpy.typing import NDArray

from rsseg.errors import MachineError, UsageError
from rsseg.inference.blend import Strip, Tile
from rsseg.inference.machine import HeapGuard, memory_errors
from rsseg.inference.predict import predict_strips
from rsseg.inference.tiling import Span
from rsseg.raster import Raster
from rsseg.scene.memory import OUT_OF_MEMORY, join_networks, prepare_network
from rsseg.scene.options import ClassArea, Progress, SceneOptions, SceneResult
from rsseg.scene.plan import PreparedScene, prepare_scene
from rsseg.scene.share import ALONE, LoggedStrip, Share, StripLog, merge_logs
from rsseg.scene.source import TAG, read_tiles
from rsseg.scene.writer import SceneWriter, draw_preview
from rsseg.task import NODATA, Task
from rsseg.vector.grid import Grid

if TYPE_CHECKING:
    from rsseg.methods.base import Segmenter

_TILES_AHEAD = 2
"""Tiles that the reader may read ahead."""
_STRIPS_BEHIND = 1
"""Strips that the writer may be behind the network."""


def predict_scene(
    segmenter: "Segmenter | Sequence[Segmenter]",
    scene: Path | str,
    output: Path | str,
    options: SceneOptions | None = None,
    *,
    progress: Progress | None = None,
) -> SceneResult:
    """Write the classes of a raster of any size as a GeoTIFF on the same grid, and the other outputs of the options.

    The output holds each class's `value`, and 255 where the scene has no data, with colours and class names. The scene
    is read once, window by window.

    Args:
        segmenter: in any mode, on any device; not changed. Several: the mean of their probabilities, each at its own
            temperature; each tile is read once.
        scene: anything GDAL can open, also a URL.
        output: GeoTIFF to write; it appears when it is complete. Missing folders are created.
        options: see `SceneOptions`.
        progress: called with the number of finished tiles and of all tiles.

    Raises:
        UsageError: an output exists already, would replace an input or cannot be written; overlap and tile do not fit;
            applicability, which a network without its model file cannot judge; networks of different tasks.
        DataError: the scene is missing, damaged, or lacks bands.
        MachineError: the disk is full, there is too little memory, or the device does not exist.
    """
    options = options or SceneOptions()
    if options.applicability:
        raise UsageError(
            "applicability needs the training images of a model file: see `rsseg.scene.memory.prepare_model`."
        )
    segmenters = segmenter if isinstance(segmenter, Sequence) else [segmenter]
    networks = [(f"network {n}", prepare_network(each, options)) for n, each in enumerate(segmenters, start=1)]
    prepared = prepare_scene(join_networks(networks, options), scene, Path(output), options)
    result = predict_prepared(prepared, progress=progress)
    assert result is not None  # for the type checker: this process is the only one
    return result


def predict_prepared(
    prepared: PreparedScene, *, progress: Progress | None = None, share: Share = ALONE
) -> SceneResult | None:
    """Run a planned prediction.

    Args:
        prepared: the plan.
        progress: called with the number of finished tiles and of all tiles of this process.
        share: this process's part; several processes need `Share.of_scene` around this.

    Returns:
        The result; None from all processes but the main one.
    """
    start = time.perf_counter()
    with memory_errors(OUT_OF_MEMORY):
        sink = _write_rasters(prepared, progress, share)
    if sink is None:
        return None
    count, extra = make_extras(prepared)
    seconds = time.perf_counter() - start
    info = prepared.info
    pixels = info.height * info.width
    return SceneResult(
        output=prepared.output,
        height=info.height,
        width=info.width,
        valid_share=1 - int(sink.counts[NODATA]) / pixels,
        areas=sink.class_areas(prepared.network.task),
        tiles=prepared.tiles,
        seconds=seconds,
        megapixels_per_second=pixels / 1e6 / seconds,
        device=prepared.network.device,
        dtype=prepared.network.dtype,
        engine=prepared.network.engine,
        quantization=prepared.quantization,
        resumed=sink.resumed,
        polygons=count,
        extra_outputs=(*(name for name, _ in prepared.products[1:]), *extra),
        warnings=prepared.warnings,
    )


def make_extras(prepared: PreparedScene, *, only_missing: bool = False) -> tuple[int | None, tuple[Path, ...]]:
    """Write polygons and preview of a finished class raster; returns the number of polygons and the files.

    Raises:
        MachineError: a file cannot be written.
    """
    options, task, count = prepared.options, prepared.network.task, None
    polygons, preview = prepared.polygons, prepared.preview
    if polygons is not None and not (only_missing and polygons.exists()):
        from rsseg.vector.write import write_polygons

        count = write_polygons(
            prepared.output,
            task,
            polygons,
            min_area=options.min_area,
            simplify=options.simplify,
            overwrite=options.overwrite,
        )
    if preview is not None and not (only_missing and preview.exists()):
        draw_preview(prepared.scene, prepared.output, task, preview)
    return count, tuple(file for file in (polygons, preview) if file is not None)


def _write_rasters(prepared: PreparedScene, progress: Progress | None, share: Share) -> "_Sink | None":
    """Write all rasters; None from all processes but the main one."""
    options = prepared.options
    with ExitStack() as stack:
        rasters = [stack.enter_context(prepared.open()) for _ in range(prepared.decoders)]
        # GDAL's cache is global: between two reads the writer would fill the default one, 5 % of the memory.
        stack.enter_context(rasterio.Env(GDAL_CACHEMAX=rasters[0].cache_bytes))
        identity = prepared.identity()
        # Strips of differently divided panels cannot be used, although they hold the same pixels.
        log_identity = f"{identity} {len(prepared.panels)}"
        log = None
        if options.resume or share.count > 1:
            log = stack.enter_context(StripLog(share.log(prepared.output), log_identity))
        # Entered in reverse: the class raster, which stands for all of them, is the last to appear.
        writers = [
            stack.enter_context(
                SceneWriter(name, prepared.info, product, cloud_optimized=options.format == "cog", tags={TAG: identity})
            )
            for name, product in prepared.products
            if share.is_main
        ]
        sink = _Sink(prepared, writers)
        # Shared rows are written when all are there: an output is written panel by panel, each from top to bottom.
        at_once = share.count == 1
        rows = share.rows(len(prepared.plan.rows.origins))
        done = [rows.start] * len(prepared.panels)
        for strip in log.strips() if log is not None else ():
            done[strip.panel] = strip.row + 1
            if at_once:
                sink.write(strip)
        sink.resumed = sum(row - rows.start for row in done) / max(rows.length * len(prepared.panels), 1)
        heap = HeapGuard(prepared.trim_above)
        count = _tile_counter(progress, prepared, rows.length, [Span(row, rows.stop) for row in done])

        def report() -> None:
            heap.check()
            count()

        def write(numbered: tuple[int, int, Strip]) -> None:
            strip = sink.finished(*numbered)
            if log is not None:
                log.append(strip)
            if at_once:
                sink.write(strip)

        _in_background(write, _compute(prepared, rasters, [Span(row, rows.stop) for row in done], report))
        if share.is_main and log is not None and not at_once:
            paths = share.wait(prepared.output)
            sink.write_shared(log, [stack.enter_context(StripLog(path, log_identity, anew=False)) for path in paths])
    if not share.is_main:
        share.hand_over(prepared.output)
        return None
    if options.resume:
        share.log(prepared.output).unlink(missing_ok=True)
    return sink


class _Sink:
    """Count the classes of finished strips and pass the strips to the writers.

    counts: int64 (256,), pixels of each value
    resumed: share of the rows that an earlier run had finished
    """

    def __init__(self, prepared: PreparedScene, writers: list[SceneWriter]) -> None:
        self._prepared, self._writers = prepared, writers
        self._values = np.full(256, NODATA, np.uint8)  # also for index 255: the network is not sure
        self._values[: prepared.network.task.num_classes] = [c.value for c in prepared.network.task.classes]
        self._pixel_areas = Grid(prepared.info).pixel_areas()
        self._areas = np.zeros(256)
        self._row = [0] * len(prepared.panels)
        self.counts = np.zeros(256, np.int64)
        self.resumed = 0.0

    def finished(self, panel: int, row: int, strip: Strip) -> LoggedStrip:
        """The strip as pixels of each product, cut to the columns that the panel keeps."""
        kept, decision = self._prepared.panels[panel].kept.area, strip.decision
        valid = strip.valid[:, kept]
        arrays: list[NDArray[Any]] = [np.where(valid, self._values[decision.classes[:, kept]], np.uint8(NODATA))[None]]
        layers = (decision.confidence, decision.applicability, decision.disagreement)
        arrays += [np.where(valid, layer[:, kept], np.uint8(NODATA))[None] for layer in layers if layer is not None]
        if decision.probabilities is not None:
            shares = decision.probabilities[:, kept].transpose(2, 0, 1)
            arrays.append(np.where(valid, shares, shares.dtype.type(self._prepared.products[-1][1].nodata)))
        return LoggedStrip(panel, row, arrays)

    def write(self, strip: LoggedStrip) -> None:
        """Write a strip, the next one of its panel."""
        left, values = self._prepared.panels[strip.panel].target, strip.arrays[0][0]
        if self._pixel_areas is None:
            self.counts += np.bincount(values.ravel(), minlength=256)
        else:
            counts, areas = self._pixel_areas.totals(values, self._row[strip.panel], left)
            self.counts += counts
            self._areas += areas
            self._row[strip.panel] += len(values)
        for writer, (_, product), array in zip(self._writers, self._prepared.products, strip.arrays, strict=True):
            writer.write(array.astype(product.dtype, copy=False), left)

    def write_shared(self, own: StripLog, others: Sequence[StripLog]) -> None:
        """Write the strips of all processes."""
        for strip in merge_logs([own, *others], len(self._prepared.panels)):
            self.write(strip)
        if self.counts.sum() != self._prepared.info.height * self._prepared.info.width:
            raise MachineError(f"{self._prepared.output}: rows of another process are missing. Start again.")

    def class_areas(self, task: Task) -> tuple[ClassArea, ...]:
        """Area of each class, in the order of the task's classes."""
        return ClassArea.table(task, self.counts, None if self._pixel_areas is None else self._areas)


def _compute(
    prepared: PreparedScene,
    rasters: Sequence[Raster],
    wanted: Sequence[Span],
    report: Callable[[], None],
) -> Generator[tuple[int, int, Strip]]:
    """Yield the strips of these rows of tiles of each panel, with the numbers of panel and row."""
    axis = prepared.plan.rows

    def computed(rows: Span) -> Span:
        if prepared.options.blend == "crop" or not rows.length:
            return rows
        # Tiles above contribute to the rows that they share.
        top = axis.origins[rows.start]
        return Span(next(i for i, origin in enumerate(axis.origins) if origin + axis.tile > top), rows.stop)

    spans = [computed(rows) for rows in wanted]
    tiles = read_tiles(rasters, prepared.panels, prepared.network, rows=spans, region=prepared.region)
    # Close before the rasters, so that the reader's threads stop.
    with closing(read_ahead(tiles)) as coming:
        strips = predict_strips(
            prepared.network,
            coming,
            [panel.plan for panel in prepared.panels],
            prepared.options.blend,
            prepared.compute,
            outputs=prepared.pixel_outputs,
            report=report,
        )
        for panel, own in groupby(strips, key=itemgetter(0)):
            for row, (_, strip) in enumerate(own, start=spans[panel].start):
                if row >= wanted[panel].start:
                    yield panel, row, strip


def read_ahead(items: Iterable[Tile]) -> Generator[Tile]:
    """Yield the items, made in a background thread at most `_TILES_AHEAD` early."""
    iterator = iter(items)
    end = object()
    with ThreadPoolExecutor(1, "rsseg-reader") as thread:
        coming: deque[Future[Any]] = deque(thread.submit(next, iterator, end) for _ in range(_TILES_AHEAD))
        while (item := coming.popleft().result()) is not end:
            coming.append(thread.submit(next, iterator, end))
            yield item


def _in_background(write: Callable[[tuple[int, int, Strip]], None], strips: Generator[tuple[int, int, Strip]]) -> None:
    """Write the strips in a background thread, at most `_STRIPS_BEHIND` late."""
    with ThreadPoolExecutor(1, "rsseg-writer") as thread, closing(strips):
        written: deque[Future[None]] = deque()
        for strip in strips:
            if len(written) == _STRIPS_BEHIND:
                written.popleft().result()
            written.append(thread.submit(write, strip))
        for pending in written:
            pending.result()


def _tile_counter(
    progress: Progress | None, prepared: PreparedScene, own: int, missing: Sequence[Span]
) -> Callable[[], None]:
    """Count finished tiles, given the number of this process's rows of tiles and the missing rows of each panel."""
    if progress is None:
        return lambda: None
    per_row = [len(panel.plan.cols.origins) for panel in prepared.panels]
    total = own * sum(per_row)
    finished = total - sum(rows.length * tiles for rows, tiles in zip(missing, per_row, strict=True))

    def report() -> None:
        nonlocal finished
        finished = min(finished + 1, total)
        progress(finished, total)

    return report
