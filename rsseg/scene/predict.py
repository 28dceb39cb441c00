"""The pipeline of a scene: reader thread -> tiles -> network -> merge -> writer thread, in bounded memory."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsseg.errors import MachineError
from rsseg.inference.blend import Strip, Tile
from rsseg.inference.device import HeapGuard
from rsseg.inference.predict import predict_strips
from rsseg.inference.tiling import Panel, Span
from rsseg.methods.base import Segmenter
from rsseg.raster import Raster
from rsseg.scene.identity import TAG, identify, identify_files
from rsseg.scene.options import ClassArea, Progress, SceneOptions, ScenePlan, SceneResult
from rsseg.scene.plan import Ready, Setup, settle
from rsseg.scene.share import ALONE, Share, in_order
from rsseg.scene.source import read_tiles
from rsseg.scene.striplog import LoggedStrip, StripLog
from rsseg.scene.writer import SceneWriter
from rsseg.task import NODATA, Task
from rsseg.vector.aoi import Region, read_region
from rsseg.vector.grid import Grid

_TILES_AHEAD = 2
"""Tiles that the reader may be ahead of the network."""
_STRIPS_BEHIND = 1
"""Strips that the writer may be behind the network."""


def plan_scene(
    segmenter: Segmenter, scene: Path | str, output: Path | str, options: SceneOptions | None = None
) -> ScenePlan:
    """What `predict_scene` would do; reads no pixel and writes nothing. Raises what it would raise for bad input."""
    options = options or SceneOptions()
    return settle(Ready.of(segmenter, options), scene, Path(output), options).describe()


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
        MachineError: the disk is full, memory does not suffice, or the device is not there.
    """
    options = options or SceneOptions()
    result = run(settle(Ready.of(segmenter, options), scene, Path(output), options), progress=progress)
    assert result is not None  # for the type checker: this process is the only one
    return result


def run(setup: Setup, *, progress: Progress | None = None, share: Share = ALONE) -> SceneResult | None:
    """Do what is settled.

    Args:
        setup: see there.
        progress: called with how many tiles of how many are done; those of this process.
        share: this process's part; several need `Share.of_scene` around this.

    Returns:
        What was written; None from all processes but the main one.
    """
    start = time.perf_counter()
    info, task, options = setup.info, setup.network.task, setup.options
    with ExitStack() as stack:
        raster = stack.enter_context(setup.open())
        region = None if options.aoi is None else read_region(options.aoi, info)
        identity = identity_of(setup, raster)
        log = None
        if options.resume or share.count > 1:
            log = stack.enter_context(StripLog(share.log(setup.output), identity))
        # Entered in reverse: the class raster, which stands for all of them, is the last to appear.
        writers = [
            stack.enter_context(
                SceneWriter(name, info, product, cloud_optimized=options.format == "cog", tags={TAG: identity})
            )
            for name, product in setup.products
            if share.is_main
        ]
        sink = _Sink(setup, writers)
        # Shared rows are written when all are there: an output is written panel by panel, each from top to bottom.
        at_once = share.count == 1
        rows = share.rows(len(setup.plan.rows.origins))
        done = [rows.start] * len(setup.panels)
        for strip in log.strips() if log is not None else ():
            done[strip.panel] = strip.row + 1
            if at_once:
                sink.write(strip)
        resumed = sum(row - rows.start for row in done) / max(rows.length * len(setup.panels), 1)
        heap = HeapGuard(setup.trim_above)
        count = _tile_counter(progress, setup, rows.length, [Span(row, rows.stop) for row in done])

        def report() -> None:
            heap.check()
            count()

        for index, panel in enumerate(setup.panels):
            strips = _compute(setup, raster, region, panel, Span(done[index], rows.stop), report)

            def write(numbered: tuple[int, Strip], index: int = index, panel: Panel = panel) -> None:
                strip = sink.finished(index, panel, *numbered)
                if log is not None:
                    log.append(strip)
                if at_once:
                    sink.write(strip)

            _in_background(write, strips)
        if share.is_main and log is not None and not at_once:
            paths = share.wait(setup.output)
            sink.write_shared(log, [stack.enter_context(StripLog(path, identity, anew=False)) for path in paths])
    if not share.is_main:
        share.hand_over(setup.output)
        return None
    if options.resume:
        share.log(setup.output).unlink(missing_ok=True)
    seconds = time.perf_counter() - start
    pixels = info.height * info.width
    return SceneResult(
        output=setup.output,
        height=info.height,
        width=info.width,
        valid_share=1 - int(sink.counts[NODATA]) / pixels,
        areas=_areas(sink.counts, task, Grid(info)),
        tiles=setup.tiles,
        seconds=seconds,
        megapixels_per_second=pixels / 1e6 / seconds,
        device=str(setup.compute.device),
        dtype=str(setup.compute.dtype).removeprefix("torch."),
        resumed=resumed,
        extra_outputs=tuple(name for name, _ in setup.products[1:]),
        warnings=setup.warnings,
    )


def identity_of(setup: Setup, raster: Raster) -> str:
    """Hash of all that the outputs are made from."""
    area = identify_files([setup.options.aoi]) if setup.options.aoi is not None else ""
    return identify(identify_files(raster.files), setup.model, area, settings=setup.settings())


class _Sink:
    """Takes finished strips: counts their classes and hands them to the writers."""

    def __init__(self, setup: Setup, writers: list[SceneWriter]) -> None:
        self._setup, self._writers = setup, writers
        self._values = _pixel_values(setup.network.task)
        self.counts = np.zeros(256, np.int64)

    def finished(self, index: int, panel: Panel, row: int, strip: Strip) -> LoggedStrip:
        """The strip as pixels of each product, cut to what the panel keeps."""
        kept, decision = panel.kept.area, strip.decision
        valid = strip.valid[:, kept]
        arrays: list[NDArray[Any]] = [np.where(valid, self._values[decision.classes[:, kept]], np.uint8(NODATA))[None]]
        if decision.confidence is not None:
            arrays.append(np.where(valid, decision.confidence[:, kept], np.uint8(NODATA))[None])
        if decision.probabilities is not None:
            shares = decision.probabilities[:, kept].transpose(2, 0, 1)
            arrays.append(np.where(valid, shares, shares.dtype.type(self._setup.products[-1][1].nodata)))
        return LoggedStrip(index, row, arrays)

    def write(self, strip: LoggedStrip) -> None:
        np.add(self.counts, np.bincount(strip.arrays[0].ravel(), minlength=256), out=self.counts)
        left = self._setup.panels[strip.panel].target
        for writer, (_, product), array in zip(self._writers, self._setup.products, strip.arrays, strict=True):
            writer.write(array.astype(product.dtype, copy=False), left)

    def write_shared(self, own: StripLog, others: Sequence[StripLog]) -> None:
        """Put the parts of all processes together."""
        for strip in in_order([own, *others], len(self._setup.panels)):
            self.write(strip)
        if self.counts.sum() != self._setup.info.height * self._setup.info.width:
            raise MachineError(f"{self._setup.output}: rows of another process are missing. Start again.")


def _compute(
    setup: Setup,
    raster: Raster,
    region: Region | None,
    panel: Panel,
    wanted: Span,
    report: Callable[[], None],
) -> Generator[tuple[int, Strip]]:
    """The strips of these rows of tiles of a panel, numbered."""
    rows = panel.plan.rows
    if not wanted.length:
        return
    first = wanted.start
    if setup.options.blend != "crop":
        # Tiles above still weigh in the rows that they share.
        first = next(i for i, top in enumerate(rows.origins) if top + rows.tile > rows.origins[wanted.start])
    span = Span(first, wanted.stop)
    # Closed before the raster is: the reader's thread must not read on.
    with closing(_ahead(read_tiles(raster, panel, setup.network, rows=span, region=region))) as tiles:
        strips = predict_strips(
            setup.network,
            tiles,
            panel.plan,
            setup.options.blend,
            setup.compute,
            outputs=setup.wanted,
            report=report,
        )
        yield from ((row, strip) for row, strip in enumerate(strips, start=first) if row >= wanted.start)


def _ahead(items: Iterable[Tile]) -> Generator[Tile]:
    """The items, made in a thread of their own, at most `_TILES_AHEAD` early."""
    iterator = iter(items)
    end = object()
    with ThreadPoolExecutor(1, "rsseg-reader") as thread:
        coming: deque[Future[Any]] = deque(thread.submit(next, iterator, end) for _ in range(_TILES_AHEAD))
        while (item := coming.popleft().result()) is not end:
            coming.append(thread.submit(next, iterator, end))
            yield item


def _in_background(write: Callable[[tuple[int, Strip]], None], strips: Generator[tuple[int, Strip]]) -> None:
    """Write the strips in a thread of its own, at most `_STRIPS_BEHIND` late."""
    with ThreadPoolExecutor(1, "rsseg-writer") as thread, closing(strips):
        written: deque[Future[None]] = deque()
        for strip in strips:
            if len(written) == _STRIPS_BEHIND:
                written.popleft().result()
            written.append(thread.submit(write, strip))
        for pending in written:
            pending.result()


def _tile_counter(progress: Progress | None, setup: Setup, own: int, missing: Sequence[Span]) -> Callable[[], None]:
    """Counts tiles, given how many rows of them are this process's, and which of each panel are still missing."""
    if progress is None:
        return lambda: None
    per_row = [len(panel.plan.cols.origins) for panel in setup.panels]
    total = own * sum(per_row)
    finished = total - sum(rows.length * tiles for rows, tiles in zip(missing, per_row, strict=True))

    def report() -> None:
        nonlocal finished
        finished = min(finished + 1, total)
        progress(finished, total)

    return report


def _pixel_values(task: Task) -> NDArray[np.uint8]:
    """Class index -> pixel value."""
    return np.array([c.value for c in task.classes], np.uint8)


def _areas(counts: NDArray[np.int64], task: Task, grid: Grid) -> tuple[ClassArea, ...]:
    total = max(int(counts[:NODATA].sum()), 1)
    pixel_area = grid.pixel_area
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
