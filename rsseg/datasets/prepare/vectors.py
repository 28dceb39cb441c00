"""Steps of preparing scenes with vector labels: masks per scene, splits, and a list of the defects."""

import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from rsseg.data.index import IndexItem, LabelMap
from rsseg.data.labels import LabelTable
from rsseg.datasets.card import Labels, Variant
from rsseg.datasets.class_file import ClassFile, class_file_text
from rsseg.datasets.layouts import Layout
from rsseg.datasets.measure import count_classes, in_order
from rsseg.datasets.prepare.drawing import Drawing
from rsseg.datasets.prepare.options import PrepareOptions, VectorOptions
from rsseg.datasets.prepare.tiles import Grid, tile_name
from rsseg.datasets.splits import (
    RATIO,
    TRAIN,
    UNUSED,
    SplitRule,
    as_found,
    by_block,
    check_shares,
    ratio_rule,
    scene_of,
)
from rsseg.errors import DataError, UsageError
from rsseg.files import write_text
from rsseg.raster import Window
from rsseg.task import IGNORE_INDEX
from rsseg.vector.aoi import region_files

RASTERS = (".tif", ".tiff", ".vrt", ".jp2", ".img", ".png", ".jpg", ".jpeg", ".bmp", ".dat", ".ntf", ".ecw")
"""Suffixes of scenes."""
UNLABELED = "unlabeled"
"""Split of images without a labeled pixel."""
ISSUES_NAME = "label-issues.csv"
CLASSES_NAME = "classes.yaml"
_PAIRS_SHOWN = 10

Progress = Callable[[str, int, int], None]


def vector_labels(classes: ClassFile) -> Labels:
    """Classes of the drawn masks, which hold their indices."""
    values = {**{i: i for i in range(len(classes.classes))}, IGNORE_INDEX: IGNORE_INDEX}
    return Labels("own", "of the vector file", classes.class_infos(), LabelMap(values=values))


def vector_variant(options: PrepareOptions, bands: tuple[str, ...], lists: Mapping[str, Sequence[str]]) -> Variant:
    """Layout of the scenes; masks are drawn later."""
    own = options.vectors
    assert own is not None
    pattern = own.images or "**/*"
    layout = Layout(
        images=pattern,
        split_as=own.split_as,
        split_lists=lists,
        one_split=None if "{split}" in pattern or lists else TRAIN,
        masks_later=True,
    )
    return Variant(layout, bands)


def vector_rule(options: PrepareOptions) -> SplitRule | None:
    """How the splits are found; None: from the folders or lists."""
    own = options.vectors
    assert own is not None
    shares = dict(options.split_ratio) or RATIO
    check_shares("--split-ratio", shares)
    if own.split_field is not None or own.split_lists or (own.images and "{split}" in own.images):
        if options.split_ratio:
            raise UsageError("--split-ratio: the splits are given by the field, the lists or the folders already.")
        if own.split_field is None:
            return None
        return SplitRule("field", f"field {own.split_field}", as_found, ("train",), tiles=options.tile is not None)
    if own.split_block is not None:
        title = f"blocks of {own.split_block} pixels, seed {options.seed}"
        return SplitRule("block", title, as_found, tuple(shares), tiles=True)
    return ratio_rule(shares)


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
