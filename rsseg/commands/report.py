"""`rsseg report`."""

from pathlib import Path
from typing import Annotated

import typer

from rsseg.commands.console import print_result
from rsseg.errors import UsageError


def report(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN...", help="Run folders (default: the newest run).")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="File of a comparison of several runs (default: comparison.html)."),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Evaluation to compare runs on (default: test, else a common one).")
    ] = None,
    root: Annotated[Path, typer.Option("--runs", help="Folder that holds the runs.")] = Path("runs"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of a comparison.")] = False,
) -> None:
    """Write the report of a run into its folder, or the comparison of several: one HTML file each.

    Examples: rsseg report runs/latest
              rsseg report runs/first runs/second -o comparison.html
    """
    from rsseg.files import check_outputs
    from rsseg.report.page import write_comparison, write_report
    from rsseg.runs import find_run

    found = [find_run(run, root) for run in runs] if runs else [find_run(None, root)]
    if len(found) == 1:
        if output is not None or split is not None:
            raise UsageError("--output and --split are for comparisons; the report of one run lies in its folder.")
        print_result(str(write_report(found[0])))
        return
    file = output or Path("comparison.html")
    check_outputs([("--output", file)], [], overwrite=overwrite)
    print_result(str(write_comparison(found, file, split)))
