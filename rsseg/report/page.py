"""The report of a run, and the comparison of several, each as one HTML file that needs no network."""

import base64
import io
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from pydantic import ValidationError

from rsseg.data.index import SegmentationIndex
from rsseg.errors import DataError, UsageError
from rsseg.evaluation.assessment import Assessment, Estimate
from rsseg.evaluation.result import Compared, Evaluation, compare_runs, evaluations_of, score_name
from rsseg.files import read_rows, write_text
from rsseg.inference.network import load_segmenter
from rsseg.report.figures import difference_chart, line_chart, reliability_chart
from rsseg.runs import Manifest, RunFolder
from rsseg.scene.options import Progress, SceneOptions, SceneResult
from rsseg.scene.predict import predict_scene
from rsseg.scene.writer import preview_pictures
from rsseg.task import ClassInfo
from rsseg.text import duration, load_json

REPORT = "report.html"
NO_DATA = "#a8adb5"
_PARTS = ("input.jpg", "truth.png", "prediction.png", "error.png")


@dataclass(frozen=True)
class Row:
    """A class in the tables; None where a value does not exist."""

    name: str
    color: str
    iou: float | None
    low: float | None
    high: float | None
    f1: float | None
    precision: float | None
    recall: float | None
    boundary: float | None
    ece: float | None
    support: int


@dataclass(frozen=True)
class Additions:
    """Sections of a report that a run folder does not hold.

    scenes: rasters to predict with the model of the run and to show
    assessment: file that `rsseg assess --json` wrote
    device: for the scenes
    """

    scenes: Sequence[str] = ()
    assessment: Path | None = None
    device: str = "auto"


@dataclass(frozen=True)
class ScenePicture:
    """A predicted scene; `pictures` are data URIs of input and classes."""

    name: str
    pictures: tuple[str, str]
    result: SceneResult


def write_report(run: RunFolder, additions: Additions | None = None, *, progress: Progress | None = None) -> Path:
    """Write `report.html` into a run folder, replacing an earlier one; return the file.

    Args:
        run: with at least one evaluation.
        additions: further sections.
        progress: called with the number of finished tiles and of all tiles of each scene.

    Raises:
        UsageError: the run has no evaluation, or is not readable.
        DataError: an evaluation, the assessment or a scene is missing or damaged, or a scene lacks bands.
        WeightsError: there are scenes, but the run has no model.
        MachineError: the file cannot be written, or a scene does not fit into memory.
    """
    additions = additions or Additions()
    manifest, evaluations = run.manifest(), evaluations_of(run)
    assessment = None if additions.assessment is None else _load_assessment(additions.assessment)
    name, main = next(iter(evaluations.items()))
    classes = _classes(run, manifest)
    steps, metrics = read_rows(run.path / "steps.csv"), read_rows(run.path / "metrics.csv")
    assert main.details is not None  # for the type checker: `evaluations_of` returns no others
    calibration = main.details.calibration
    page = _environment().get_template("report.html.j2")
    text = page.render(
        run=run,
        manifest=manifest,
        plan=manifest.plan,
        name=name,
        main=main,
        details=main.details,
        evaluations=evaluations,
        rows=_rows(main, classes),
        matrix=_matrix(main, manifest),
        colors={info.name: _hex(info) for info in classes},
        kept=[c.name for c in main.scores.classes],
        images=sorted(main.details.images, key=lambda image: (image.miou is None, image.miou or 0.0)),
        examples=_examples(run, name, main),
        charts=[Markup(svg) for svg in _curves(manifest, steps, metrics)],
        reliability=None if calibration is None else Markup(reliability_chart(calibration)),
        no_data=NO_DATA,
        scenes=_scenes(run, additions, progress),
        assessment=assessment,
        assessment_file=additions.assessment,
        cost=_cost(manifest, steps, main),
        commands=_commands(run, manifest, additions),
        made=datetime.now().astimezone().isoformat(timespec="minutes"),
    )
    file = run.path / REPORT
    write_text(file, text)
    return file


def write_comparison(runs: Sequence[RunFolder], file: Path, split: str | None = None) -> Path:
    """Write the comparison of two or more runs; see `compare_runs` for the errors."""
    name, compared = compare_runs(runs, split)
    curves = {}
    for run in runs:
        manifest = run.manifest()
        points = _points(read_rows(run.path / "metrics.csv"), manifest.monitor)
        if points[0]:
            curves[_short_name(run, runs)] = points
    labels = [_short_name(run, runs) for run in runs]
    text = (
        _environment()
        .get_template("comparison.html.j2")
        .render(
            name=name,
            compared=list(zip(labels, compared, strict=True)),
            first=compared[0],
            bootstrap="" if compared[0].evaluation.details is None else compared[0].evaluation.details.bootstrap,
            scores=list(next(iter(c.differences for c in compared if c.differences is not None))),
            charts=[
                Markup(chart)
                for chart in (
                    *([line_chart(curves, title="Validation score")] if curves else []),
                    *(_difference_charts(labels, compared)),
                )
            ],
            manifests=[run.manifest() for run in runs],
            command=shlex.join(
                ["rsseg", "report", *(str(run.path) for run in runs), "--split", name, "--output", str(file)]
            ),
            made=datetime.now().astimezone().isoformat(timespec="minutes"),
        )
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text)
    return file


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"score": _score, "count": _count, "signed": _signed, "estimate": _estimate}
    environment.globals |= {"score_name": score_name, "zip": zip}
    return environment


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _estimate(estimate: Estimate | None, decimals: int = 3) -> str:
    """With half of its 95 % interval."""
    if estimate is None or estimate.value is None:
        return "–"
    half = "" if estimate.half_width is None else f" ± {estimate.half_width:,.{decimals}f}"
    return f"{estimate.value:,.{decimals}f}{half}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def _count(value: int) -> str:
    """With thin spaces between thousands."""
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _hex(info: ClassInfo) -> str:
    return "#{:02x}{:02x}{:02x}".format(*info.color)


def _classes(run: RunFolder, manifest: Manifest) -> tuple[ClassInfo, ...]:
    """Classes of the task with the colours of the dataset; merged classes take colours of their own."""
    try:
        text = (run.path / "data.json").read_text(encoding="utf-8")
        values = load_json(text, str(run.path / "data.json"), UsageError) | {"items": []}
        known = {info.name: info for info in SegmentationIndex.model_validate(values).task.classes}
    except (OSError, ValidationError):
        known = {}
    return tuple(
        known.get(name, ClassInfo(name=name, value=i, color=(37 * i % 256, 101 * i % 256, 173 * i % 256)))
        for i, name in enumerate(manifest.plan["classes"])
    )


def _rows(evaluation: Evaluation, classes: tuple[ClassInfo, ...]) -> list[Row]:
    details = evaluation.details
    assert details is not None  # for the type checker
    by_name = {info.name: (i, info) for i, info in enumerate(classes)}
    calibration = details.calibration
    error = None if calibration is None else calibration.after or calibration.before
    rows = []
    for c in evaluation.scores.classes:
        index, info = by_name[c.name]
        interval = details.intervals.get(f"iou_{c.name}")
        rows.append(
            Row(
                name=c.name,
                color=_hex(info),
                iou=c.iou,
                low=None if interval is None else interval.low,
                high=None if interval is None else interval.high,
                f1=c.f1,
                precision=c.precision,
                recall=c.recall,
                boundary=details.boundary_classes.get(c.name),
                ece=None if error is None else error.classes[index],
                support=c.support,
            )
        )
    return sorted(rows, key=lambda row: -1.0 if row.iou is None else row.iou, reverse=True)


def _matrix(evaluation: Evaluation, manifest: Manifest) -> list[tuple[str, list[tuple[int, float]]]]:
    """Per labeled class: pixels and shares of each predicted class."""
    rows = []
    for name, counts in zip(manifest.plan["classes"], evaluation.counts, strict=False):
        total = sum(counts)
        rows.append((str(name), [(count, count / total if total else 0.0) for count in counts]))
    return rows


def _points(rows: Sequence[Mapping[str, str]], column: str) -> tuple[list[float], list[float]]:
    known = [(float(row["step"]), float(row[column])) for row in rows if row.get(column)]
    return [step for step, _ in known], [value for _, value in known]


def _curves(manifest: Manifest, steps: Sequence[Mapping[str, str]], metrics: Sequence[Mapping[str, str]]) -> list[str]:
    charts = []
    if steps:
        names = [column for column in steps[0] if column.startswith("loss_")]
        losses = {name.removeprefix("loss_"): _points(steps, name) for name in names}
        total = _points(steps, "loss")
        lines = {"total": total, **losses} if len(losses) > 1 else {"loss": total}
        charts.append(line_chart({k: v for k, v in lines.items() if v[0]}, title="Training loss", log=True))
    shown = {label: _points(metrics, key) for key, label in (("miou", "mIoU"), ("mf1", "mF1"), ("oa", "OA"))}
    if any(values for _, values in shown.values()):
        best = None if manifest.best_step is None else float(manifest.best_step)
        charts.append(line_chart({k: v for k, v in shown.items() if v[0]}, title="Validation scores", best=best))
        per_class = {str(name): _points(metrics, f"iou_{name}") for name in manifest.plan["classes"]}
        charts.append(line_chart({k: v for k, v in per_class.items() if v[0]}, title="Validation IoU per class"))
    if steps:
        names = [column for column in steps[0] if column.startswith("lr_")]
        rates = {name.removeprefix("lr_"): _points(steps, name) for name in names}
        charts.append(line_chart({k: v for k, v in rates.items() if v[0]}, title="Learning rate"))
    return charts


def _examples(run: RunFolder, name: str, evaluation: Evaluation) -> list[tuple[str, str, float | None, list[str]]]:
    """Kind, image, its mIoU, and data URIs of input, truth, prediction and error."""
    details = evaluation.details
    assert details is not None  # for the type checker
    scores = {image.image: image.miou for image in details.images}
    folder = run.evaluation(name).with_suffix("")
    found = []
    for example in details.examples:
        files = [folder / f"{example.name}-{part}" for part in _PARTS]
        if all(file.is_file() for file in files):
            uris = [_data_uri(file) for file in files]
            found.append((example.name.partition("-")[0], example.image, scores.get(example.image), uris))
    return found


def _data_uri(file: Path) -> str:
    return _uri("jpeg" if file.suffix == ".jpg" else "png", file.read_bytes())


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _scenes(run: RunFolder, additions: Additions, progress: Progress | None) -> list[ScenePicture]:
    """Predict the scenes; the class rasters are dropped once they are drawn."""
    if not additions.scenes:
        return []
    segmenter, found = load_segmenter(run.path), []
    for scene in additions.scenes:
        with tempfile.TemporaryDirectory(prefix="rsseg-report-") as folder:
            options = SceneOptions(device=additions.device)
            result = predict_scene(segmenter, scene, Path(folder) / "classes.tif", options, progress=progress)
            image, classes = (_on_gray(picture) for picture in preview_pictures(scene, result.output, segmenter.task))
        uris = _encoded(image, "jpeg", quality=85), _encoded(classes, "png", optimize=True)
        found.append(ScenePicture(scene, uris, result))
    return found


def _on_gray(picture: Image.Image) -> Image.Image:
    """No data in a colour that neither page nor usual classes have; the template names it."""
    paper = Image.new("RGB", picture.size, NO_DATA)
    paper.paste(picture, mask=picture)
    return paper


def _encoded(picture: Image.Image, kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return _uri(kind, buffer.getvalue())


def _load_assessment(file: Path) -> Assessment:
    try:
        return Assessment.model_validate_json(file.read_bytes())
    except OSError as error:
        problem = str(error.strerror)
    except ValidationError:
        problem = "not the result of an assessment"
    raise DataError(f"{file}: {problem}. Write it with `rsseg assess MAP POINTS --json > {file}`.")


def _cost(manifest: Manifest, steps: Sequence[Mapping[str, str]], main: Evaluation) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = [("device", str(manifest.plan["device_name"]))]
    if manifest.finished:
        wall = datetime.fromisoformat(manifest.finished) - datetime.fromisoformat(manifest.created)
        rows.append(("training, with all evaluations", duration(wall.total_seconds())))
    speeds = sorted(float(row["images_per_s"]) for row in steps if row.get("images_per_s"))
    if speeds:
        rows.append(("training speed, median", f"{speeds[len(speeds) // 2]:.1f} images/s"))
        rows.append(("peak memory", f"{max(float(row['memory_mb']) for row in steps) / 1000:.2f} GB"))
    rows.append(("this evaluation", f"{duration(main.seconds)} for {main.images} images"))
    rows.append(("parameters shipped", f"{manifest.plan['parameters'] / 1e6:.2f} M"))
    return rows


def _commands(run: RunFolder, manifest: Manifest, additions: Additions) -> list[tuple[str, str]]:
    path = str(run.path)
    added = [word for scene in additions.scenes for word in ("--scene", scene)]
    if additions.assessment is not None:
        added += ["--assessment", str(additions.assessment)]
    return [
        ("train again, with the same seed", shlex.join(["rsseg", "train", "--recipe", str(run.recipe_file)])),
        ("as it was started", shlex.join(["rsseg", *manifest.command[1:]])),
        ("evaluate", shlex.join(["rsseg", "eval", "--model", path, "--split", "test"])),
        ("predict a scene", shlex.join(["rsseg", "predict", "scene.tif", "--model", path, "--confidence"])),
        ("this page", shlex.join(["rsseg", "report", path, *added])),
    ]


def _short_name(run: RunFolder, runs: Sequence[RunFolder]) -> str:
    """The folder's name, or its path where two runs have the same name."""
    same = [other for other in runs if other.path.name == run.path.name]
    return run.path.name if len(same) == 1 else str(run.path)


def _difference_charts(labels: Sequence[str], compared: Sequence[Compared]) -> list[str]:
    charts = []
    for label, other in zip(labels, compared, strict=True):
        rows = [
            (score_name(key), d.difference, d.interval.low, d.interval.high)
            for key, d in (other.differences or {}).items()
            if d.difference is not None and d.interval is not None
        ]
        if rows:
            charts.append(difference_chart(rows, title=f"{label} minus {labels[0]}"))
    return charts
