"""Prepare scenes with vector labels: draw features as masks, assign splits, list the defects."""

import csv
import dataclasses
import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from rsseg.data.index import IndexItem
from rsseg.data.labels import LabelTable
from rsseg.datasets.class_file import class_file_text, classes_from, load_classes
from rsseg.datasets.measure import count_classes, in_order, open_image
from rsseg.datasets.prepare.options import PrepareOptions, VectorOptions
from rsseg.datasets.prepare.tiles import Grid, TileMetadata, tile_name, write_mask
from rsseg.datasets.splits import (
    RATIO,
    TRAIN,
    UNUSED,
    by_block,
    scene_of,
)
from rsseg.errors import DataError, UsageError
from rsseg.files import require_free_disk, write_text
from rsseg.raster import RasterInfo, Window
from rsseg.task import IGNORE_INDEX
from rsseg.vector.aoi import Region, read_region, region_files
from rsseg.vector.labels import Burning, Issue, SceneLabels, place_labels, read_features
from rsseg.vector.read import nearest

RASTERS = (".tif", ".tiff", ".vrt", ".jp2", ".img", ".png", ".jpg", ".jpeg", ".bmp", ".dat", ".ntf", ".ecw")
"""Suffixes of scenes."""
UNLABELED = "unlabeled"
"""Split of images without a labeled pixel."""
ISSUES_NAME = "label-issues.csv"
CLASSES_NAME = "classes.yaml"
_PAIRS_SHOWN = 10
_STRIP_PIXELS = 1 << 24
"""Pixels that are drawn at a time."""

Progress = Callable[[str, int, int], None]


class Drawing:
    """The labels of a request, read and matched to classes; draws masks and collects what is wrong."""

    def __init__(self, options: VectorOptions) -> None:
        """Read labels and classes; raises `DataError` and `UsageError`."""
        self._options = options
        self.features = read_features(
            options.labels,
            options.layer,
            options.field,
            crs=options.labels_crs,
            split_field=options.split_field,
            width=options.width,
        )
        self.made_classes = options.classes is None
        self.classes = (
            classes_from(self.features.values, options.labels.stem, options.background)
            if options.classes is None
            else load_classes(options.classes)
        )
        names = [entry.name for entry in self.classes.classes]
        self._index, unvalued = self.features.classes(self.classes.attribute_values())
        self._fill = IGNORE_INDEX if options.background is None else _position(names, options.background, "background")
        self._priority = [_position(names, name, "priority") for name in options.priority]
        self._how = Burning(options.touched == "all", options.buffer, options.width)
        self._names = names
        self._issues = [*self.features.issues, *unvalued]
        self._drawn = np.zeros(len(self.features.fids), np.bool_)
        self._vanished = np.zeros(len(self.features.fids), np.bool_)
        self._pairs: dict[tuple[int, int], float] = {}

    def draw(self, image: Path | Sequence[Path], target: Path, bands: Sequence[str] | None = None) -> "Drawn":
        """Write the mask of a scene, strip by strip.

        Args:
            image: the scene, or one file per band.
            target: GeoTIFF of class indices on its grid, 255 where there is no label.
            bands: see `open_image`.
        """
        files = [image] if isinstance(image, Path) else list(image)
        with open_image(files, bands) as raster:
            info = raster.info
        labels = place_labels(self.features, self._index, info, self._how, self._priority)
        self._note(labels, info)
        region = self._extent(info)
        metadata = TileMetadata.of(info, None).for_masks([])
        metadata = dataclasses.replace(metadata, colormap=self._colors())
        labeled = False

        def strips() -> Iterable[tuple[Window, NDArray[np.uint8]]]:
            nonlocal labeled
            for window in _windows(info):
                pixels = labels.burn(window, fill=self._fill, touched=self._how.touched)
                if region is not None:
                    pixels[~region.mask(window)] = IGNORE_INDEX
                labeled = labeled or bool((pixels != IGNORE_INDEX).any())
                yield window, pixels

        require_free_disk(target.parent, info.height * info.width // 50)
        write_mask(target, info.height, info.width, metadata, strips())
        return Drawn(info, labels, labeled)

    def splits_within(self, labels: SceneLabels, window: Window) -> set[str]:
        """Values of the split attribute of the features in a window of a scene."""
        splits = self.features.splits or ()
        return {splits[feature] for feature in labels.within(window)} - {""}

    def counts(self) -> dict[str, int]:
        """Class -> features drawn in a scene."""
        found = np.bincount(self._index[self._drawn & (self._index >= 0)], minlength=256)
        return {name: int(count) for name, count in zip(self._names, found, strict=False)}

    def issues(self) -> list[Issue]:
        """Everything that is wrong with the labels, after all scenes are drawn."""
        features, usable = self.features, np.zeros(len(self.features.fids), np.bool_)
        usable[features.owner] = True
        usable &= self._index >= 0
        found = list(self._issues)
        gone = usable & self._vanished & ~self._drawn
        outside = usable & ~self._drawn & ~gone
        if features.splits is not None:
            unknown = usable & np.array([not split for split in features.splits], np.bool_)
            found.append(Issue("without a value in the split field", features.fids_of(unknown)))
        found.append(Issue("outside all scenes", features.fids_of(outside)))
        found.append(Issue(f"with nothing left after --buffer {self._options.buffer:g}", features.fids_of(gone)))
        for (lower, upper), shared in sorted(self._pairs.items(), key=lambda pair: -pair[1]):
            one, other = self._names_of(lower), self._names_of(upper)
            reason = f"overlap by {shared:.0f} pixels ({one} below {other}); the upper one is drawn"
            found.append(Issue(reason, (int(features.fids[lower]), int(features.fids[upper]))))
        counts = self.counts()
        missing = [n for n, count in counts.items() if not count and n != self._options.background]
        found = [issue for issue in found if issue.fids]
        if missing:
            found.append(Issue(f"no feature in any scene has the class {', '.join(missing)}", ()))
        return found

    def _names_of(self, feature: int) -> str:
        index = int(self._index[feature])
        return self._names[index] if index < len(self._names) else "ignored"

    def _note(self, labels: SceneLabels, info: RasterInfo) -> None:
        self._vanished[labels.vanished] = True
        self._drawn[labels.within(Window(0, 0, info.height, info.width))] = True
        one, other, shared = labels.overlaps()
        for lower, upper, pixels in zip(labels.owner[one], labels.owner[other], shared.tolist(), strict=True):
            pair = int(lower), int(upper)
            self._pairs[pair] = self._pairs.get(pair, 0.0) + pixels

    def _extent(self, info: RasterInfo) -> Region | None:
        if self._options.extent is None:
            return None
        return read_region(self._options.extent, info, layer=self._options.extent_layer, must_meet=False)

    def _colors(self) -> tuple[tuple[int, tuple[int, int, int]], ...]:
        own = [(i, entry.color) for i, entry in enumerate(self.classes.classes)]
        return (*own, (IGNORE_INDEX, (0, 0, 0)))


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A scene with its mask."""

    info: RasterInfo
    labels: SceneLabels
    labeled: bool
    """Whether any pixel has a class."""


def _position(names: Sequence[str], name: str, option: str) -> int:
    if name not in names:
        raise UsageError(f"--{option} {name}: there is no such class; {nearest(name, names)}")
    return names.index(name)


def _windows(info: RasterInfo) -> Iterable[Window]:
    """Strips of whole blocks of the mask."""
    rows = max(_STRIP_PIXELS // info.width // 512, 1) * 512
    for row in range(0, info.height, rows):
        yield Window(row, 0, min(rows, info.height - row), info.width)


def vector_inputs(options: VectorOptions) -> list[Path]:
    """All files of the labels and of the extent, for comparison of requests."""
    found = [options.classes] if options.classes is not None else []
    for path in (options.labels, options.extent):
        if path is not None:
            found += sorted(path.iterdir()) if path.is_dir() else list(region_files(path)) if path.exists() else [path]
            found.append(path.with_name(f"{path.name}-wal"))  # saved edits of a GeoPackage that QGIS has open
    return [*found, *options.split_lists.values()]


def scene_files(found: Mapping[str, Path], options: VectorOptions) -> dict[str, Path]:
    """The rasters among files; vector files, tables and the like beside them are left out."""
    if options.images is not None:
        return dict(found)
    return {name: path for name, path in found.items() if name.lower().endswith(RASTERS)}


def draw_scenes(
    drawing: Drawing,
    items: Sequence[IndexItem],
    files: dict[str, Path],
    folder: Path,
    options: PrepareOptions,
    bands: Sequence[str] | None,
    grid: Grid | None,
    progress: Progress,
) -> tuple[list[IndexItem], dict[str, set[str]]]:
    """Draw the mask of every scene.

    Args:
        drawing: the labels.
        items: scenes.
        files: their files; the masks are added.
        folder: folder for masks.
        options: the request.
        bands: of the files.
        grid: of the tiles to be cut; None keeps scenes whole.
        progress: see `prepare`.

    Returns:
        Items with masks, those without a labeled pixel in the split `unlabeled`; and the values of the split field by
        name of the scene or tile.

    Raises:
        DataError: a scene without coordinates, labels without any, or defects of the labels if `strict`.
    """
    own = options.vectors
    assert own is not None
    masks = "masks"
    while any(name.startswith(f"{masks}/") for name in files):
        masks += "_"
    made: list[IndexItem] = []
    splits: dict[str, set[str]] = {}
    for number, item in enumerate(items, start=1):
        names = item.image.split("|")
        mask = f"{masks}/{PurePosixPath(names[0]).with_suffix('.tif')}"
        if mask in files:
            raise DataError(f"{names[0]}: another scene has the same name but for its ending. Rename one of them.")
        target = folder / mask
        target.parent.mkdir(parents=True, exist_ok=True)
        drawn = drawing.draw([files[name] for name in names], target, bands)
        if drawn.info.crs is None and not drawn.info.gcps and not drawn.info.rpcs:
            progress(f"{names[0]} has no coordinate system: that of the labels is taken", 1, 1)
        files[mask] = target
        update = {"mask": mask} if drawn.labeled else _unlabeled(item)
        made.append(item.model_copy(update=update))
        if own.split_field is not None:
            height, width = drawn.info.height, drawn.info.width
            for window in [Window(0, 0, height, width)] if grid is None else grid.windows(height, width):
                name = item.image if grid is None else tile_name(item, window)
                splits[name] = drawing.splits_within(drawn.labels, window)
        progress("draw labels", number, len(items))
    if not any(item.mask for item in made):
        reasons = "; ".join(issue.text() for issue in drawing.issues()[:3])
        raise DataError(
            f"{own.labels}: no label lies in a scene ({reasons}). Check the coordinate systems of both, and the extent."
        )
    return made, splits


def _unlabeled(item: IndexItem) -> dict[str, str]:
    return {"split": UNLABELED if item.split == TRAIN else UNUSED}


def report_issues(drawing: Drawing, folder: Path, out: Path, *, strict: bool, progress: Progress) -> None:
    """Write all issues with their feature ids into a table and print them; raises `DataError` if `strict`."""
    issues = drawing.issues()
    if not issues:
        return
    pairs = [issue for issue in issues if issue.reason.startswith("overlap")]
    others = [issue for issue in issues if not issue.reason.startswith("overlap")]
    lines = [issue.text() for issue in others]
    if pairs:
        fids = "; ".join(f"{a} and {b}" for a, b in (issue.fids for issue in pairs[:_PAIRS_SHOWN]))
        lines.append(
            f"{len(pairs)} pair(s) of features of two classes overlap, the upper one is drawn: {fids}"
            f"{'; ...' if len(pairs) > _PAIRS_SHOWN else ''}"
        )
    if strict:
        raise DataError("\n".join(f"{drawing.features.path}: {line}." for line in lines))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("feature", "other_feature", "issue"))
    for issue in others:
        writer.writerows((fid, "", issue.reason) for fid in issue.fids or ("",))
    writer.writerows((*issue.fids, issue.reason) for issue in pairs)
    write_text(folder / ISSUES_NAME, text.getvalue())
    for line in lines:
        progress(f"warning: {line}", 1, 1)
    progress(f"all issues of the labels are listed in {out / ISSUES_NAME}", 1, 1)


def write_classes(drawing: Drawing, folder: Path, out: Path, progress: Progress) -> None:
    """Write the class file of the attribute's values, if none was given."""
    if drawing.made_classes:
        write_text(folder / CLASSES_NAME, class_file_text(drawing.classes))
        names = ", ".join(entry.name for entry in drawing.classes.classes)
        progress(f"no --classes: the values of the field are the classes ({names}), in {out / CLASSES_NAME}", 1, 1)


def without_labels(
    items: Sequence[IndexItem], folder: Path, labels: LabelTable, classes: int, jobs: int, progress: Progress
) -> list[IndexItem]:
    """Move tiles whose mask has no labeled pixel to the split `unlabeled`; `unused` if their scene is for scoring."""

    def check(item: IndexItem) -> IndexItem:
        if item.mask is None or count_classes(folder / item.mask, labels, classes, None)[:-1].any():
            return item
        return item.model_copy(update={"mask": None, **_unlabeled(item)})

    return list(in_order(check, items, jobs, partial(progress, "find labeled tiles")))


def assign_splits(
    items: Sequence[IndexItem],
    options: PrepareOptions,
    folder: Path,
    bands: Sequence[str] | None,
    splits: Mapping[str, set[str]],
    progress: Progress,
) -> list[IndexItem]:
    """Splits of labeled images by blocks or by a field.

    Raises:
        DataError: too few blocks, or a whole scene with features of two splits.
    """
    own = options.vectors
    assert own is not None
    labeled = [item for item in items if item.mask is not None]
    if own.split_block is not None:
        shares = dict(options.split_ratio) or RATIO
        split_of = by_block(folder, bands, labeled, shares, own.split_block, options.seed)
        return [item.model_copy(update={"split": split_of.get(item.image, item.split)}) for item in items]
    assigned = []
    for item in items:
        if item.mask is None:
            assigned.append(item)
            continue
        found = splits[item.image]
        if len(found) > 1 and item.origin is None:
            raise DataError(
                f"{item.image}: features of the splits {' and '.join(sorted(found))} lie in this scene. Cut the scenes "
                "into tiles (--tile 512): those with features of one split are used."
            )
        target = own.split_as.get(one := next(iter(found)), one) if len(found) == 1 else UNUSED
        split, _, domain = target.partition(":")
        assigned.append(item.model_copy(update={"split": split, "domain": domain or item.domain}))
    counts = Counter(item.split for item in assigned)
    if counts[UNUSED]:
        progress(f"{counts[UNUSED]} image(s) with features of several splits (or none) are in the split 'unused'", 1, 1)
    return assigned


def require_scenes(items: Sequence[IndexItem], shares: Sequence[str]) -> None:
    """Raise `DataError` with a way out if there are fewer labeled scenes than splits."""
    scenes = {scene_of(item) for item in items if item.mask is not None}
    if len(scenes) < len(shares):
        raise DataError(
            f"{len(scenes)} labeled scene(s) cannot fill the splits {', '.join(shares)}. Split the ground instead: "
            "--tile 512 --split-block 1024; or give a field of the labels with --split-field, or --split-ratio train=1."
        )
