"""`rsseg dataset`: prepare, check, show and split datasets."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.color import Color
from rich.style import Style
from rich.text import Text

from rsseg.commands.console import (
    AsJson,
    print_facts,
    print_json,
    print_note,
    print_result,
    print_table,
    stage_bar,
    stdout,
)
from rsseg.errors import DataError, MachineError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

app = typer.Typer(help="Prepare and check datasets.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="Folder made by `rsseg dataset prepare`.")]
Jobs = Annotated[int, typer.Option("--jobs", min=1, help="Threads.")]
Stretch = Literal["none", "minmax"]
By = Literal["scene", "block"]
OWN = "Only for `folder` and `vectors`"
FOLDER = "Only for `folder`"
VECTORS = "Only for `vectors`"
KNOWN = "Not for `folder`"
# Options of `prepare vectors` that `add` has too.
DRAWN = "Vector labels"
LabelField = Annotated[str | None, typer.Option("--field", help=f"{DRAWN}: attribute with the class.")]
LabelsCrs = Annotated[
    str | None, typer.Option("--labels-crs", help=f"{DRAWN}: of a file that states none, such as EPSG:25832.")
]
Extent = Annotated[
    str | None,
    typer.Option("--extent", help=f"{DRAWN}: FILE or FILE:LAYER of areas that are labeled; the rest is ignored."),
]
Background = Annotated[
    str | None, typer.Option("--background", help=f"{DRAWN}: class of unlabeled pixels (default: ignored).")
]
Touched = Annotated[
    Literal["centre", "all"] | None,
    typer.Option("--touched", help=f"{DRAWN}: pixels by centre (default), or all touched."),
]
Buffer = Annotated[
    float | None, typer.Option("--buffer", help=f"{DRAWN}: widen polygons, in metres; -0.5 narrows them.")
]
LineWidth = Annotated[float | None, typer.Option("--width", help=f"{DRAWN}: of lines and points, in metres.")]
Priority = Annotated[
    str | None, typer.Option("--priority", help=f"{DRAWN}: classes drawn over others, uppermost first.")
]
Strict = Annotated[bool, typer.Option("--strict", help=f"{DRAWN}: defects of the labels are errors.")]
Tile = Annotated[int | None, typer.Option("--tile", help="Cut images into square tiles of this side.")]
_GAP = 2
"""Columns between two pictures."""


@app.command("list")
def list_datasets(
    name: Annotated[str | None, typer.Argument(help="Show one of them in detail.")] = None, as_json: AsJson = False
) -> None:
    """List the known datasets."""
    from rsseg.datasets.cards import CARDS, find_card

    cards = list(CARDS.values()) if name is None else [find_card(name)]
    if as_json:
        print_json([card.summary() for card in cards] if name is None else cards[0].summary())
        return
    if name is None:
        print_table(("name", "what", "classes", "size", "licence", "source"), [card.row() for card in cards])
        print_note("All are semantic segmentation. `rsseg dataset list NAME` shows splits, labels, bands and citation.")
        return
    card = cards[0]
    print_facts((key, value) for key, value in card.summary().items() if not isinstance(value, dict))
    print_table(("--split", "how"), [(rule.name, rule.title) for rule in card.rules])
    print_table(("--labels", "what"), [(labels.name, labels.title) for labels in card.labels])
    bands = dict.fromkeys(",".join(variant.bands) for variant in card.variants)
    print_table(("--bands of the files",), [(names,) for names in bands])


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="A name of `rsseg dataset list`; `folder` for your own images.")],
    src: Annotated[Path | None, typer.Option("--src", help="Folder, zip or tar of the publisher.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Output folder (default: data/NAME).")] = None,
    download: Annotated[bool, typer.Option("--download", help="Allow the download.")] = False,
    tile: Tile = None,
    stride: Annotated[int | None, typer.Option("--stride", help="Distance between tiles (default: the side).")] = None,
    bands: Annotated[str | None, typer.Option("--bands", help="Band names in file order: red,green,nir.")] = None,
    scale: Annotated[
        str, typer.Option("--scale", help="auto, or fixed:LOW,HIGH: values that become 0 and 1.")
    ] = "auto",
    split: Annotated[str | None, typer.Option("--split", help=f"{KNOWN}: split rule, see `dataset list NAME`.")] = None,
    labels: Annotated[
        str | None,
        typer.Option("--labels", help="`vectors`: FILE or FILE:LAYER. Known datasets: see `dataset list NAME`."),
    ] = None,
    field: LabelField = None,
    labels_crs: LabelsCrs = None,
    extent: Extent = None,
    background: Background = None,
    touched: Touched = None,
    buffer: Buffer = None,
    width: LineWidth = None,
    priority: Priority = None,
    strict: Strict = False,
    split_field: Annotated[
        str | None, typer.Option("--split-field", help=f"{VECTORS}: attribute with the split.")
    ] = None,
    split_block: Annotated[
        int | None, typer.Option("--split-block", help=f"{VECTORS}: draw splits by squares of this side, in pixels.")
    ] = None,
    ignore_class: Annotated[
        list[str] | None, typer.Option("--ignore-class", help="Class whose pixels are ignored.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", help="Mask value or colour without a class: 77, '#0a0b0c'.")
    ] = None,
    stretch: Annotated[
        Stretch, typer.Option("--stretch", help="minmax: stretch each band of each image to 8 bits.")
    ] = "none",
    classes: Annotated[Path | None, typer.Option("--classes", help=f"{OWN}: class file (YAML).")] = None,
    images: Annotated[
        str | None, typer.Option("--images", help=f"{OWN}: pattern such as '{{split}}/images/*.jpg'.")
    ] = None,
    masks: Annotated[str | None, typer.Option("--masks", help=f"{FOLDER}: pattern of the masks.")] = None,
    unlabeled: Annotated[
        list[str] | None, typer.Option("--unlabeled", help=f"{FOLDER}: split whose masks are never opened.")
    ] = None,
    split_as: Annotated[
        list[str] | None, typer.Option("--split-as", help=f"{OWN}: FOUND=SPLIT or FOUND=SPLIT:DOMAIN.")
    ] = None,
    split_list: Annotated[
        list[str] | None, typer.Option("--split-list", help=f"{OWN}: SPLIT=FILE, one image per line.")
    ] = None,
    split_ratio: Annotated[
        list[str] | None,
        typer.Option("--split-ratio", help="Draw splits by scene: train=0.7,val=0.15,test=0.15."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of random splits.")] = 0,
    subset: Annotated[
        bool,
        typer.Option("--subset", help="Accept a part of a dataset: omit unpaired files, allow empty splits."),
    ] = False,
    jobs: Jobs = 2,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
) -> None:
    """Prepare a checked dataset from a publisher's archive or from your own folders.

    Examples: rsseg dataset prepare cloud --src cloud.zip
              rsseg dataset prepare vectors --src scenes --labels labels.gpkg --field class
    """
    import os

    from rsseg.data.index import SegmentationIndex
    from rsseg.datasets.prepare.options import drawing_values, parse_ignored, parse_options, parse_pairs, parse_scale
    from rsseg.datasets.prepare.run import prepare as prepare_dataset
    from rsseg.datasets.prepare.run import unfinished

    drawn = name == "vectors"
    own = {
        "classes": classes,
        "images": images,
        "masks": masks,
        "unlabeled": unlabeled,
        "split_as": parse_pairs("--split-as", split_as or []),
        "split_lists": parse_pairs("--split-list", split_list or []),
        "split_field": split_field,
        "split_block": split_block,
    }
    given = {key: value for key, value in own.items() if value not in (None, (), {})}
    given |= drawing_values(
        labels if drawn else None, extent, priority, field=field, labels_crs=labels_crs, background=background,
        touched=touched, buffer=buffer, width=width, strict=strict,
    )  # fmt: skip
    options = parse_options(
        name,
        {
            "out": out,
            "src": src,
            "download": download,
            "offline": bool(os.environ.get("RSSEG_OFFLINE")),
            "overwrite": overwrite,
            "tile": tile,
            "stride": stride,
            "jobs": jobs,
            "bands": bands.split(",") if bands else None,
            "scale": parse_scale(scale),
            "split": split,
            "split_ratio": parse_pairs("--split-ratio", split_ratio or []),
            "subset": subset,
            "labels": None if drawn else labels,
            "seed": seed,
            "ignore_classes": ignore_class or (),
            "ignore": parse_ignored(ignore or []),
            "stretch": stretch,
            "folder": given or None,
            "vectors": given or None,
        },
    )
    try:
        with stage_bar() as progress:
            made = prepare_dataset(name, options, progress)
    except (KeyboardInterrupt, MachineError):
        if place := unfinished(name, options):
            print_note(f"Finished steps are kept in {place}; the same command continues from them.")
        raise
    index = SegmentationIndex.load(made)
    splits = {name: [item for item in index.items if item.split == name] for name in index.splits()}
    counts = [(name, len(items), sum(item.mask is not None for item in items)) for name, items in splits.items()]
    print_table(("split", "images", "masks"), counts)
    print_note(f"{len(index.task.classes)} classes, {len(index.task.bands)} bands. Prepared in:")
    print_result(str(made))


@app.command()
def verify(
    path: Folder,
    pixels: Annotated[bool, typer.Option(help="Also decode every image: finds truncated files.")] = True,
    jobs: Jobs = 2,
    as_json: AsJson = False,
) -> None:
    """Read every mask and image once; list problems and exit with 4 if there are any."""
    from rsseg.datasets.verify import verify as verify_dataset

    with stage_bar() as progress:
        report = verify_dataset(path, pixels=pixels, jobs=jobs, progress=progress)
    if as_json:
        print_json(report)
    else:
        rows = [(s.split, s.domain, s.images, s.masks, s.ignored) for s in report.splits]
        print_table(("split", "domain", "images", "masks", "ignored pixels"), rows)
        drawn = any(c.features is not None for c in report.classes)
        columns = ("class", *(("features",) if drawn else ()), "polygons", "pixels", "hectares", "scenes", "splits")
        places = [
            (c.name, *((c.features,) if drawn else ()), c.polygons, c.pixels, c.ha, c.scenes, ", ".join(c.splits))
            for c in report.classes
        ]
        print_table(columns, places)
        for warning in report.warnings:
            print_note(f"warning: {warning}")
        if report.problems:
            print_table(("file", "split", "problem"), [(p.file, p.split, p.reason) for p in report.problems])
    if not report.ok:
        raise DataError(f"{path}: {len(report.problems)} problem(s).")
    print_note(f"{path}: {report.images} images and {report.masks} masks, no problems.")


@app.command()
def stats(path: Folder, jobs: Jobs = 2, as_json: AsJson = False) -> None:
    """Show band statistics and class areas per split."""
    from rsseg.datasets.verify import statistics

    with stage_bar() as progress:
        found = statistics(path, jobs=jobs, progress=progress)
    if as_json:
        print_json(found)
        return
    for split in found.splits:
        title = split.split if split.domain is None else f"{split.split}, {split.domain}"
        rows = [(b.name, b.mean, b.std, b.low, b.high) for b in split.bands]
        print_table(("band", "mean", "std", "lowest", "highest"), rows, title=f"{title}: {split.images} images")
        areas = [(c.name, c.pixels, c.share, c.ha) for c in (*split.classes, split.ignored)]
        print_table(("class", "pixels", "share", "hectares"), areas)


@app.command()
def inspect(
    path: Folder,
    image: Annotated[
        str | None, typer.Argument(help="Name, part of a name, or number (default: the first labeled one).")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="PNG to write instead of showing the image here.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the PNG.")] = False,
) -> None:
    """Show one image, its mask in class colours, and a legend."""
    from rsseg.data.index import SegmentationIndex
    from rsseg.data.picture import find_sample, legend, sample_colors, save_sample

    index = SegmentationIndex.load(path)
    item = find_sample(index, image)
    if out is not None:
        save_sample(index, item, out, overwrite=overwrite)
        print_result(str(out))
        return
    _print_picture(sample_colors(index, item, 400), legend(index, item))
    print_note(f"{item.image}, split {item.split}. For a picture file: --out sample.png")


@app.command()
def split(
    path: Folder,
    ratio: Annotated[list[str], typer.Option("--ratio", help="train=0.7,val=0.15,test=0.15")],
    by: Annotated[By, typer.Option("--by", help="Unit that stays in one split.")] = "scene",
    block: Annotated[int | None, typer.Option("--block", min=1, help="Side of the blocks in pixels.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the order.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write the splits to the index instead of only showing them.")
    ] = False,
) -> None:
    """Split a prepared dataset again, by scene or by spatial block."""
    from rsseg.data.index import SegmentationIndex
    from rsseg.datasets.prepare.options import parse_pairs
    from rsseg.datasets.splits import resplit, scene_of

    try:
        shares = {name: float(share) for name, share in parse_pairs("--ratio", ratio).items()}
    except ValueError:
        raise UsageError(f"--ratio {','.join(ratio)}: expected shares such as train=0.7,val=0.15,test=0.15.") from None
    index = resplit(SegmentationIndex.load(path), shares, by=by, block=block, seed=seed)
    counts = {name: [item for item in index.items if item.split == name] for name in sorted(index.splits())}
    rows = [(name, len(items), len({scene_of(item) for item in items})) for name, items in counts.items()]
    print_table(("split", "images", "scenes"), rows)
    if overwrite:
        print_result(str(index.save(path)))
    else:
        print_note("Nothing was changed. Pass --overwrite to write these splits to the index.")


@app.command()
def add(
    path: Folder,
    chips: Annotated[Path | None, typer.Option("--chips", help="Folder of `rsseg suggest --chips`, corrected.")] = None,
    src: Annotated[Path | None, typer.Option("--src", help="Or: scenes with labels drawn in a GIS.")] = None,
    labels: Annotated[str | None, typer.Option("--labels", help="Their labels: FILE or FILE:LAYER.")] = None,
    field: LabelField = None,
    labels_crs: LabelsCrs = None,
    extent: Extent = None,
    background: Background = None,
    touched: Touched = None,
    buffer: Buffer = None,
    width: LineWidth = None,
    priority: Priority = None,
    strict: Strict = False,
    tile: Tile = None,
    split_name: Annotated[str, typer.Option("--split", help="Split of the new images.")] = "train",
    jobs: Jobs = 2,
) -> None:
    """Add labeled images to a prepared dataset: corrected windows, or scenes with labels drawn in a GIS."""
    from rsseg.datasets.prepare.add import add_chips, add_vectors
    from rsseg.datasets.prepare.options import drawing_values, parse_options

    if (chips is None) == (labels is None or src is None):
        raise UsageError("give either --chips FOLDER, or --src SCENES with --labels FILE and --field NAME.")
    drawn = drawing_values(
        labels, extent, priority, field=field, labels_crs=labels_crs, background=background, touched=touched,
        buffer=buffer, width=width, strict=strict,
    )  # fmt: skip
    if chips is not None:
        added = add_chips(path, chips, split=split_name)
    else:
        options = parse_options("vectors", {"src": src, "tile": tile, "jobs": jobs, "vectors": drawn})
        with stage_bar() as progress:
            added = add_vectors(path, options, split=split_name, progress=progress)
    print_note(f"{len(added)} labeled image(s) added to the split {split_name!r}.")
    print_result(str(path))


def _print_picture(pictures: Sequence["NDArray[np.uint8]"], legend: Sequence[tuple[tuple[int, int, int], str]]) -> None:
    """Print pictures `(h, w, 3)` side by side in half blocks, two pixels per character, and a legend below."""
    console = stdout()
    columns = max((min(console.width, 120) - _GAP * (len(pictures) - 1)) // len(pictures), 4)
    step = max(-(-pictures[0].shape[1] // columns), 1)
    small = [picture[::step, ::step] for picture in pictures]
    for row in range(0, small[0].shape[0], 2):
        line = Text()
        for number, picture in enumerate(small):
            line.append(" " * _GAP if number else "")
            below = picture[min(row + 1, len(picture) - 1)]
            for upper, lower in zip(picture[row].tolist(), below.tolist(), strict=True):
                line.append("\u2580", Style(color=Color.from_rgb(*upper), bgcolor=Color.from_rgb(*lower)))
        console.print(line, no_wrap=True, crop=True)
    for color, text in legend:
        console.print(Text("\u2588\u2588 ", Style(color=Color.from_rgb(*color))) + Text(text))
