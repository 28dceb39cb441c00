"""`rsseg eval`."""

from pathlib import Path
from typing import Annotated

import typer

from rsseg.commands.console import print_json, print_note, print_scores
from rsseg.commands.launch import wait_passively
from rsseg.errors import CheckFailed, UsageError


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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a model on labeled data (the newest finished run on its test split), or two folders of rasters."""
    wait_passively()
    from rsseg.commands.progress import bar

    bound = _parse_bound(fail_under)
    if (pred is None) != (truth is None):
        raise UsageError("--pred and --truth belong together: give both folders.")
    with bar("evaluate") as advance:
        if pred is not None and truth is not None:
            from rsseg.evaluation.rasters import evaluate_rasters

            result = evaluate_rasters(pred, truth, progress=advance)
        else:
            from rsseg.evaluation.model import evaluate_model
            from rsseg.runs import choose_model

            file = choose_model(model, runs)
            print_note(f"Model: {file}")
            result = evaluate_model(file, data=data, split=split, device=device, progress=advance)
    scores = result.scores
    if as_json:
        print_json(result)
    else:
        print_scores(scores)
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
