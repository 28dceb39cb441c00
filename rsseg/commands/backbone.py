"""`rsseg backbone`: the networks that recipes can name."""

import typer

from rsseg.commands.console import AsJson, print_json, print_table

app = typer.Typer(help="List the backbones that recipes can name.", no_args_is_help=True)


@app.command()
def ls(as_json: AsJson = False) -> None:
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
