"""`rsseg runs`: list and show runs."""

from pathlib import Path
from typing import Annotated

import typer

from rsseg.commands.console import print_facts, print_json, print_table

app = typer.Typer(help="List and show runs.", no_args_is_help=True)

Root = Annotated[Path, typer.Option("--output", help="Folder that holds the runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def ls(output: Root = Path("runs"), as_json: AsJson = False) -> None:
    """List the runs, newest last."""
    from rsseg.runs import list_runs

    runs = [run.summary() for run in list_runs(output)]
    if as_json:
        print_json(runs)
        return
    rows = [(run.name, run.method, run.state, run.step, run.best) for run in runs]
    print_table(("run", "method", "state", "steps", "best score"), rows)


@app.command()
def show(
    run: Annotated[Path | None, typer.Argument(help="Run folder (default: the newest).")] = None,
    output: Root = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Show one run: its inputs, its outcome and its evaluations."""
    from rsseg.runs import find_run

    found = find_run(run, output)
    details = found.details()
    if as_json:
        print_json(details)
        return
    print_facts(details.facts.items())
    if details.metric_rows:
        print_table(details.metric_columns, details.metric_rows)
