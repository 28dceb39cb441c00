"""`rsseg cog`: the layout of GeoTIFFs."""

from pathlib import Path
from typing import Annotated

import typer

from rsseg.commands.console import print_error, print_json, print_result
from rsseg.errors import CheckFailed

app = typer.Typer(help="Check cloud-optimized GeoTIFFs.", no_args_is_help=True)


@app.command("validate")
def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="GeoTIFFs on this machine.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check whether files are cloud-optimized GeoTIFFs; exit code 8 if one is not. A warning counts."""
    from rsseg.scene.cog import check_cog

    reports = [check_cog(file) for file in files]
    if as_json:
        print_json(reports)
    for report in reports:
        for finding in (*report.errors, *report.warnings):
            print_error(f"{report.file}: {finding}")
        if not as_json:
            print_result(f"{report.file}: {'valid' if report.is_valid else 'not valid'}")
    if wrong := sum(not report.is_valid for report in reports):
        raise CheckFailed(
            f"{wrong} of {len(reports)} files are not valid COGs. `rsseg predict --format cog` writes one."
        )
