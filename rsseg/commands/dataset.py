"""`rsseg dataset`: known datasets, and making any folder one."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import ValidationError

from rsseg.commands.console import print_json, print_note, print_result, print_table
from rsseg.errors import DataError, MachineError, UsageError

app = typer.Typer(help="Prepare and check datasets.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Folder = Annotated[Path, typer.Argument(help="Folder made by `rsseg dataset prepare`.")]
Jobs = Annotated[int, typer.Option("--jobs", min=1, help="Threads.")]
Stretch = Literal["none", "minmax"]
By = Literal["scene", "block"]
OWN = "Only for `folder`"
KNOWN = "Not for `folder`"


@app.command("list")
def list_datasets(
    name: Annotated[str | None, typer.Argument(help="Tell more about one of them.")] = None, as_json: AsJson = False
) -> None:
    """List the datasets that rsseg knows."""
    from rsseg.datasets.cards import CARDS, find_card

    cards = list(CARDS.values()) if name is None else [find_card(name)]
    if as_json:
        print_json([card.summary() for card in cards] if name is None else cards[0].summary())
        return
    if name is None:
        print_table(("name", "what", "classes", "size", "licence", "source"), [card.row() for card in cards])
        print_note("All are semantic segmentation. `rsseg dataset list NAME` tells splits, labels, bands and citation.")
        return
    card = cards[0]
    rows = [(key, _shown(value)) for key, value in card.summary().items() if not isinstance(value, dict) and value]
    print_table(("", card.name), rows)
    print_table(("--split", "how"), [(rule.name, rule.title) for rule in card.rules])
    print_table(("--labels", "what"), [(labels.name, labels.title) for labels in card.labels])
    bands = dict.fromkeys(",".join(variant.bands) for variant in card.variants)
    print_table(("--bands of the files",), [(names,) for names in bands])


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="A name of `rsseg dataset list`; `folder` for your own images.")],
    src: Annotated[Path | None, typer.Option("--src", help="Folder, zip or tar as the publisher ships it.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to make; data/NAME.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Agree to fetch it from the hub.")] = False,
    tile: Annotated[int | None, typer.Option("--tile", help="Cut images into squares of this side.")] = None,
    stride: Annotated[int | None, typer.Option("--stride", help="Distance of the squares; the side.")] = None,
    bands: Annotated[
        str | None, typer.Option("--bands", help="Names of the bands in file order: red,green,nir.")
    ] = None,
    scale: Annotated[
        str, typer.Option("--scale", help="auto, or fixed:LOW,HIGH: values that become 0 and 1.")
    ] = "auto",
    split: Annotated[
        str | None, typer.Option("--split", help=f"{KNOWN}: split rule, see `dataset list --json`.")
    ] = None,
    labels: Annotated[str | None, typer.Option("--labels", help=f"{KNOWN}: which labels.")] = None,
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
    masks: Annotated[str | None, typer.Option("--masks", help=f"{OWN}: pattern of the masks.")] = None,
    unlabeled: Annotated[
        list[str] | None, typer.Option("--unlabeled", help=f"{OWN}: split whose masks are never opened.")
    ] = None,
    split_as: Annotated[
        list[str] | None, typer.Option("--split-as", help=f"{OWN}: FOUND=SPLIT or FOUND=SPLIT:DOMAIN.")
    ] = None,
    split_list: Annotated[
        list[str] | None, typer.Option("--split-list", help=f"{OWN}: SPLIT=FILE, one image per line.")
    ] = None,
    split_ratio: Annotated[
        list[str] | None, typer.Option("--split-ratio", help=f"{OWN}: train=0.7,val=0.15,test=0.15.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the drawn splits.")] = 0,
    jobs: Jobs = 2,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
) -> None:
    """Make a checked dataset from a publisher's archive or from your own folders.

    Example: rsseg dataset prepare cloud --src cloud.zip
    """
    import os

    from rsseg.commands.progress import stage_bar
    from rsseg.data.index import SegmentationIndex
    from rsseg.datasets.prepare.options import FolderOptions, PrepareOptions, parse_ignored, parse_pairs, parse_scale
    from rsseg.datasets.prepare.plan import make_plan
    from rsseg.datasets.prepare.run import output_folder
    from rsseg.datasets.prepare.run import prepare as prepare_dataset
    from rsseg.datasets.prepare.stage import partial_folder

    own = {
        "masks": masks,
        "unlabeled": tuple(unlabeled or ()),
        "split_as": parse_pairs("--split-as", split_as or []),
        "split_lists": parse_pairs("--split-list", split_list or []),
        "split_ratio": parse_pairs("--split-ratio", split_ratio or []),
    }
    if name == "folder" and (classes is None or images is None):
        raise UsageError(
            "`folder` needs --src DIR, --classes FILE and --images PATTERN; docs/datasets.md has examples."
        )
    try:
        folder = None
        if classes is not None or images is not None or any(own.values()):
            folder = FolderOptions.model_validate({"classes": classes, "images": images, **own})
        options = PrepareOptions(
            out=out,
            src=src,
            download=download,
            offline=bool(os.environ.get("RSSEG_OFFLINE")),
            overwrite=overwrite,
            tile=tile,
            stride=stride,
            jobs=jobs,
            bands=tuple(bands.split(",")) if bands else None,
            scale=parse_scale(scale),
            split=split,
            labels=labels,
            seed=seed,
            ignore_classes=tuple(ignore_class or ()),
            ignore=parse_ignored(ignore or []),
            stretch=stretch,
            folder=folder,
        )
    except ValidationError as error:
        raise UsageError("\n".join(_option_problem(problem) for problem in error.errors())) from None
    try:
        with stage_bar() as progress:
            made = prepare_dataset(name, options, progress)
    except (KeyboardInterrupt, MachineError):
        place = partial_folder(output_folder(make_plan(name, options), options))
        if place.is_dir():
            print_note(f"What is done lies in {place}; the same command goes on from there.")
        raise
    index = SegmentationIndex.load(made)
    counts = [
        (
            split,
            sum(i.split == split for i in index.items),
            sum(i.split == split and i.mask is not None for i in index.items),
        )
        for split in index.splits()
    ]
    print_table(("split", "images", "masks"), counts)
    print_note(f"{len(index.task.classes)} classes, {len(index.task.bands)} bands. Prepared in:")
    print_result(str(made))


@app.command()
def verify(
    path: Folder,
    pixels: Annotated[bool, typer.Option(help="Also decode every image: finds files that end early.")] = True,
    jobs: Jobs = 2,
    as_json: AsJson = False,
) -> None:
    """Read every mask and image once; list what is wrong and exit 4."""
    from rsseg.commands.progress import stage_bar
    from rsseg.datasets.verify import verify as verify_dataset

    with stage_bar() as progress:
        report = verify_dataset(path, pixels=pixels, jobs=jobs, progress=progress)
    if as_json:
        print_json(report)
    else:
        rows = [(s.split, s.domain, s.images, s.masks, s.ignored) for s in report.splits]
        print_table(("split", "domain", "images", "masks", "ignored pixels"), rows)
        if report.problems:
            print_table(("file", "split", "problem"), [(p.file, p.split, p.reason) for p in report.problems])
    if not report.ok:
        raise DataError(f"{path}: {len(report.problems)} problem(s).")
    print_note(f"{path}: {report.images} images and {report.masks} masks, nothing wrong.")


@app.command()
def stats(path: Folder, jobs: Jobs = 2, as_json: AsJson = False) -> None:
    """Band statistics and class areas per split."""
    from rsseg.commands.progress import stage_bar
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
    image: Annotated[str | None, typer.Argument(help="Name, part of a name, or number; the first labeled one.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="PNG to write instead of showing it here.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the PNG.")] = False,
) -> None:
    """Show one image, its mask in class colours, and a legend."""
    from rsseg.commands.blocks import print_picture
    from rsseg.data.index import SegmentationIndex
    from rsseg.datasets.picture import draw_sample, find_sample, legend, sample_colors

    index = SegmentationIndex.load(path)
    item = find_sample(index, image)
    if out is not None:
        if out.exists() and not overwrite:
            raise UsageError(f"{out} exists already. Pass --overwrite to replace it, or another --out.")
        out.parent.mkdir(parents=True, exist_ok=True)
        draw_sample(index, item).save(out, "PNG")
        print_result(str(out))
        return
    print_picture(sample_colors(index, item, 400), legend(index, item))
    print_note(f"{item.image}, split {item.split}. For a picture file: --out sample.png")


@app.command()
def split(
    path: Folder,
    ratio: Annotated[list[str], typer.Option("--ratio", help="train=0.7,val=0.15,test=0.15")],
    by: Annotated[By, typer.Option("--by", help="What stays together.")] = "scene",
    block: Annotated[int | None, typer.Option("--block", min=1, help="Side of the blocks in pixels.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides the order.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Change the index; without it, only show.")] = False,
) -> None:
    """Divide a prepared dataset anew, by scene or by block of ground, never tile by tile."""
    from rsseg.data.index import SegmentationIndex
    from rsseg.datasets.prepare.options import parse_pairs
    from rsseg.datasets.splits import resplit

    try:
        shares = {name: float(share) for name, share in parse_pairs("--ratio", ratio).items()}
    except ValueError:
        raise UsageError(f"--ratio {','.join(ratio)}: expected shares such as train=0.7,val=0.15,test=0.15.") from None
    index = resplit(SegmentationIndex.load(path), shares, by=by, block=block, seed=seed)
    counts = {name: [item for item in index.items if item.split == name] for name in sorted(index.splits())}
    rows = [(name, len(items), len({item.scene or item.image for item in items})) for name, items in counts.items()]
    print_table(("split", "images", "scenes"), rows)
    if overwrite:
        print_result(str(index.save(path if path.is_dir() else path.parent)))
    else:
        print_note("Nothing is changed yet: pass --overwrite to write this division into the index.")


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _option_problem(problem: object) -> str:
    """One line for a Pydantic error of an option."""
    if not isinstance(problem, dict):
        return str(problem)
    option = "--" + str(problem["loc"][0]).replace("_", "-").replace("lists", "list") if problem["loc"] else ""
    return f"{option} {str(problem['msg']).removeprefix('Value error, ')} (found {problem['input']!r}).".strip()
