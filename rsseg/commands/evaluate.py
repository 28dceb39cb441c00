"""Accuracy of models and maps: with labels (`eval`), reference points (`sample`, `assess`), none (`gap`, `suggest`)."""

import csv
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsseg.commands.console import (
    AsJson,
    Calibrate,
    Engine,
    Quantize,
    bar,
    print_json,
    print_note,
    print_result,
    print_scores,
    print_table,
    stage_bar,
)
from rsseg.commands.train import wait_passively
from rsseg.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from rsseg.evaluation.assessment import Assessment, Estimate
    from rsseg.evaluation.details import Details
    from rsseg.evaluation.result import Evaluation

MapFile = Annotated[Path, typer.Argument(metavar="MAP", help="Class raster, such as `rsseg predict` writes.")]
StrataFile = Annotated[
    Path | None, typer.Option("--strata", help="Raster of strata on the same grid (default: the map's classes).")
]


def evaluate(
    model: Annotated[
        list[Path] | None,
        typer.Option("--model", help="Run folder or model file (default: the newest run); several are averaged."),
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
    engine: Engine = "torch",
    quantize: Quantize = "none",
    calibrate: Calibrate = None,
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
    of_model = {"--model": model, "--data": data, "--quantize": quantize != "none", "--calibrate": calibrate}
    if pred is not None and (given := [name for name, value in of_model.items() if value]):
        raise UsageError(f"{given[0]}: has no effect on --pred and --truth, for which no model runs. Leave it out.")
    if per_image is not None:
        check_outputs([("--per-image", per_image)], model or (), overwrite=overwrite)
    left_out = tuple(background) if background else None
    with bar("evaluate") as advance:
        if pred is not None and truth is not None:
            from rsseg.evaluation.rasters import evaluate_rasters

            result = evaluate_rasters(pred, truth, background=left_out, progress=advance)
        else:
            how = {"device": device, "engine": engine, "quantize": quantize, "calibrate": calibrate}
            result = _evaluate_model(model, runs, data, split, how, boundary_width, left_out, advance)
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
    models: list[Path] | None,
    runs: Path,
    data: Path | None,
    split: str,
    how: Mapping[str, Any],
    boundary_width: int | None,
    background: tuple[str, ...] | None,
    advance: Callable[[int, int], None],
) -> "Evaluation":
    """Score a model, `how` being options of `evaluate_model`, and keep the result in the run that it belongs to."""
    from rsseg.evaluation.details import BOUNDARY_WIDTH
    from rsseg.evaluation.model import DetailOptions
    from rsseg.evaluation.model_file import evaluate_model
    from rsseg.evaluation.result import save_evaluation
    from rsseg.runs import choose_models, run_of

    files = choose_models(models, runs)
    print_note("\n".join(f"Model: {file}" for file in files))
    run = run_of(files[0]) if len(files) == 1 else None
    name = split if data is None else f"{data.resolve().name}-{split}"
    # Reports and comparisons read the evaluations by torch.
    name += "".join(f"-{part}" for part in (how["engine"], how["quantize"]) if part not in ("torch", "none"))
    pictures = None if run is None else run.evaluation(name).with_suffix("")
    width = BOUNDARY_WIDTH if boundary_width is None else boundary_width
    options = DetailOptions(boundary_width=width, background=background, examples=pictures)
    result = evaluate_model(files, data=data, split=split, progress=advance, details=options, **how)
    if result.quantization is not None:
        print_note(result.quantization.text())
    if run is not None:
        save_evaluation(result, run.evaluation(name))
    return result


def _write_rows(file: Path, result: "Evaluation") -> None:
    from rsseg.evaluation.details import image_rows
    from rsseg.files import write_rows

    if result.details is not None:
        rows = image_rows(result.details, [c.name for c in result.scores.classes])
        file.parent.mkdir(parents=True, exist_ok=True)
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


def suggest(
    model: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder or model file.")],
    scenes: Annotated[list[str], typer.Argument(metavar="SCENES", help="As for predict; or one prepared dataset.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="GeoPackage to write.")],
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Windows to suggest.")] = 50,
    block: Annotated[int, typer.Option("--block", help="Side of a window in pixels.")] = 256,
    per_scene: Annotated[int | None, typer.Option("--per-scene", min=1, help="At most this many of a scene.")] = None,
    factors: Annotated[
        str | None, typer.Option("--factors", help="Multiply uncertainty by rarity, distance or rarity,distance.")
    ] = None,
    chips: Annotated[
        Path | None, typer.Option("--chips", help="New folder for the windows, with predicted masks to correct.")
    ] = None,
    bands: Annotated[
        str | None, typer.Option("--bands", help="Names or numbers of the file's bands, in the model's order: 4,3,2.")
    ] = None,
    nodata: Annotated[float | None, typer.Option("--nodata", help="Nodata value instead of the declared one.")] = None,
    aoi: Annotated[Path | None, typer.Option("--aoi", help="Only inside the polygons of this vector file.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Suggest the windows to label next: those where the model is least sure."""
    wait_passively()
    from rsseg.checkpoint import find_model
    from rsseg.scene.memory import prepare_model
    from rsseg.scene.options import parse_options
    from rsseg.scene.suggest import suggest as suggest_windows

    names = bands.split(",") if bands else None
    options = parse_options(bands=names, nodata=nodata, aoi=aoi, device=device)
    with stage_bar() as progress:
        found = suggest_windows(
            model,
            prepare_model(find_model(model), options),
            scenes,
            output,
            options,
            count=count,
            block=block,
            per_image=per_scene,
            factors=factors.split(",") if factors else (),
            chips=chips,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        print_json(found)
        return
    columns = ("rank", "score", "scene", "row", "column", "reason")
    print_table(columns, [(s.rank, s.score, Path(s.scene).name, s.row, s.col, s.reason) for s in found], decimals=3)
    if len(found) < count:
        print_note(f"There are no more than {len(found)} windows to choose from.")
    if chips is not None:
        print_note(f"Correct the masks in {chips / 'masks'}, then run: rsseg dataset add DATASET --chips {chips}")
    print_result(f"{output}")


def gap(
    first: Annotated[str, typer.Argument(help="Prepared dataset, or scene: raster, folder, pattern, list (.txt).")],
    second: Annotated[str, typer.Argument(help="Another one, with bands of the same names.")],
    backbone: Annotated[
        str, typer.Option("--backbone", help="Network whose features are compared.")
    ] = "tf_efficientnet_lite0",
    weights: Annotated[str, typer.Option("--weights", help="pretrained, or a .safetensors file.")] = "pretrained",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of samples.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare two datasets or scenes without labels: features of a pretrained network, bands, pixel sizes."""
    wait_passively()
    from rsseg.data.index import is_dataset
    from rsseg.evaluation.gap import dataset_gap
    from rsseg.scene.batch import find_scenes

    sets = [Path(name) if is_dataset(Path(name)) else find_scenes([name]) for name in (first, second)]
    with stage_bar() as progress:
        found = dataset_gap(*sets, backbone=backbone, weights=weights, seed=seed, progress=progress)
    if as_json:
        print_json(found)
        return
    rows = [(b.band, *b.mean, *b.std) for b in found.bands]
    print_table(("band", "mean 1", "mean 2", "std 1", "std 2"), rows, decimals=3)
    print_note(f"{found.measure}, features of {found.backbone}, {found.images[0]} and {found.images[1]} images; random")
    print_note(f"halves of the first set differ by up to {found.same:.3f} (95 %)")
    print_result(f"distance {found.distance:.3f} (95 % interval {found.low:.3f} to {found.high:.3f})")
    print_result(found.sentence)


def sample(
    source: MapFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="GeoPackage to write.")],
    per_stratum: Annotated[int | None, typer.Option("--per-stratum", help="Points per stratum.")] = None,
    target_se: Annotated[
        float | None,
        typer.Option("--target-se", help="Or: target standard error of the overall accuracy, such as 0.01."),
    ] = None,
    expected_accuracy: Annotated[
        float, typer.Option("--expected-accuracy", help="Expected user's accuracy, for --target-se.")
    ] = 0.8,
    least: Annotated[int, typer.Option("--least", help="Minimum points per stratum, for --target-se.")] = 50,
    strata: StrataFile = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the random sample.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Draw a stratified random sample of a map as points to label in a GIS (Olofsson et al. 2014)."""
    from rsseg.evaluation.points import SampleSize, draw_points

    size = SampleSize(per_stratum, target_se, expected_accuracy, least)
    drawn = draw_points(source, output, size, strata=strata, seed=seed, overwrite=overwrite)
    if as_json:
        print_json(drawn)
        return
    print_table(("stratum", "pixels", "points"), [(n, drawn.pixels[n], drawn.points[n]) for n in drawn.points])
    for warning in drawn.warnings:
        print_note(f"warning: {warning}")
    print_note(f"Label every point in the field `truth`, then run: rsseg assess {source} {output}")
    print_result(f"{output}")


def assess(
    source: MapFile,
    points: Annotated[Path, typer.Argument(help="Labeled points, in any vector format.")],
    field: Annotated[str, typer.Option("--field", help="Attribute with the true class, as name or value.")] = "truth",
    layer: Annotated[str | None, typer.Option("--layer", help="Layer of the file, if it has several.")] = None,
    strata: StrataFile = None,
    table: Annotated[Path | None, typer.Option("--csv", help="Also write the estimates per class as CSV.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing CSV file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Estimate a map's accuracy and the true areas of its classes, with 95 % intervals, from labeled points."""
    from rsseg.evaluation.points import assess_points
    from rsseg.files import check_outputs, write_text

    if table is not None:
        inputs = [file for file in (source, points, strata) if file is not None]
        check_outputs([("--csv", table)], inputs, overwrite=overwrite)
    result = assess_points(source, points, field=field, strata=strata, layer=layer)
    if table is not None:
        table.parent.mkdir(parents=True, exist_ok=True)
        write_text(table, _csv(result))
    if as_json:
        print_json(result)
        return
    overall = result.overall_accuracy
    columns = ("class", "points", "user's accuracy", "producer's accuracy", "mapped share", "area share", "area (ha)")
    rows = [
        (
            c.name,
            c.points,
            _interval(c.users_accuracy),
            _interval(c.producers_accuracy),
            c.mapped_share,
            _interval(c.area_share),
            None if c.area_ha is None else _interval(c.area_ha, decimals=2),
        )
        for c in result.classes
    ]
    print_table(columns, rows)
    print_result(f"overall accuracy {_interval(overall)} (95 % interval, {result.points} points)")
    for warning in result.warnings:
        print_note(f"warning: {warning}")


def _interval(estimate: "Estimate", *, decimals: int = 3) -> str | None:
    if estimate.value is None:
        return None
    half = "-" if estimate.half_width is None else f"{estimate.half_width:.{decimals}f}"
    return f"{estimate.value:.{decimals}f} ± {half}"


def _csv(result: "Assessment") -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    measures = ("users_accuracy", "producers_accuracy", "area_share", "area_ha")
    writer.writerow(["class", "points", "mapped_share", *(f"{m}{end}" for m in measures for end in ("", "_se", "_95"))])
    overall = result.overall_accuracy
    for c in result.classes:
        estimates = [c.users_accuracy, c.producers_accuracy, c.area_share, c.area_ha]
        cells = [v for e in estimates for v in ((e.value, e.se, e.half_width) if e else (None, None, None))]
        writer.writerow([c.name, c.points, c.mapped_share, *cells])
    writer.writerow(["overall accuracy", result.points, "", overall.value, overall.se, overall.half_width])
    return text.getvalue()
