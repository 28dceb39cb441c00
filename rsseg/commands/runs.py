"""`rsseg runs`, `rsseg report` and `rsseg export`: list, show, compare, report and export runs."""

from pathlib import Path
from typing import Annotated

import typer

from rsseg.commands.console import AsJson, bar, print_facts, print_json, print_note, print_result, print_table
from rsseg.commands.train import wait_passively
from rsseg.errors import UsageError

app = typer.Typer(help="List, show and compare runs.", no_args_is_help=True)

_TARGETS = "onnx, deepness, geodeep, torch-export or stac-mlm"
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
    from rsseg.evaluation.result import compare_runs, score_name
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
    scenes: Annotated[
        list[str] | None, typer.Option("--scene", help="Predict this scene and show it; may be given several times.")
    ] = None,
    assessment: Annotated[
        Path | None, typer.Option("--assessment", help="Show this result of `rsseg assess --json`.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="For --scene: auto, cpu, cuda or cuda:N.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of a comparison.")] = False,
) -> None:
    """Write the report of a run into its folder, or the comparison of several: one HTML file each.

    Examples: rsseg report runs/latest
              rsseg report runs/latest --scene scene.tif --assessment assessment.json
              rsseg report runs/first runs/second -o comparison.html
    """
    wait_passively()
    from rsseg.files import check_outputs
    from rsseg.report.page import Additions, write_comparison, write_report
    from rsseg.runs import find_run

    found = [find_run(run, root) for run in runs] if runs else [find_run(None, root)]
    if len(found) == 1:
        if output is not None or split is not None:
            raise UsageError("--output and --split are for comparisons; the report of one run lies in its folder.")
        with bar("predict") as advance:
            written = write_report(found[0], Additions(scenes or (), assessment, device), progress=advance)
        print_result(str(written))
        return
    if scenes or assessment is not None:
        raise UsageError("--scene and --assessment are for the report of one run, not for comparisons.")
    file = output or Path("comparison.html")
    check_outputs([("--output", file)], [], overwrite=overwrite)
    print_result(str(write_comparison(found, file, split)))


def export(
    model: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Run folder or model file (default: the newest run).")
    ] = None,
    target: Annotated[str, typer.Option("--for", metavar="TARGET", help=f"Program: {_TARGETS}.")] = "onnx",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write (default: beside the model).")
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", help="Folder that holds the runs.")] = Path("runs"),
    tile: Annotated[
        int | None, typer.Option("--tile", min=1, help="Side of the network's input (default: 1024 or training size).")
    ] = None,
    resolution: Annotated[
        float | None,
        typer.Option("--resolution", min=1e-3, help="Centimetres per pixel (default: of the training data)."),
    ] = None,
    check: Annotated[
        str | None, typer.Option("--check", metavar="SCENE", help="Compare classes with rsseg's own on this scene.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a model for other programs: ONNX (QGIS Deepness, geodeep, any runtime), torch.export, or a STAC item."""
    wait_passively()
    from rsseg.export.targets import ENDINGS, TARGETS
    from rsseg.runs import choose_model

    chosen = next((name for name in TARGETS if name == target), None)
    if chosen is None:
        raise UsageError(f"--for {target}: choose {_TARGETS}.")
    if chosen == "stac-mlm" and (tile, check) != (None, None):
        raise UsageError("--for stac-mlm describes a model and runs nothing. Leave out --tile and --check.")
    file = choose_model(model, runs)
    print_note(f"Model: {file}")
    from rsseg.export.model import export_model

    result = export_model(
        file,
        chosen,
        output or file.with_suffix(ENDINGS.get(chosen, ".onnx")),
        tile=tile,
        resolution_cm=resolution,
        check=check,
        overwrite=overwrite,
    )
    if as_json:
        print_json(result)
        return
    if result.agreement is not None:
        share, pixels = result.agreement
        print_note(f"{share:.3%} of {pixels} pixels have rsseg's own class.")
    print_result(f"{result.output}")
