"""`rsseg backbone` and `rsseg weights`: the networks that recipes can name, their weights, published checkpoints."""

from pathlib import Path
from typing import Annotated

import typer

from rsseg.commands.console import AsJson, print_json, print_note, print_result, print_table

backbones = typer.Typer(help="List the backbones that recipes can name.", no_args_is_help=True)
app = typer.Typer(help="List, fetch, check and import weights.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Backbone of `rsseg backbone ls`.")]


@app.command()
def ls(as_json: AsJson = False) -> None:
    """List the backbones with pretrained weights, and whether these are on this machine."""
    from rsseg.backbones.zoo import ENTRIES, is_cached

    rows = [(e.name, e.license, e.millions, is_cached(e), e.hub) for e in ENTRIES if e.hub]
    columns = ("name", "licence", "parameters (M)", "here", "hub")
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
        return
    print_table(columns, rows, decimals=1)


@app.command()
def pull(names: Annotated[list[str], typer.Argument(help="Backbones of `rsseg backbone ls`.")]) -> None:
    """Download pretrained weights from the hub, after printing their file, size and licence."""
    from rsseg.backbones.zoo import find_entry, pull_weights

    for entry in [find_entry(name) for name in names]:
        print_result(str(pull_weights(entry, announce=print_note).path))


@app.command()
def verify(name: Name) -> None:
    """Compare cached weights with the hash stated by the hub; exit code 5 if they are damaged."""
    from rsseg.backbones.zoo import find_entry, verify_weights

    weights = verify_weights(find_entry(name))
    print_note(f"{weights.path}: undamaged.")
    print_result(weights.sha256)


@app.command("import")
def import_checkpoint(
    file: Annotated[Path, typer.Argument(help="The authors' checkpoint (.pth).")],
    recipe: Annotated[str, typer.Option("--recipe", help="Recipe that describes the network, such as grass.yaml.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Model file to write.")],
    method: Annotated[str | None, typer.Option("--method", help="Must agree with the recipe.")] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Prepared dataset with the classes (default: the recipe's known dataset)."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Convert a checkpoint that the authors published into a model, without executing anything in it."""
    from rsseg.data.sources import Datasets
    from rsseg.datasets.cards import find_card
    from rsseg.files import check_outputs
    from rsseg.methods.registry import import_checkpoint as import_for
    from rsseg.recipe import load_recipe

    check_outputs([("--output", output)], [file], overwrite=overwrite)
    loaded = load_recipe(recipe, [("data.path", data)] if data else (), method=method)
    task = Datasets(loaded.data).task if data else find_card(loaded.data.path.name).task()
    import_for(file, loaded, task, output=output)
    print_note(f"Imported {file}. Apply it with `rsseg predict SCENE --model {output}`.")
    print_result(str(output))


@backbones.command("ls")
def backbone_ls(as_json: AsJson = False) -> None:
    """List the backbones with kind, size, strides, and licence and presence of their weights."""
    from dataclasses import asdict

    from rsseg.backbones.zoo import ENTRIES, is_cached

    if as_json:
        print_json([asdict(entry) | {"cached": is_cached(entry)} for entry in ENTRIES])
        return
    columns = ("name", "kind", "size", "stride", "licence of the weights", "on this machine")
    rows = [
        (
            entry.name,
            entry.kind,
            f"{entry.millions:.1f} M",
            str(entry.patch_size or ", ".join(str(stride) for stride in entry.strides)),
            entry.license,
            "yes" if is_cached(entry) else "no",
        )
        for entry in ENTRIES
    ]
    print_table(columns, rows)
