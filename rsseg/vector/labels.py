"""Labels as a vector file: features with a class attribute, rasterized on the grid of a scene."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyogrio
import shapely
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.features import rasterize
from rasterio.transform import Affine

from rsseg.errors import DataError, UsageError
from rsseg.raster import RasterInfo, Window
from rsseg.vector.grid import Grid
from rsseg.vector.read import (
    MARGIN,
    Placed,
    Shapes,
    attribute_text,
    buffered,
    find_field,
    find_layer,
    layer_crs,
    layer_fields,
    nearest,
    place,
    polygon_parts,
    single_parts,
    vector_errors,
)

_LISTED = 20
"""Maximum number of feature ids in a message."""
_MOST_CORNERS = 1024
"""Polygons with more corners are cut."""
_LEAST_OVERLAP = 1.0
"""Pixels; smaller overlaps come from drawing without snapping."""


class Issue(NamedTuple):
    """A defect of the labels, which is not an error unless asked for."""

    reason: str
    fids: tuple[int, ...]
    """Ids of the features, as QGIS shows them with `$id`."""

    def text(self) -> str:
        """One line with the first ids."""
        if not self.fids:
            return self.reason
        return f"{len(self.fids)} feature(s) {self.reason}: {listed(self.fids)}"


def listed(fids: Sequence[int]) -> str:
    """The first ids of features."""
    return f"{', '.join(map(str, fids[:_LISTED]))}{', ...' if len(fids) > _LISTED else ''}"


@dataclass(frozen=True)
class Burning:
    """How features become pixels.

    touched  all pixels that a polygon touches get its class; otherwise those whose centre lies inside
    buffer   metres by which polygons are widened, or narrowed if negative
    width    metres, of lines, and of the circles that replace points
    """

    touched: bool = False
    buffer: float = 0.0
    width: float | None = None


@dataclass(frozen=True)
class Features:
    """The features of a layer that can be drawn.

    path     vector file
    shapes   valid points, lines and polygons of one part each
    owner    int64 (n,), position in the next three of the feature that a shape belongs to
    fids     int64 (m,), ids
    values   (m,), text of the class attribute; "" without a value
    splits   (m,), text of the attribute that names the split; None if there is none
    crs      of the shapes
    issues   what is wrong with them
    """

    path: Path
    shapes: Shapes
    owner: NDArray[np.int64]
    fids: NDArray[np.int64]
    values: tuple[str, ...]
    splits: tuple[str, ...] | None
    crs: CRS | None
    issues: tuple[Issue, ...]

    def fids_of(self, features: NDArray[Any]) -> tuple[int, ...]:
        """Ids of features given by position or by a mask."""
        return tuple(np.unique(self.fids[features]).tolist())

    def classes(self, known: Mapping[str, int]) -> tuple[NDArray[np.int64], tuple[Issue, ...]]:
        """Class index of each feature, int64 (m,), -1 without a value.

        Args:
            known: name, or number as text -> class index. Case matters only if two names differ by nothing else.

        Raises:
            DataError: values without a class; the message gives the nearest names and the features.
        """
        folded = {name.casefold(): index for name, index in known.items()}
        folded |= dict.fromkeys((n for n in folded if len({i for k, i in known.items() if k.casefold() == n}) > 1), -2)
        found = np.array([_class_of(value, known, folded) for value in self.values], np.int64)
        if unknown := list(dict.fromkeys(v for v, i in zip(self.values, found, strict=True) if i == -2)):
            parts = []
            for value in unknown[:5]:
                fids = self.fids_of(np.array([v == value for v in self.values]))
                parts.append(f"{value!r} (feature(s) {listed(fids)}; {nearest(value, list(known))})")
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise DataError(
                f"{self.path}: {len(unknown)} value(s) without a class: {', '.join(parts)}{more}. Add a class to the "
                "class file, name them in `also_names` of a class, or in `ignore_names`."
            )
        without = found == -1
        issues = (Issue("without a class value, not drawn", self.fids_of(without)),) if without.any() else ()
        return found, issues


def _class_of(value: str, known: Mapping[str, int], folded: Mapping[str, int]) -> int:
    if not value:
        return -1
    return known.get(value, folded.get(value.casefold(), -2))


def read_features(
    path: Path,
    layer: str | None,
    field: str | None,
    *,
    crs: str | None = None,
    split_field: str | None = None,
    width: float | None = None,
) -> Features:
    """Read a layer of labels.

    Args:
        path: any vector file that GDAL reads.
        layer: its name; None takes the only one.
        field: attribute with the class.
        crs: coordinate system, for a file that states none.
        split_field: attribute with the split.
        width: metres, of points and lines; None accepts only polygons.

    Raises:
        DataError: the file cannot be read, has no such layer or field, or no usable feature.
        UsageError: points or lines without a width, or `crs` for a file that states another one.
    """
    layer = find_layer(path, layer)
    if field is None:
        known = ", ".join(layer_fields(path, layer)) or "none"
        raise UsageError(f"--field is missing: which attribute of {path} holds the class? There are {known}.")
    fields = [find_field(path, layer, field, "--field")]
    if split_field is not None:
        fields.append(find_field(path, layer, split_field, "--split-field"))
    with vector_errors(path):
        about, fids, wkb, columns = pyogrio.raw.read(
            path, layer=layer, columns=list(dict.fromkeys(fields)), force_2d=True, return_fids=True
        )
        shapes = shapely.from_wkb(wkb)
    texts = {name: tuple(map(attribute_text, column)) for name, column in zip(about["fields"], columns, strict=True)}
    shapes, owner, issues = _drawable(shapes, np.asarray(fids))
    if not len(shapes):
        reasons = "; ".join(issue.text() for issue in issues) or "the layer is empty"
        raise DataError(f"{path} (layer {layer}): no feature can be drawn: {reasons}.")
    thin = np.unique(owner[shapely.get_dimensions(shapes) < 2])
    if width is None and len(thin):
        raise UsageError(
            f"{path}: {len(thin)} feature(s) are points or lines ({listed(np.asarray(fids)[thin].tolist())}). Give "
            "their width on the ground with --width METRES."
        )
    return Features(
        path=path,
        shapes=shapes,
        owner=owner,
        fids=np.asarray(fids, np.int64),
        values=texts[field],
        splits=None if split_field is None else texts[split_field],
        crs=_crs_of(path, about["crs"], crs),
        issues=issues,
    )


def _crs_of(path: Path, stated: str | None, given: str | None) -> CRS | None:
    own = layer_crs(path, stated)
    if given is None:
        return own
    try:
        wanted = CRS.from_user_input(given)
    except ValueError as error:  # rasterio's CRSError
        raise UsageError(f"--labels-crs {given}: {error}. Give a code such as EPSG:25832.") from None
    if own is not None and own != wanted:
        raise UsageError(f"--labels-crs {given}: {path} states {own.to_string()[:60]}. Leave the option out.")
    return wanted


def _drawable(shapes: Shapes, fids: NDArray[Any]) -> tuple[Shapes, NDArray[np.int64], tuple[Issue, ...]]:
    """Valid single parts, their feature, and features that were empty, not finite or invalid."""
    empty = shapely.is_missing(shapes) | shapely.is_empty(shapes)
    points, which = shapely.get_coordinates(shapes, return_index=True)
    infinite = np.zeros(len(shapes), np.bool_)
    infinite[which[~np.isfinite(points).all(axis=1)]] = True
    usable = ~empty & ~infinite
    invalid = usable & ~shapely.is_valid(shapes)
    dimensions = shapely.get_dimensions(shapes)
    shapes[invalid] = shapely.make_valid(shapes[invalid])
    parts, source = single_parts(shapes[usable])
    owner = np.flatnonzero(usable)[source]
    # A repaired polygon may leave lines of no area.
    kept = shapely.get_dimensions(parts) == dimensions[owner]
    found = (
        ("without a geometry, not drawn", empty),
        ("with coordinates that are not finite, not drawn", infinite),
        ("with an invalid geometry (such as a ring that crosses itself), repaired", invalid),
    )
    issues = tuple(Issue(reason, tuple(fids[where].tolist())) for reason, where in found if where.any())
    return parts[kept], owner[kept], issues


@dataclass(frozen=True)
class SceneLabels:
    """Polygons in columns and rows of a scene, in drawing order.

    polygons  shapely polygons
    classes   uint8 (n,), class index of each
    owner     int64 (n,), its feature
    vanished  int64, features that a negative buffer leaves nothing of
    """

    polygons: Shapes
    classes: NDArray[np.uint8]
    owner: NDArray[np.int64]
    vanished: NDArray[np.int64]

    @cached_property
    def _tree(self) -> shapely.STRtree:
        return shapely.STRtree(self.polygons)

    def within(self, window: Window) -> NDArray[np.int64]:
        """Features that have a part in a window."""
        return np.unique(self.owner[self._tree.query(_box(window), predicate="intersects")])

    def burn(self, window: Window, *, fill: int, touched: bool = False) -> NDArray[np.uint8]:
        """Class indices (h, w) of a window, `fill` where there is no polygon; later polygons cover earlier ones."""
        found = np.sort(self._tree.query(_box(window)))
        pixels = np.full((window.height, window.width), fill, np.uint8)
        if not len(found):
            return pixels
        shapes = zip(_mappings(self.polygons[found]), self.classes[found].tolist(), strict=True)
        place_of = Affine.translation(window.col, window.row)
        return np.asarray(rasterize(shapes, out=pixels, transform=place_of, all_touched=touched))

    def overlaps(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Pairs of polygons of two classes that share at least a pixel: lower, upper, shared pixels."""
        # The cheap conditions first: most of the time goes into the intersections.
        one, other = self._tree.query(self.polygons)
        pairs = (one < other) & (self.classes[one] != self.classes[other])
        one, other, bounds = one[pairs], other[pairs], shapely.bounds(self.polygons)
        low, high = np.maximum(bounds[one, :2], bounds[other, :2]), np.minimum(bounds[one, 2:], bounds[other, 2:])
        large = (high - low).prod(axis=1) >= _LEAST_OVERLAP
        one, other = one[large], other[large]
        compared = self.polygons[np.unique(one)]
        shapely.prepare(compared)
        meet = shapely.intersects(self.polygons[one], self.polygons[other])
        shapely.destroy_prepared(compared)
        one, other = one[meet], other[meet]
        shared = shapely.area(shapely.intersection(self.polygons[one], self.polygons[other]))
        wide = shared >= _LEAST_OVERLAP
        return one[wide], other[wide], shared[wide]


def place_labels(
    features: Features, classes: NDArray[np.int64], info: RasterInfo, how: Burning, priority: Sequence[int] = ()
) -> SceneLabels:
    """Labels of a scene as polygons in its pixels.

    Args:
        features: all labels.
        classes: int64 (m,), class index of each feature; negative ones are left out.
        info: the scene.
        how: widths and buffers.
        priority: class indices, the uppermost first; the others lie below in the order of the file.

    Raises:
        DataError: the labels cannot be located in the scene, or the scene has no metres.
    """
    grid, what = Grid(info), str(features.path)
    if not grid.is_located:
        raise DataError(f"{what}: the scene has no coordinates, so labels cannot be located in it. Georeference it.")
    if features.crs is None and grid.crs is not None:
        raise DataError(f"{what}: states no coordinate system. Name it with --labels-crs, such as EPSG:25832.")
    wanted = np.flatnonzero(classes[features.owner] >= 0)
    reach = max(abs(how.buffer), (how.width or 0.0) / 2)
    placed = place(features.shapes[wanted], features.crs, grid, what, margin=_margin(grid, reach))
    placed = Placed(placed.shapes, wanted[placed.source])
    near = features.owner[placed.source]
    if reach and len(placed.shapes):
        thin = shapely.get_dimensions(placed.shapes) < 2
        placed = buffered(placed, np.where(thin, (how.width or 0.0) / 2, how.buffer), grid, what)
    shapes = placed.shapes
    if features.crs != grid.crs:  # a transformation of the corners alone can make borders cross
        invalid = np.flatnonzero(~shapely.is_valid(shapes))
        shapes[invalid] = shapely.make_valid(shapes[invalid])
    polygons, source = polygon_parts(shapes)
    polygons, source = _subdivided(polygons, source)
    owner = features.owner[placed.source[source]]
    index = classes[owner]
    rank = np.full(256, -len(priority))
    rank[list(priority)] = -np.arange(len(priority))
    order = np.lexsort((owner, rank[index]))
    return SceneLabels(polygons[order], index[order].astype(np.uint8), owner[order], np.setdiff1d(near, owner))


def _subdivided(polygons: Shapes, source: NDArray[np.int64]) -> tuple[Shapes, NDArray[np.int64]]:
    """Cut polygons of many corners along sides of pixels, so that a window needs only the parts near it.

    No pixel centre lies on a cut, and all pixels that a cut touches are touched by the polygon too.
    """
    while True:
        left, top, right, bottom = shapely.bounds(polygons).T
        width, height = right - left, bottom - top
        cut = (shapely.get_num_coordinates(polygons) > _MOST_CORNERS) & (np.maximum(width, height) >= 2)
        if not cut.any():
            return polygons, source
        upright = width >= height
        x = np.where(upright, np.round((left + right) / 2), right)[cut]
        y = np.where(upright, bottom, np.round((top + bottom) / 2))[cut]
        first = shapely.box(left[cut], top[cut], x, y)
        second = shapely.box(
            np.where(upright[cut], x, left[cut]), np.where(upright[cut], top[cut], y), right[cut], bottom[cut]
        )
        halves = [shapely.intersection(polygons[cut], box) for box in (first, second)]
        parts, which = polygon_parts(np.concatenate(halves))
        polygons = np.concatenate([polygons[~cut], parts])
        source = np.concatenate([source[~cut], np.tile(source[cut], 2)[which]])


def _margin(grid: Grid, meters: float) -> float:
    """Margin around a scene so that a buffer does not move the cut edges of polygons into it."""
    sides = grid.ground_sides() if meters else None
    if sides is None:
        return MARGIN
    return max(MARGIN, (meters / min(sides) + 2) / min(grid.info.height, grid.info.width))


def _box(window: Window) -> Any:
    return shapely.box(window.col, window.row, window.col + window.width, window.row + window.height)


def _mappings(polygons: Shapes) -> list[dict[str, Any]]:
    """GeoJSON of polygons; faster than shapely's own, one at a time."""
    _, points, (rings, bounds) = shapely.to_ragged_array(polygons)
    # Tuples of two columns are made faster than rows of an array.
    coordinates, edges = list(zip(points[:, 0].tolist(), points[:, 1].tolist(), strict=True)), rings.tolist()
    loops = [coordinates[start:stop] for start, stop in pairwise(edges)]
    ends = bounds.tolist()
    return [{"type": "Polygon", "coordinates": loops[i:j]} for i, j in pairwise(ends)]
