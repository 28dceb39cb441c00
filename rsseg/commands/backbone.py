"""`rsseg backbone`: the networks that recipes can name."""

from typing import Annotated

import typer

from rsseg.commands.console import print_json, print_table

app = typer.Typer(help="List the backbones that recipes can name.", no_args_is_help=True)


@app.command()
def ls(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the backbones with kind, levels and licence."""
    from dataclasses import asdict

    from rsseg.backbones.zoo import list_backbones

    entries = list_backbones()
    if as_json:
        print_json([asdict(entry) for entry in entries])
        return
    columns = ("name", "kind", "parameters (M)", "strides", "licence of the weights")
    rows = [
        (e.name, e.kind, e.millions, "/".join(str(s) for s in dict.fromkeys(e.strides)), e.license) for e in entries
    ]
    print_table(columns, rows, decimals=1)
