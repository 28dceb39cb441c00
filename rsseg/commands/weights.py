"""`rsseg weights`: pretrained weights on this machine, and published checkpoints."""

from pathlib import Path
from typing import Annotated

import typer

from rsseg.commands.console import AsJson, print_json, print_note, print_result, print_table

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
