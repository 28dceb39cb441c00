"""`rsseg recipe`: list, show, copy and check recipes."""

from pathlib import Path
from typing import Annotated

import typer

from rsseg.commands.console import AsJson, print_json, print_note, print_result, print_table
from rsseg.errors import UsageError

app = typer.Typer(help="List, show, copy and check recipes.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="RECIPE", help="A file, or the name of a packaged recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one value, such as trainer.steps=100.")
]


@app.command()
def ls(as_json: AsJson = False) -> None:
    """List the packaged recipes."""
    from rsseg.recipe import load_recipe, packaged_recipes

    recipes = {name: load_recipe(str(path)) for name, path in packaged_recipes().items()}
    if as_json:
        print_json([{"name": name, "method": r.method, "title": r.title} for name, r in recipes.items()])
        return
    print_table(("recipe", "method", "title"), [(Path(name).stem, r.method, r.title) for name, r in recipes.items()])


@app.command()
def cat(recipe: Name) -> None:
    """Print the text of a recipe."""
    from rsseg.recipe import read_recipe

    print_result(read_recipe(recipe).text.rstrip())


@app.command()
def cp(
    recipe: Name,
    target: Annotated[Path, typer.Argument(help="File or folder to copy to.")] = Path(),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Copy a recipe, to change it."""
    from rsseg.files import write_text
    from rsseg.recipe import read_recipe

    source = read_recipe(recipe)
    file = target / Path(source.label).name if target.is_dir() else target
    if file.exists() and not overwrite:
        raise UsageError(f"{file} exists. Choose another name, or add --overwrite.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}. Choose another place.") from None
    write_text(file, source.text)
    print_note(f"Copied {source.label} to {file}.")


@app.command()
def validate(recipe: Name, overrides: Overrides = None) -> None:
    """Check a recipe; exit 3 and list every problem if it is invalid."""
    from rsseg.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    print_note(f"{recipe}: valid ({loaded.method}).")


@app.command()
def show(recipe: Name, overrides: Overrides = None) -> None:
    """Print a recipe with every default filled in."""
    from rsseg.recipe import dump_recipe, load_recipe

    print_result(dump_recipe(load_recipe(recipe, overrides or ())).rstrip())


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from rsseg.recipe import recipe_schema

    print_json(recipe_schema())
