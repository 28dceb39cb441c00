"""`rsseg eval`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rsseg.commands.console import AsJson, bar, print_json, print_note, print_scores, print_table
from rsseg.commands.train import wait_passively
from rsseg.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from rsseg.evaluation.details import Details
    from rsseg.evaluation.result import Evaluation


def evaluate(
    model: Annotated[
        Path | None, typer.Option("--model", help="Run folder or model file (default: the newest run).")
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Prepared dataset (default: the recipe's).")] = None,
    split: Annotated[str, typer.Option("--split", help="Split of the dataset.")] = "test",
    pred: Annotated[
        Path | None,
        typer.Option("--pred", help="Folder of class rasters (of `rsseg predict`) to score instead."),
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option("--truth", help="Folder of reference class rasters; 255 and nodata are unlabeled."),
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", help="Folder that holds the runs.")] = Path("runs"),
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    fail_under: Annotated[
        str | None, typer.Option("--fail-under", metavar="SCORE=VALUE", help="Exit 8 below it: miou=0.7.")
    ] = None,
    per_image: Annotated[
        Path | None, typer.Option("--per-image", help="Also write the scores of each image to this CSV file.")
    ] = None,
    by: Annotated[
        str | None, typer.Option("--by", metavar="domain|scene", help="Also print the scores of each domain or scene.")
    ] = None,
    boundary_width: Annotated[
        int | None,
        typer.Option("--boundary-width", min=0, max=100, help="Boundary IoU: pixels from a border (2); 0: none."),
    ] = None,
    background: Annotated[
        list[str] | None,
        typer.Option("--background", help="Class to leave out of a second mIoU (default: background or clutter)."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --per-image.")] = False,
    as_json: AsJson = False,
) -> None:
    """Score a model on labeled data (the newest finished run on its test split), or two folders of rasters.

    The evaluation of a run is kept in its folder for `rsseg report` and `rsseg runs compare`.
    """
    wait_passively()
    from rsseg.files import check_outputs

    bound = _parse_bound(fail_under)
    _check_options(pred, truth, boundary_width, by)
    if per_image is not None:
        check_outputs([("--per-image", per_image)], [], overwrite=overwrite)
    left_out = tuple(background) if background else None
    with bar("evaluate") as advance:
        if pred is not None and truth is not None:
            from rsseg.evaluation.rasters import evaluate_rasters

            result = evaluate_rasters(pred, truth, background=left_out, progress=advance)
        else:
            result = _evaluate_model(model, runs, data, split, device, boundary_width, left_out, advance)
    scores = result.scores
    if as_json:
        print_json(result)
    else:
        print_scores(scores)
        if result.details is not None:
            _print_details(result.details, by)
    if per_image is not None:
        _write_rows(per_image, result)
    if result.seen is not None:
        print_note(f"These {result.images} images were used for the {result.seen} of this model: no independent test.")
    if result.unpredicted:
        print_note(f"{result.unpredicted} labeled pixels have no prediction; they are excluded from the scores.")
    if bound is not None:
        name, value = bound
        found = getattr(scores, name)
        if found is None or found < value:
            # All digits if the rounded score would look like one that passes.
            text = "not defined" if found is None else f"{found:.4f}" if round(found, 4) < value else str(found)
            raise CheckFailed(f"{name} is {text}, below {value:g}.")


def _check_options(pred: Path | None, truth: Path | None, boundary_width: int | None, by: str | None) -> None:
    if (pred is None) != (truth is None):
        raise UsageError("--pred and --truth belong together: give both folders.")
    if pred is not None and boundary_width:
        raise UsageError("--boundary-width: not measured between class rasters. Give --model and --data instead.")
    if by not in (None, "domain", "scene"):
        raise UsageError(f"--by {by}: choose domain or scene.")


def _evaluate_model(
    model: Path | None,
    runs: Path,
    data: Path | None,
    split: str,
    device: str,
    boundary_width: int | None,
    background: tuple[str, ...] | None,
    advance: Callable[[int, int], None],
) -> "Evaluation":
    """Score a model, and keep the result in the run that it belongs to."""
    from rsseg.evaluation.details import BOUNDARY_WIDTH
    from rsseg.evaluation.model import DetailOptions, evaluate_model
    from rsseg.evaluation.result import save_evaluation
    from rsseg.runs import choose_model, run_of

    file = choose_model(model, runs)
    print_note(f"Model: {file}")
    run, name = run_of(file), split if data is None else f"{data.resolve().name}-{split}"
    pictures = None if run is None else run.evaluation(name).with_suffix("")
    width = BOUNDARY_WIDTH if boundary_width is None else boundary_width
    options = DetailOptions(boundary_width=width, background=background, examples=pictures)
    result = evaluate_model(file, data=data, split=split, device=device, progress=advance, details=options)
    if run is not None:
        save_evaluation(result, run.evaluation(name))
    return result


def _write_rows(file: Path, result: "Evaluation") -> None:
    from rsseg.evaluation.details import image_rows
    from rsseg.files import write_rows

    if result.details is not None:
        rows = image_rows(result.details, [c.name for c in result.scores.classes])
        write_rows(file, rows, list(rows[0]))


def _print_details(details: "Details", by: str | None) -> None:
    ranges = {name: f"{i.low:.4f} to {i.high:.4f}" for name, i in details.intervals.items()}
    rows: list[tuple[str, float | None, str | None]] = []
    if details.background:
        name = f"mIoU without {', '.join(details.background)}"
        rows.append((name, details.miou_without_background, ranges.get("miou_without_background")))
    if details.boundary_width:
        name = f"boundary mIoU ({details.boundary_width} px)"
        rows.append((name, details.boundary_miou, ranges.get("boundary_miou")))
    if (calibration := details.calibration) is not None:
        rows.append(("calibration error, as trained", calibration.before.ece, None))
        if calibration.after is not None:
            rows.append(("calibration error, with temperature", calibration.after.ece, None))
    if ranges:
        print_note(f"mIoU {ranges.get('miou')}, OA {ranges.get('oa')}: {details.bootstrap}")
    if rows:
        print_table(("score", "value", "95 % interval"), rows)
    if calibration is not None and calibration.fitted_on:
        print_note(f"The temperature was fitted on {calibration.fitted_on}.")
    if by is None:
        return
    if groups := details.domains if by == "domain" else details.scenes:
        columns = (by, "images", "mIoU", "mF1", "OA", "boundary mIoU")
        lines = [(g.name, g.images, g.scores.miou, g.scores.mf1, g.scores.oa, g.boundary_miou) for g in groups]
        print_table(columns, lines)
    else:
        print_note(f"The images of this split have no {by} that joins several of them.")


def _parse_bound(text: str | None) -> tuple[str, float] | None:
    if text is None:
        return None
    name, _, value = text.partition("=")
    try:
        if name in ("miou", "mf1", "oa") and 0 <= (bound := float(value)) <= 1:
            return name, bound
    except ValueError:
        pass
    raise UsageError(f"--fail-under {text}: write miou=0.7, mf1=0.7 or oa=0.7, with a value from 0 to 1.")
