"""Reference points of an accuracy assessment: draw a stratified random sample, read it back with its labels."""

import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyogrio
import shapely
from numpy.typing import NDArray
from pyogrio.errors import DataSourceError

from rsseg.errors import DataError, UsageError
from rsseg.evaluation.assessment import Assessment, Sample, Strata, allocate, assess, sample_size
from rsseg.fields import Result
from rsseg.files import check_outputs, replaced
from rsseg.raster import Raster, Window
from rsseg.vector.grid import Grid, PixelAreas, reproject
from rsseg.vector.read import attribute_text, find_field, find_layer, layer_crs, spatial_layers, vector_errors
from rsseg.vector.write import add_style, form_style

LAYER = "points"
TRUTH = "truth"
STRATUM = "stratum"
_ROWS = 1024
"""Rows of a raster in memory."""
_MOST_CLASSES = 255
_TABLE = 1 << 16
"""Entries of a table of counts."""
_MOST_POINTS = 1_000_000
"""Points of a sample."""
_LISTED = 5
"""Maximum number of points listed in an error."""


class Drawn(Result):
    """A written sample: points and valid pixels per stratum."""

    output: Path
    seed: int
    points: Mapping[str, int]
    pixels: Mapping[str, int]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class SampleSize:
    """Sample size: `per_stratum` points in each stratum, or as many as `target_se` requires.

    target_se          target standard error of the overall accuracy, a share
    expected_accuracy  expected user's accuracy of every stratum, for `target_se`
    least              minimum number of points per stratum, for `target_se`

    Raises `UsageError` if both or none are given, or a number is out of range.
    """

    per_stratum: int | None = None
    target_se: float | None = None
    expected_accuracy: float = 0.8
    least: int = 50

    def __post_init__(self) -> None:
        if (self.per_stratum is None) == (self.target_se is None):
            raise UsageError("give either --per-stratum or --target-se.")
        if min(self.per_stratum or 2, self.least) < 2:
            raise UsageError("a variance needs at least 2 points per stratum: raise --per-stratum or --least.")
        if self.target_se is not None and not 0 < self.target_se < 0.5:
            raise UsageError(f"--target-se {self.target_se}: give a share between 0 and 0.5, such as 0.01.")
        if not 0 < self.expected_accuracy < 1:
            raise UsageError(f"--expected-accuracy {self.expected_accuracy}: give a share between 0 and 1.")

    def of(self, pixels: Sequence[int]) -> tuple[int, ...]:
        """Points per stratum, given its pixels; never more than it has pixels."""
        wanted: Sequence[int] = [self.per_stratum or 0] * len(pixels)
        if self.target_se is not None:
            shares = [count / sum(pixels) for count in pixels]
            total = sample_size(shares, [self.expected_accuracy] * len(pixels), self.target_se)
            wanted = allocate(total, shares, self.least)
        return tuple(min(want, have) for want, have in zip(wanted, pixels, strict=True))


def draw_points(
    source: Path,
    output: Path,
    size: SampleSize,
    *,
    strata: Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Drawn:
    """Draw a stratified random sample of the valid pixels of a class raster and write it as points to label.

    Within a stratum pixels are drawn with equal probability and without replacement. Points lie at pixel centres, in
    random order, so that the order does not reveal the class. The raster is read twice, a band of rows at a time.

    Args:
        source: class raster, one band of integers.
        output: GeoPackage to write; its form in QGIS offers the class names for `truth` and hides the stratum.
        size: sample size.
        strata: raster of strata on the same grid; None uses the classes of the map.
        seed: seed of the random sample.
        overwrite: replace an existing file.

    Raises:
        UsageError: the output exists, its name does not end in .gpkg, or the sample is too large to be labeled.
        DataError: no valid pixel, more than one band, more values than a map has classes, rasters on different grids.
        MachineError: the file cannot be written.
    """
    if output.suffix.lower() != ".gpkg":
        raise UsageError(f"{output}: points are written to a GeoPackage. Give a name that ends in .gpkg.")
    with _opened(source, strata) as rasters:
        check_outputs([("--output", output)], rasters.files, overwrite=overwrite)
        counts = Counter[int]()
        for block in rasters.blocks():
            _add(counts, block.strata[block.valid])
            if strata is None and len(counts) > _MOST_CLASSES:
                raise DataError(f"{source}: more than {_MOST_CLASSES} values. Give a class raster.")
        if not counts:
            raise DataError(f"{source}: no pixel has a class. Give a class raster with data.")
        values = sorted(counts)
        wanted = dict(zip(values, size.of([counts[value] for value in values]), strict=True))
        if (total := sum(wanted.values())) > _MOST_POINTS:
            raise UsageError(
                f"the sample would have {total} points, more than {_MOST_POINTS}. Choose a smaller --per-stratum or "
                "--least, or a larger --target-se."
            )
        rng = np.random.default_rng(seed)
        ranks = {value: np.sort(rng.choice(counts[value], n, replace=False)) for value, n in wanted.items()}
        places = rng.permutation(np.concatenate([_places(block, ranks) for block in rasters.blocks()]))
        names, labels = rasters.class_names, rasters.stratum_names
        # Without names, the values of the map are the classes, unless other strata are given.
        choices = list(names.values()) or ([str(value) for value in values] if strata is None else [])
        _write(output, Grid(rasters.classes.info), places, choices)
    whole = [labels.get(value, str(value)) for value, n in wanted.items() if n == counts[value]]
    note = f"the sample holds every pixel of {', '.join(whole)}: there are no more than the points asked for."
    return Drawn(
        output=output,
        warnings=(note,) if whole else (),
        seed=seed,
        points={labels.get(value, str(value)): n for value, n in wanted.items()},
        pixels={labels.get(value, str(value)): counts[value] for value in values},
    )


def assess_points(
    source: Path, points: Path, *, field: str = TRUTH, strata: Path | None = None, layer: str | None = None
) -> Assessment:
    """Estimate accuracy and areas of a class raster from labeled points of a stratified random sample.

    Map class and stratum of each point are read from the rasters.

    Args:
        source: class raster.
        points: any vector file of points; a point without a label is left out, with a warning.
        field: attribute with the true class: a name or a value of the map.
        strata: raster of strata that the sample was drawn from; None uses the classes of the map.
        layer: layer of the file; None reads the only one, or `points`.

    Raises:
        DataError: no such layer or field, points off the map or on pixels without data, a truth that is not a class, a
            stratum with fewer than two labeled points.
    """
    with _opened(source, strata) as rasters:
        grid, info = Grid(rasters.classes.info), rasters.classes.info
        places, texts, ids = _read(points, layer, field, grid)
        inside = ((places >= 0) & (places < [info.height, info.width])).all(axis=1)
        _refuse(ids[~inside], f"{points}: {{}} lie outside {source}. Draw the points from this map.")
        labeled = np.array([bool(text) for text in texts], np.bool_)
        values = np.full((2, len(places)), -1, np.int64)
        has_data = np.zeros(len(places), np.bool_)
        pixels, areas, extents = Counter[int](), dict[int, float](), grid.pixel_areas()
        for block in rasters.blocks():
            _add(pixels, block.strata[block.valid])
            _add_areas(areas, block, extents)
            here = np.flatnonzero((places[:, 0] >= block.top) & (places[:, 0] < block.top + len(block.valid)))
            row, col = places[here, 0] - block.top, places[here, 1]
            has_data[here] = block.valid[row, col]
            values[:, here] = block.strata[row, col], block.classes[row, col]
        _refuse(ids[~has_data], f"{points}: {{}} lie on pixels of {source} without data. Remove them.")
        names, labels = rasters.class_names, rasters.stratum_names
    classes = sorted({*names, *areas})
    truth = _classes_of(texts, {names.get(v, str(v)): v for v in classes}, f"{points}, field {field!r}", ids)
    position = {value: i for i, value in enumerate(classes)}
    order = {value: i for i, value in enumerate(sorted(pixels))}
    total = sum(areas.values())
    sample = Sample(
        stratum=np.array([order[v] for v in values[0, labeled].tolist()], np.int64),
        mapped=np.array([position[v] for v in values[1, labeled].tolist()], np.int64),
        truth=np.array([position[v] for v in truth if v is not None], np.int64),
        area=np.ones(int(labeled.sum())) if extents is None else extents.at(*places[labeled].T),
    )
    result = assess(
        sample,
        Strata(tuple(labels.get(v, str(v)) for v in order), tuple(pixels[v] for v in order)),
        [names.get(v, str(v)) for v in classes],
        mapped_shares=[areas.get(v, 0.0) / total for v in classes],
        total_ha=None if extents is None else total / 1e4,
    )
    if labeled.all():
        return result
    missing = f"{int((~labeled).sum())} of {len(labeled)} points have no label and are left out. Label all points."
    return result.model_copy(update={"warnings": (missing, *result.warnings)})


class _Block(NamedTuple):
    """Rows of the rasters from `top` on: int64 values of strata and classes, and where both have data."""

    top: int
    strata: NDArray[np.int64]
    classes: NDArray[np.int64]
    valid: NDArray[np.bool_]


class _Rasters:
    """A class raster with its strata."""

    def __init__(self, classes: Raster, strata: Raster) -> None:
        self.classes, self.strata = classes, strata
        for raster in (classes, strata):
            if raster.info.count != 1 or np.dtype(raster.info.dtype).kind not in "ui":
                raise DataError(
                    f"{raster.name}: {raster.info.count} band(s) of {raster.info.dtype}. Give a class raster: one band "
                    "of integers."
                )
        ours, theirs = classes.info, strata.info
        if any(getattr(ours, key) != getattr(theirs, key) for key in ("height", "width", "transform", "crs")):
            raise DataError(f"{strata.name} is not on the grid of {classes.name}. Warp it to that grid.")
        self.class_names, self.stratum_names = classes.value_names, strata.value_names

    @property
    def files(self) -> tuple[str, ...]:
        """All files that the rasters consist of."""
        return (*self.classes.files, *self.strata.files)

    def blocks(self) -> Iterator[_Block]:
        """Bands of rows from top to bottom."""
        height, width = self.classes.info.height, self.classes.info.width
        for top in range(0, height, _ROWS):
            window = Window(top, 0, min(_ROWS, height - top), width)
            values, valid = self.classes.read(window)
            classes = values[0].astype(np.int64)
            if self.strata is self.classes:
                yield _Block(top, classes, classes, valid)
            else:
                strata, known = self.strata.read(window)
                yield _Block(top, strata[0].astype(np.int64), classes, valid & known)


@contextmanager
def _opened(source: Path, strata: Path | None) -> Iterator[_Rasters]:
    with ExitStack() as stack:
        classes = stack.enter_context(Raster(source))
        yield _Rasters(classes, classes if strata is None else stack.enter_context(Raster(strata)))


def _counted(values: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct values and their numbers; sorted only where they are far apart, as that takes ten times as long."""
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    if high - low >= _TABLE:
        return np.unique(values, return_counts=True)
    numbers = np.bincount(values - low)
    found = np.flatnonzero(numbers)
    return found + low, numbers[found]


def _add(counts: Counter[int], values: NDArray[np.int64]) -> None:
    found, numbers = _counted(values)
    counts.update(dict(zip(found.tolist(), numbers.tolist(), strict=True)))


def _add_areas(areas: dict[int, float], block: _Block, extents: PixelAreas | None) -> None:
    """Area of each class in a block, square metres, or pixels for a map without coordinates."""
    found, _ = _counted(block.classes[block.valid])
    if len(found) > _MOST_CLASSES:
        raise DataError(f"the map has {len(found)} values in {len(block.valid)} rows. Give a class raster.")
    positions, indices = block.classes, found
    if len(found) and (found[0] < 0 or found[-1] >= _MOST_CLASSES):
        positions, indices = np.searchsorted(found, block.classes), np.arange(len(found))
    places = np.where(block.valid, positions, _MOST_CLASSES).astype(np.uint8)
    sums = np.bincount(places.ravel(), minlength=256) if extents is None else extents.totals(places, block.top, 0)[1]
    for value, amount in zip(found.tolist(), sums[indices].tolist(), strict=True):
        areas[value] = areas.get(value, 0.0) + amount


def _places(block: _Block, ranks: dict[int, NDArray[np.int64]]) -> NDArray[np.int64]:
    """(n, 3) row, column and stratum of the drawn pixels of a block; takes the block's pixels off the ranks."""
    found = [np.empty((0, 3), np.int64)]
    for value, drawn in ranks.items():
        pixels = np.flatnonzero((block.strata == value) & block.valid)
        here = pixels[drawn[(drawn >= 0) & (drawn < len(pixels))]]
        ranks[value] = drawn - len(pixels)
        row, col = np.divmod(here, block.strata.shape[1])
        found.append(np.stack([row + block.top, col, np.full_like(row, value)], axis=1))
    return np.concatenate(found)


def _write(output: Path, grid: Grid, places: NDArray[np.int64], choices: Sequence[str]) -> None:
    centres = grid.to_ground(places[:, 1::-1].astype(np.float64) + 0.5)
    empty = np.full(len(places), None, object)
    with replaced(output, sqlite3.Error, DataSourceError, ending=output.suffix) as temporary:
        output.parent.mkdir(parents=True, exist_ok=True)
        pyogrio.raw.write(
            temporary,
            geometry=shapely.to_wkb(shapely.points(centres)),
            field_data=[np.arange(1, len(places) + 1), places[:, 0], places[:, 1], places[:, 2], empty, empty],
            fields=["id", "row", "col", STRATUM, TRUTH, "note"],
            layer=LAYER,
            driver="GPKG",
            geometry_type="Point",
            crs=None if grid.crs is None else grid.crs.to_wkt(),
        )
        add_style(temporary, LAYER, form_style({TRUTH: choices} if choices else {}, hidden=("row", "col", STRATUM)))


def _read(
    points: Path, layer: str | None, field: str, grid: Grid
) -> tuple[NDArray[np.int64], list[str], NDArray[np.int64]]:
    """(n, 2) row and column, labels as text ("" for none) and feature ids."""
    if layer is None and len(spatial_layers(points)) > 1:
        layer = LAYER
    layer = find_layer(points, layer)
    find_field(points, layer, field, "--field")
    with vector_errors(points):
        meta, fids, geometry, columns = pyogrio.raw.read(points, layer=layer, columns=[field], return_fids=True)
        shapes = shapely.from_wkb(geometry)
    usual = (shapely.get_type_id(shapes) == 0) & ~shapely.is_empty(shapes)
    _refuse(fids[~usual], f"{points}: {{}} are not points. Give one point per feature.")
    where = shapely.get_coordinates(shapes)
    crs = layer_crs(points, meta["crs"])
    if crs is not None and grid.crs is not None:
        where = reproject(where, crs, grid.crs, str(points))
    places = np.floor(grid.to_pixels(where)[:, ::-1]).astype(np.int64)
    return places, [attribute_text(value) for value in columns[0]], fids


def _classes_of(
    texts: Sequence[str], classes: Mapping[str, int], where: str, ids: NDArray[np.int64]
) -> list[int | None]:
    """Class value of each label, by name or by value; None without a label."""
    known = {str(value): value for value in classes.values()} | {name.casefold(): v for name, v in classes.items()}
    truth = [known.get(text.casefold()) if text else None for text in texts]
    wrong = [(i, text) for i, (text, value) in enumerate(zip(texts, truth, strict=True)) if text and value is None]
    if wrong:
        unknown = ", ".join(repr(text) for text in dict.fromkeys(text for _, text in wrong))
        _refuse(ids[[i for i, _ in wrong]], f"{where}: {{}} have {unknown}; the classes are {', '.join(classes)}.")
    return truth


def _refuse(ids: NDArray[np.int64], message: str) -> None:
    if len(ids):
        listed = ", ".join(str(fid) for fid in ids[:_LISTED].tolist()) + (", ..." if len(ids) > _LISTED else "")
        raise DataError(message.format(f"{len(ids)} feature(s) ({listed})"))
