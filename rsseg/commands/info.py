"""`rsseg info`: what a model file is."""

from pathlib import Path
from typing import Annotated

import typer

from rsseg.commands.console import print_json, print_table


def info(
    model: Annotated[Path, typer.Argument(help="Model file, or a run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a model segments, from which bands, and how it was trained. Reads the header only."""
    from dataclasses import asdict

    from rsseg.checkpoint import find_model, read_header

    header = read_header(find_model(model))
    if as_json:
        print_json(asdict(header) | {"task": header.task.model_dump(mode="json")})
        return
    task = header.task
    facts = [
        ("method", header.recipe["method"]),
        ("recipe", header.recipe["name"]),
        ("bands", ", ".join(task.bands)),
        ("pixel type", task.dtype),
        *((f"backbone {role}", f"{b['name']} ({b['license']})") for role, b in header.backbones.items()),
        *((f"training {key}", str(value)) for key, value in header.training.items()),
        *((f"made with {key}", value) for key, value in header.made_with.items()),
    ]
    print_table(("", ""), facts)
    rows = [(c.value, c.name, "#{:02x}{:02x}{:02x}".format(*c.color)) for c in task.classes]
    print_table(("value", "class", "colour"), rows)
