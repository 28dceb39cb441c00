"""`rsseg runs`: list, show and compare runs."""

from pathlib import Path
from typing import Annotated

import typer

from rsseg.commands.console import AsJson, print_facts, print_json, print_note, print_table

app = typer.Typer(help="List, show and compare runs.", no_args_is_help=True)

Root = Annotated[Path, typer.Option("--output", help="Folder that holds the runs.")]


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


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="A B...", help="Run folders; differences are to the first.")],
    split: Annotated[
        str | None, typer.Option("--split", help="Evaluation to compare (default: test, else a common one).")
    ] = None,
    output: Root = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Compare runs on the same images, with 95 % intervals of the paired differences.

    Each run needs an evaluation of the same split: `rsseg eval --model RUN --split test`.
    """
    from rsseg.report.comparison import compare_runs, score_name
    from rsseg.runs import find_run

    name, compared = compare_runs([find_run(run, output) for run in runs], split)
    if as_json:
        pairs = [(str(c.run.path), c.differences or {}) for c in compared]
        values = [(path, {key: d.model_dump() for key, d in differences.items()}) for path, differences in pairs]
        print_json({"split": name, "runs": [{"run": path, "differences": found} for path, found in values]})
        return
    for other in compared[1:]:
        rows = [
            (
                score_name(key),
                d.first,
                d.second,
                None if d.difference is None else f"{d.difference:+.4f}",
                None if d.interval is None else f"{d.interval.low:+.4f} to {d.interval.high:+.4f}",
            )
            for key, d in (other.differences or {}).items()
        ]
        title = f"{name}: {compared[0].run.path.name} and {other.run.path.name}"
        print_table(("score", "first", "second", "difference", "95 % interval"), rows, title=title)
    for each in compared:
        if each.evaluation.seen is not None:
            print_note(f"{each.run.path}: these images were used for its {each.evaluation.seen}: no independent test.")
    details = compared[0].evaluation.details
    if details is not None:
        print_note(f"Paired differences; {details.bootstrap}.")
