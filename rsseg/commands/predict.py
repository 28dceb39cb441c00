"""`rsseg predict`."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from rsseg.commands.console import print_error, print_json, print_note, print_result, print_table
from rsseg.commands.launch import silent, start_workers
from rsseg.errors import Interrupted, PartialFailure, RssegError, UsageError

if TYPE_CHECKING:
    from rsseg.scene.batch import Outcome, Target
    from rsseg.scene.options import SceneOptions
    from rsseg.scene.plan import Ready
    from rsseg.scene.share import Share
    from rsseg.task import Task

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def predict(
    scenes: Annotated[
        list[str], typer.Argument(metavar="SCENE...", help="Rasters, folders, patterns, lists (.txt), URLs.")
    ],
    model: Annotated[Path | None, typer.Option("--model", help="Run folder or model file; the newest run.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File for one scene, folder for several: STEM_rsseg.tif.")
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", help="Folder that holds the runs.")] = Path("runs"),
    tile: Annotated[int | None, typer.Option("--tile", help="Tile side in pixels; the model's own.")] = None,
    overlap: Annotated[int | None, typer.Option("--overlap", help="Pixels shared by tiles; the model's own.")] = None,
    blend: Annotated[str, typer.Option("--blend", help="crop, hann or mean.")] = "crop",
    tta: Annotated[str, typer.Option("--tta", help="none, flip or d4: views of each tile to average.")] = "none",
    bands: Annotated[
        str | None, typer.Option("--bands", help="Names or numbers of the file's bands, in the model's order: 4,3,2.")
    ] = None,
    nodata: Annotated[
        float | None, typer.Option("--nodata", help="Value without data, if not declared; nan too.")
    ] = None,
    zero_collar: Annotated[bool, typer.Option("--zero-collar", help="No data where all bands are 0.")] = False,
    aoi: Annotated[
        Path | None, typer.Option("--aoi", help="Only within these polygons (.geojson, .gpkg), in any CRS.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Tiles at once; by memory.")] = None,
    max_memory: Annotated[str | None, typer.Option("--max-memory", help="Beside the libraries: 800M or 2GiB.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    file_format: Annotated[str, typer.Option("--format", help="cog or gtiff.")] = "cog",
    confidence: Annotated[
        bool, typer.Option("--confidence", help="Also STEM_confidence.tif: probability of the class.")
    ] = False,
    probabilities: Annotated[
        str, typer.Option("--probabilities", help="uint8 or float16: also STEM_probabilities.tif, a band per class.")
    ] = "none",
    polygons: Annotated[
        Path | None,
        typer.Option("--polygons", help="Also polygons: .gpkg, .geojson or .parquet; several scenes: the ending only."),
    ] = None,
    min_area: Annotated[
        float, typer.Option("--min-area", min=0, help="Leave out smaller polygons: m2, or pixels without a map CRS.")
    ] = 0.0,
    simplify: Annotated[
        float, typer.Option("--simplify", min=0, help="Pixels by which common borders of polygons may move.")
    ] = 0.0,
    preview: Annotated[Path | None, typer.Option("--preview", help="Also a PNG with scene, classes, legend.")] = None,
    part: Annotated[str, typer.Option("--part", metavar="I/N", help="Share scenes among N machines.")] = "1/1",
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Skip outputs made from same scene, model, options.")
    ] = False,
    resume_scene: Annotated[
        bool, typer.Option("--resume-scene", help="Keep finished rows; after an interruption, go on from them.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Processes that share each scene, one per GPU.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, then stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Segment scenes of any size; the output has the grid, CRS and nodata of the input."""
    from rsseg.inference.device import own_device
    from rsseg.inference.network import load_segmenter
    from rsseg.runs import choose_model
    from rsseg.scene.batch import choose_targets, find_scenes
    from rsseg.scene.plan import Ready, settle
    from rsseg.scene.share import Share
    from rsseg.vector.write import PolygonOptions

    share = Share.from_environment(os.environ)
    found = find_scenes(scenes)
    targets = choose_targets(found, output, _part(part))
    options = _options(
        tile=tile,
        overlap=overlap,
        blend=blend,
        tta=tta,
        bands=bands.split(",") if bands else None,
        nodata=nodata,
        zero_collar=zero_collar,
        aoi=aoi,
        batch_size=batch_size,
        max_memory=_bytes(max_memory),
        device=str(own_device(device, int(os.environ["LOCAL_RANK"]) if share.count > 1 else None)),
        format=file_format,
        confidence=confidence,
        probabilities=probabilities,
        resume=resume_scene,
        overwrite=overwrite,
    )
    extras = _Extras(polygons, PolygonOptions(min_area, simplify), preview, len(found), overwrite=overwrite)
    if not targets:
        print_note(f"No scene belongs to part {part}.")
        return
    file = choose_model(model, runs)
    if gpus > 1 and share.count == 1 and not dry_run:
        raise typer.Exit(start_workers(gpus))
    with silent(not share.is_main):
        print_note(f"Model: {file}")
        ready = Ready.of(load_segmenter(file), options)
        if dry_run:
            for target in targets:
                print_result(settle(ready, target.scene, target.output, options).describe().text())
            return
        with _interruptible(resume_scene=resume_scene, several=len(found) > 1):
            outcomes = _run(ready, targets, options, extras, skip_existing=skip_existing, share=share)
    if not share.is_main:
        return
    if as_json:
        print_json([o.result for o in outcomes if o.result] if len(found) == 1 else outcomes)
    failures = [str(o.error) for o in outcomes if o.status == "failed"]
    if failures:
        raise PartialFailure(f"{len(failures)} of {len(outcomes)} scenes failed:\n" + "\n".join(failures))
    if not as_json:
        _print(outcomes)


class _Extras:
    """What is made from a finished class raster."""

    def __init__(
        self, polygons: Path | None, settings: Any, preview: Path | None, scenes: int, *, overwrite: bool
    ) -> None:
        from rsseg.vector.write import SUFFIXES, check_polygon_output

        self._polygons, self._settings, self._preview, self._overwrite = polygons, settings, preview, overwrite
        if preview is not None and scenes > 1:
            raise UsageError("--preview draws one scene; give one scene.")
        self._ending = polygons is not None and polygons.name.lower() in SUFFIXES
        if polygons is None:
            return
        if scenes > 1 and not self._ending:
            raise UsageError(f"--polygons {polygons}: for several scenes give the ending only, such as .gpkg.")
        # An ending alone has no file to look for yet.
        check_polygon_output(polygons.with_name(f"x{polygons.name}") if self._ending else polygons, overwrite=overwrite)

    def make(self, target: "Target", task: "Task") -> None:
        """Polygons and picture of one scene."""
        if self._polygons is not None:
            from rsseg.vector.write import write_polygons

            file = target.output.with_suffix(self._polygons.name) if self._ending else self._polygons
            count = write_polygons(target.output, task, file, self._settings, overwrite=self._overwrite)
            print_note(f"{count} polygons: {file}")
        if self._preview is not None:
            from rsseg.scene.preview import draw_preview

            draw_preview(target.scene, target.output, task, self._preview)


def _run(
    ready: "Ready",
    targets: "list[Target]",
    options: "SceneOptions",
    extras: _Extras,
    *,
    skip_existing: bool,
    share: "Share",
) -> "list[Outcome]":
    from rsseg.commands.progress import stage_bar
    from rsseg.scene.batch import Outcome, predict_scenes
    from rsseg.scene.plan import settle
    from rsseg.scene.predict import run

    task = ready.network.task
    with stage_bar() as advance:

        def progress(target: "Target") -> Any:
            number = f"{targets.index(target) + 1}/{len(targets)} " if len(targets) > 1 else ""
            return lambda done, total: advance(f"{number}{Path(target.scene).name}", done, total)

        if len(targets) == 1 and not skip_existing:
            # One scene fails with its own exit code.
            (target,) = targets
            with share.of_scene(target.output, resume=options.resume):
                setup = settle(ready, target.scene, target.output, options)
                print_note(setup.describe().text())
                result = run(setup, progress=progress(target), share=share)
                if result is not None:
                    extras.make(target, task)
                    return [Outcome.of(target, result)]
            return []
        outcomes = []
        for target, outcome in zip(
            targets,
            predict_scenes(
                ready,
                targets,
                options,
                skip_existing=skip_existing,
                journal=len(targets) > 1,
                on_plan=lambda plan: print_note(plan.text()),
                progress=progress,
                share=share,
            ),
            strict=True,
        ):
            if outcome.status == "skipped":
                print_note(f"{target.scene}: {target.output} is up to date.")
            outcomes.append(_with_extras(outcome, target, task, extras))
        return outcomes


def _with_extras(outcome: "Outcome", target: "Target", task: "Task", extras: _Extras) -> "Outcome":
    try:
        if outcome.result is not None:
            extras.make(target, task)
    except RssegError as error:
        outcome = outcome.model_copy(update={"status": "failed", "error": str(error)})
    if outcome.error is not None:
        print_error(outcome.error)
    return outcome


def _print(outcomes: "list[Outcome]") -> None:
    for outcome in outcomes:
        if outcome.result is not None:
            areas = outcome.result.areas
            columns = ("class", "pixels", "share", "area (ha)")
            print_table(columns, [(a.name, a.pixels, a.share, a.hectares) for a in areas])
            for file in outcome.result.extra_outputs:
                print_note(f"{file}")
        if outcome.status != "failed":
            print_result(f"{outcome.output}")


@contextmanager
def _interruptible(*, resume_scene: bool, several: bool) -> Iterator[None]:
    """Let SIGTERM, which schedulers send, end the work like Ctrl-C does, and say how to go on."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        lost = "its finished rows are kept" if resume_scene else "what was done of it is discarded"
        hints = ["--resume-scene"] if resume_scene else []
        hints += ["--skip-existing"] if several else []
        again = f" with {' '.join(hints)}" if hints else ""
        raise Interrupted(f"Interrupted; the scene is not complete, {lost}. Run the command again{again}.") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _options(**values: Any) -> "SceneOptions":
    from rsseg.scene.options import SceneOptions

    try:
        return SceneOptions.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = "--" + str(first["loc"][0]).replace("_", "-")
        raise UsageError(f"{name} {first['input']}: {first['msg'].lower()}.") from None


def _bytes(text: str | None) -> int | None:
    if text is None:
        return None
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = number[-1:] if number[-1:].isalpha() else ""
    try:
        size = int(float(number.removesuffix(unit)) * _UNITS[unit])
        if size < 1:
            raise ValueError
    except (KeyError, ValueError):
        raise UsageError(f"--max-memory {text}: write 800M or 2GiB.") from None
    return size


def _part(text: str) -> tuple[int, int]:
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal()):
        raise UsageError(f"--part {text}: write 1/4 for the first of four parts.")
    return int(number), int(parts)
