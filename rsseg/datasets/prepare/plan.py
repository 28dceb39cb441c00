"""Resolve a request to prepare a dataset, before its files are opened."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rsseg.data.index import LabelMap
from rsseg.datasets.card import DatasetCard, Labels, Variant
from rsseg.datasets.cards import find_card
from rsseg.datasets.class_file import ClassFile, load_classes
from rsseg.datasets.layouts import Layout, find_prefix
from rsseg.datasets.prepare.options import FolderOptions, PrepareOptions
from rsseg.datasets.prepare.tiles import Grid
from rsseg.datasets.prepare.vectors import Drawing
from rsseg.datasets.splits import RATIO, TRAIN, SplitRule, as_found, check_shares, ratio_rule
from rsseg.errors import DataError, UsageError
from rsseg.task import IGNORE_INDEX, Color
from rsseg.text import read_lines


@dataclass(frozen=True)
class Plan:
    """A card, or a folder of your own, with all options resolved.

    variants  usable layouts, best first
    rule      None: splits come from the layout
    bands     bands to keep, in order; None keeps all
    stretch   scale each band of each image from its minimum and maximum to 8 bits
    """

    card: DatasetCard
    name: str
    labels: Labels
    variants: tuple[Variant, ...]
    rule: SplitRule | None
    grid: Grid | None
    bands: tuple[str, ...] | None
    gsd_m: float | None
    nodata: float | None
    zero_collar: bool
    stretch: bool
    subset: bool
    drawing: Drawing | None = None
    """Labels to draw on the scenes; None: masks are files."""

    def find(self, files: Mapping[str, Path], where: Path) -> tuple[Variant, str]:
        """Find the matching layout and the folder below which it matches; raises `DataError` naming other labels."""
        layouts = [variant.layout for variant in self.variants]
        try:
            layout, prefix = find_prefix(files, layouts, str(where))
        except DataError as error:
            for other in self.card.variants:
                if other not in self.variants and other.labels and _fits(files, other.layout):
                    raise DataError(
                        f"{where}: no labels {self.labels.name!r} for these bands, but {other.labels!r} with "
                        f"{','.join(other.bands)}. Pass --labels {other.labels} --bands {','.join(other.bands)}."
                    ) from None
            raise error from None
        return self.variants[layouts.index(layout)], prefix


def _fits(files: Mapping[str, Path], layout: Layout) -> bool:
    try:
        find_prefix(files, [layout], "")
    except DataError:
        return False
    return True


def make_plan(name: str, options: PrepareOptions) -> Plan:
    """Check and resolve a request; raises `UsageError`, and `DataError` for a bad class file or list."""
    card = find_card(name)
    if card.name == "folder":
        return _own(card, options)
    if card.name == "vectors":
        return _drawn(card, options)
    if options.folder is not None or options.vectors is not None:
        raise UsageError(f"patterns and a class file are for `folder`; {card.name} defines its own.")
    converted = options.tile or options.bands or options.split_ratio or options.stretch != "none"
    if card.name == "demo" and (options.src or converted):
        raise UsageError(
            "`demo` is generated; it accepts neither --src nor --tile, --bands, --stretch or --split-ratio."
        )
    if options.split and options.split_ratio:
        raise UsageError("--split and --split-ratio exclude each other.")
    rule = ratio_rule(options.split_ratio) if options.split_ratio else card.choose_rule(options.split)
    labels = card.choose_labels(options.labels)
    variants = [variant for variant in card.variants if variant.labels in (None, labels.name)]
    if options.bands is not None:
        variants = _with_bands(card, variants, options.bands)
    return Plan(
        card=card,
        name=card.name,
        labels=_ignoring(labels, options),
        variants=tuple(_as_subset(variant) for variant in variants) if options.subset else tuple(variants),
        rule=rule,
        grid=_grid(rule.grid, options),
        bands=options.bands,
        gsd_m=card.gsd_m,
        nodata=None,
        zero_collar=card.ignore_zero_collar,
        stretch=options.stretch == "minmax",
        subset=options.subset,
    )


def _own(card: DatasetCard, options: PrepareOptions) -> Plan:
    if options.folder is None or options.src is None:
        raise UsageError("`folder` needs --src DIR, --classes FILE and --images PATTERN.")
    if options.split or options.labels:
        raise UsageError("--split and --labels name choices of a known dataset; `folder` has --split-ratio and others.")
    classes = load_classes(options.folder.classes)
    labels = Labels("own", "of the class file", classes.class_infos(), classes.label_map())
    bands = options.bands or classes.bands or ()
    return _of_classes(card, classes, labels, Variant(_layout(options.folder, options), bands), options)


def _drawn(card: DatasetCard, options: PrepareOptions) -> Plan:
    if options.vectors is None or options.src is None:
        raise UsageError("`vectors` needs --src SCENES, --labels FILE and --field NAME; docs/qgis.md shows an example.")
    if options.split or options.labels or options.ignore:
        raise UsageError("--split and --ignore do not apply to `vectors`; it has --split-ratio and others.")
    drawing = Drawing(options.vectors)
    classes = drawing.classes
    bands = options.bands or classes.bands or ()
    lists = {target: _lines(path) for target, path in options.vectors.split_lists.items()}
    variant = _vector_variant(options, bands, lists)
    plan = _of_classes(card, classes, _vector_labels(classes), variant, options)
    return dataclasses.replace(plan, rule=_vector_rule(options), drawing=drawing)


def _of_classes(
    card: DatasetCard, classes: ClassFile, labels: Labels, variant: Variant, options: PrepareOptions
) -> Plan:
    """Plan for files of your own, described by a class file."""
    return Plan(
        card=card,
        name=classes.name,
        labels=_ignoring(labels, options),
        variants=(variant,),
        rule=None,
        grid=_grid(None, options),
        bands=None,
        gsd_m=classes.gsd_m,
        nodata=classes.nodata,
        zero_collar=classes.ignore_zero_collar,
        stretch=options.stretch == "minmax",
        subset=options.subset,
    )


def _with_bands(card: DatasetCard, variants: Sequence[Variant], bands: tuple[str, ...]) -> list[Variant]:
    """Layouts that contain the bands, exact matches first; of single-band files only these bands are kept."""
    unknown = [band for band in bands if not any(band in variant.bands for variant in variants)]
    if unknown or len(set(bands)) < len(bands):
        known = " or ".join(dict.fromkeys(",".join(variant.bands) for variant in variants))
        raise UsageError(f"--bands {','.join(bands)}: {card.name} has {known}.")
    usable = [_narrowed(variant, bands) for variant in variants if set(bands) <= set(variant.bands)]
    if not usable:
        raise UsageError(f"--bands {','.join(bands)}: no layout of {card.name} has all of them.")
    return sorted(usable, key=lambda variant: variant.bands != bands)


def _narrowed(variant: Variant, bands: tuple[str, ...]) -> Variant:
    files = variant.layout.images.split("|")
    if len(files) == 1:
        return variant
    images = "|".join(files[variant.bands.index(band)] for band in bands)
    return dataclasses.replace(variant, layout=dataclasses.replace(variant.layout, images=images), bands=bands)


def _ignoring(labels: Labels, options: PrepareOptions) -> Labels:
    """The labels without ignored classes, and with ignored values and colours."""
    labels = labels.without(options.ignore_classes) if options.ignore_classes else labels
    by_color = bool(labels.label_map.colors)
    wrong = [entry for entry in options.ignore if isinstance(entry, int) == by_color]
    if wrong:
        kind = "colours such as #0a0b0c" if by_color else "values such as 77"
        raise UsageError(f"--ignore {wrong[0]}: these masks hold {kind}.")
    values = {entry: IGNORE_INDEX for entry in options.ignore if isinstance(entry, int)}
    colors: dict[Color, int] = {entry: IGNORE_INDEX for entry in options.ignore if not isinstance(entry, int)}
    label_map = LabelMap(
        values={**labels.label_map.values, **values}, colors=tuple({**dict(labels.label_map.colors), **colors}.items())
    )
    return dataclasses.replace(labels, label_map=label_map)


def _grid(published: Grid | None, options: PrepareOptions) -> Grid | None:
    if published is not None:
        return published.resized(options.tile, options.stride)
    return None if options.tile is None else Grid(options.tile, options.stride or options.tile)


def _as_subset(variant: Variant) -> Variant:
    return dataclasses.replace(variant, layout=dataclasses.replace(variant.layout, subset=True))


def _layout(folder: FolderOptions, options: PrepareOptions) -> Layout:
    return Layout(
        images=folder.images,
        masks=folder.masks,
        unlabeled=folder.unlabeled,
        split_as=folder.split_as,
        check_names=True,
        split_lists={target: _lines(path) for target, path in folder.split_lists.items()},
        split_ratio=options.split_ratio,
        seed=options.seed,
        subset=options.subset,
    )


def _lines(path: Path) -> list[str]:
    if names := read_lines(path):
        return names
    raise DataError(f"{path}: the list is empty.")


def _vector_labels(classes: ClassFile) -> Labels:
    """Classes of the drawn masks, which hold their indices."""
    values = {**{i: i for i in range(len(classes.classes))}, IGNORE_INDEX: IGNORE_INDEX}
    return Labels("own", "of the vector file", classes.class_infos(), LabelMap(values=values))


def _vector_variant(options: PrepareOptions, bands: tuple[str, ...], lists: Mapping[str, Sequence[str]]) -> Variant:
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


def _vector_rule(options: PrepareOptions) -> SplitRule | None:
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
