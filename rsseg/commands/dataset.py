"""`rsseg dataset`: known datasets, and making any folder one."""

from pathlib import Path
from typing import Annotated, Any

import typer

from rsseg.commands.console import print_json, print_note, print_result, print_table
from rsseg.errors import CheckFailed

app = typer.Typer(help="Prepare and check datasets.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Folder = Annotated[Path, typer.Argument(help="Folder made by `rsseg dataset prepare`.")]


@app.command("list")
def list_datasets(as_json: AsJson = False) -> None:
    """List the datasets that rsseg knows."""
    from rsseg.data.cards import CARDS

    if as_json:
        print_json([card.summary() for card in CARDS.values()])
        return
    columns = ("name", "what", "classes", "size", "licence", "download")
    print_table(columns, [tuple(card.row()) for card in CARDS.values()])
