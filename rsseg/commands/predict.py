"""`rsseg predict`."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsseg.commands.console import (
    AsJson,
    Calibrate,
    Engine,
    Quantize,
    bar,
    print_error,
    print_json,
    print_note,
    print_result,
    print_table,
    stage_bar,
)
from rsseg.commands.train import silent, start_workers, wait_passively
from rsseg.errors import Interrupted, PartialFailure, UsageError
from rsseg.text import byte_size

if TYPE_CHECKING:
    from rsseg.checkpoint import Calibration
    from rsseg.scene.batch import SceneJob, Target
    from rsseg.scene.cluster import Cluster
    from rsseg.scene.options import ClassArea, Outcome, SceneOptions
    from rsseg.scene.share import Share


def predict(
    scenes: Annotated[
        list[str],
        typer.Argument(metavar="SCENE...", help="Rasters, folders, patterns, lists (.txt), STAC items (.json), URLs."),
    ],
    model: Annotated[
        list[Path] | None,
        typer.Option("--model", help="Run folder or model file (default: the newest run); several are averaged."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File for one scene, folder for several: STEM_rsseg.tif.")
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", help="Folder that holds the runs.")] = Path("runs"),
    tile: Annotated[int | None, typer.Option("--tile", help="Tile side in pixels (default: the model's).")] = None,
    overlap: Annotated[
        int | None, typer.Option("--overlap", help="Pixels shared by neighbouring tiles (default: the model's).")
    ] = None,
    blend: Annotated[str, typer.Option("--blend", help="crop, hann or mean.")] = "crop",
    tta: Annotated[str, typer.Option("--tta", help="none, flip or d4: views of each tile to average.")] = "none",
    bands: Annotated[
        str | None, typer.Option("--bands", help="Names or numbers of the file's bands, in the model's order: 4,3,2.")
    ] = None,
    nodata: Annotated[
        float | None, typer.Option("--nodata", help="Nodata value instead of the declared one; nan is added to it.")
    ] = None,
    gsd: Annotated[
        float | None, typer.Option("--gsd", help="Resample the scenes to this ground sampling distance in metres.")
    ] = None,
    zero_collar: Annotated[
        bool, typer.Option("--zero-collar", help="Treat pixels that are 0 in all bands as nodata.")
    ] = False,
    aoi: Annotated[
        Path | None, typer.Option("--aoi", help="Predict only inside the polygons of this vector file (any CRS).")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Tiles per batch (default: by memory).")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", help="Memory limit without the libraries, such as 2GiB.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="auto (bfloat16 where native), float32, bfloat16.")] = "auto",
    engine: Engine = "torch",
    quantize: Quantize = "none",
    calibrate: Calibrate = None,
    file_format: Annotated[str, typer.Option("--format", help="cog or gtiff.")] = "cog",
    confidence: Annotated[
        bool, typer.Option("--confidence", help="Also STEM_confidence.tif: probability of the class.")
    ] = False,
    probabilities: Annotated[
        str, typer.Option("--probabilities", help="uint8 or float16: also STEM_probabilities.tif, a band per class.")
    ] = "none",
    min_confidence: Annotated[
        float, typer.Option("--min-confidence", help="Pixels whose class is less probable, such as 0.6, have no data.")
    ] = 0.0,
    unsure_class: Annotated[
        str | None, typer.Option("--unsure-class", help="Class of these pixels instead of no data.")
    ] = None,
    applicability: Annotated[
        bool,
        typer.Option("--applicability", help="Also STEM_applicability.tif: nearness to the training data, 0 to 1."),
    ] = False,
    disagreement: Annotated[
        bool, typer.Option("--disagreement", help="Also STEM_disagreement.tif: how much several models differ, 0 to 1.")
    ] = False,
    polygons: Annotated[
        Path | None,
        typer.Option(
            "--polygons",
            help="Also polygons: .gpkg, .geojson, .fgb, .shp or .parquet; or the extension only. With --mosaic: one "
            "file of all scenes, whose polygons cross their borders.",
        ),
    ] = None,
    min_area: Annotated[
        float, typer.Option("--min-area", min=0, help="Leave out smaller polygons; m2, or pixels without a CRS.")
    ] = 0.0,
    simplify: Annotated[
        float, typer.Option("--simplify", min=0, help="Tolerance in pixels for simplifying polygon borders.")
    ] = 0.0,
    preview: Annotated[Path | None, typer.Option("--preview", help="Also a PNG with scene, classes, legend.")] = None,
    asset: Annotated[str | None, typer.Option("--asset", help="Asset of STAC items to predict.")] = None,
    mosaic: Annotated[
        Path | None,
        typer.Option("--mosaic", help="Also one map of all scenes: .vrt or .tif; areas count overlaps once."),
    ] = None,
    catalog: Annotated[
        Path | None, typer.Option("--catalog", help="Also a list of the outputs: .json (STAC items) or .csv.")
    ] = None,
    part: Annotated[
        str, typer.Option("--part", metavar="I/N", help="Predict the I-th of N parts of the scenes.")
    ] = "1/1",
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Skip scenes whose outputs are up to date.")
    ] = False,
    resume_scene: Annotated[
        bool, typer.Option("--resume-scene", help="Keep finished rows on disk and continue from them.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="ADDRESS", help="Predict on a Ray cluster: HOST:PORT, auto, or local."),
    ] = None,
    ray_cpus: Annotated[int, typer.Option("--ray-cpus", min=1, help="Cores of a worker on the cluster.")] = 1,
    tries: Annotated[
        int, typer.Option("--tries", min=1, help="With --ray: give up a scene after losing this many workers.")
    ] = 3,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Processes that share each scene, one per GPU.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, then stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Segment scenes of any size; the output has the grid, CRS and nodata of the input."""
    wait_passively()
    from rsseg.checkpoint import calibration_of, read_header
    from rsseg.runs import choose_models
    from rsseg.scene.batch import BatchFiles, SceneJob, choose_targets, find_scenes
    from rsseg.scene.catalog import expand_items
    from rsseg.scene.options import parse_options
    from rsseg.scene.share import Share

    merged = _polygons_of_mosaic(mosaic, polygons)
    options = parse_options(
        tile=tile,
        overlap=overlap,
        blend=blend,
        tta=tta,
        bands=bands.split(",") if bands else None,
        nodata=nodata,
        gsd=gsd,
        zero_collar=zero_collar,
        aoi=aoi,
        batch_size=batch_size,
        max_memory=None if max_memory is None else byte_size(max_memory, "--max-memory"),
        device=device,
        dtype=dtype,
        engine=engine,
        quantize=quantize,
        calibrate=calibrate,
        format=file_format,
        confidence=confidence,
        probabilities=probabilities,
        min_confidence=min_confidence,
        unsure_class=unsure_class,
        applicability=applicability,
        disagreement=disagreement,
        polygons=None if merged else polygons,
        min_area=min_area,
        simplify=simplify,
        preview=preview,
        resume=resume_scene,
        overwrite=overwrite,
    )
    share = Share.from_environment(os.environ)
    named, ids = expand_items(scenes, asset)
    found = find_scenes(named)
    targets = choose_targets(found, output, _part(part), ids)
    combined = BatchFiles(mosaic, catalog, merged, min_area, simplify)
    combined.check(targets, [*named, *found], overwrite=overwrite, again=skip_existing)
    if not targets:
        print_note(f"No scene belongs to part {part}.")
        return
    files = choose_models(model, runs)
    if ray is not None and (gpus > 1 or share.count > 1):
        raise UsageError("--ray starts its own workers: leave out --gpus, and give --device cuda for a GPU per worker.")
    if gpus > 1 and share.count == 1 and not dry_run:
        raise typer.Exit(start_workers(gpus))
    options = options.model_copy(update={"device": _own_device(device, share)})
    job = SceneJob(options, (*files, *named, *found), skip_existing)
    with silent(not share.is_main), _interruptible(resume_scene=resume_scene, several=len(found) > 1):
        for file in files:
            print_note(f"Model: {file}")
            _note_calibration(options, calibration_of(read_header(file), file))
        if dry_run:
            _print_plans(files, targets, job, as_json=as_json)
            return
        if ray is None:
            outcomes = _here(files, targets, job, share)
        else:
            from rsseg.scene.cluster import Cluster

            outcomes = _on_cluster(files, targets, job, Cluster(ray, ray_cpus, tries))
        one = len(targets) == 1 and not skip_existing
        finished = _collect(outcomes, one=one, kept=as_json)
    if not share.is_main:
        return
    areas, notes = combined.write(read_header(files[0]).task, finished)
    for note in notes:
        print_note(note)
    if as_json:
        results: Any = [o.result for o in finished if o.result] if len(found) == 1 and not skip_existing else finished
        print_json(results if mosaic is None else {"scenes": results, "mosaic": areas})
    elif mosaic is not None:
        _print_areas(areas, mosaic)
        print_result(f"{mosaic}")
    if failed := [outcome.scene for outcome in finished if outcome.status == "failed"]:
        raise PartialFailure(f"{len(failed)} of {len(finished)} scenes failed: {', '.join(failed)}.")


def _polygons_of_mosaic(mosaic: Path | None, polygons: Path | None) -> Path | None:
    """The file of `--polygons` that is traced from the mosaic; None where the scenes have their own."""
    from rsseg.scene.plan import is_extension

    return None if mosaic is None or polygons is None or is_extension(polygons) else polygons


def _print_plans(files: Sequence[Path], targets: "Sequence[Target]", job: "SceneJob", *, as_json: bool) -> None:
    from rsseg.scene.batch import check_targets, prepare_for
    from rsseg.scene.plan import prepare_scene

    network = prepare_for(files, job.options)
    check_targets(network.network.task, targets, job.options, job.inputs)
    plans = [prepare_scene(network, target.scene, target.output, job.options).describe() for target in targets]
    print_json(plans) if as_json else print_result("\n".join(plan.text() for plan in plans))


def _here(files: Sequence[Path], targets: "Sequence[Target]", job: "SceneJob", share: "Share") -> "Iterator[Outcome]":
    """Predict in this process."""
    from rsseg.scene.batch import predict_scenes, prepare_for

    network = prepare_for(files, job.options)
    with stage_bar() as advance:

        def progress(target: "Target") -> Any:
            number = f"{targets.index(target) + 1}/{len(targets)} " if len(targets) > 1 else ""
            return lambda done, total: advance(f"{number}{Path(target.scene).name}", done, total)

        yield from predict_scenes(
            network,
            targets,
            job.options,
            inputs=job.inputs,
            skip_existing=job.skip_existing,
            on_plan=lambda plan: print_note(plan.text()),
            progress=progress,
            share=share,
        )


def _on_cluster(
    files: Sequence[Path], targets: "Sequence[Target]", job: "SceneJob", cluster: "Cluster"
) -> "Iterator[Outcome]":
    """Predict on a Ray cluster."""
    from rsseg.checkpoint import read_header
    from rsseg.scene.batch import run_batch
    from rsseg.scene.cluster import on_ray

    with bar("scenes") as advance:
        advance(0, len(targets))
        outcomes = run_batch(read_header(files[0]).task, targets, job, on_ray(cluster, files, job))
        for done, outcome in enumerate(outcomes, start=1):
            advance(done, len(targets))
            yield outcome


def _collect(outcomes: "Iterator[Outcome]", *, one: bool, kept: bool) -> "list[Outcome]":
    """Report outcomes as they come; results stay in memory only if they are `kept`."""
    finished = []
    for outcome in outcomes:
        if outcome.exception is not None and one:
            raise outcome.exception  # a single scene fails with its own exit code
        if outcome.error is not None:
            print_error(outcome.error)
        elif outcome.status == "skipped":
            print_note(f"{outcome.scene}: {outcome.output} is up to date.")
        if not kept:
            _print(outcome)
        finished.append(outcome if kept else outcome.model_copy(update={"result": None, "exception": None}))
    return finished


def _own_device(name: str, share: "Share") -> str:
    """The device of this process: one of several takes the GPU of its number."""
    if share.count == 1:
        return name
    from rsseg.inference.device import own_device

    return str(own_device(name, int(os.environ["LOCAL_RANK"])))


def _print_areas(areas: "Sequence[ClassArea]", output: Path) -> None:
    columns = ("class", "pixels", "share", "area (ha)")
    print_table(columns, [(a.name, a.pixels, a.share, a.hectares) for a in areas])
    print_note(
        "Areas counted in pixels are biased by the errors of the map. For areas with intervals, label points: "
        f"rsseg sample {output} --per-stratum 50 -o points.gpkg, then rsseg assess."
    )


def _print(outcome: "Outcome") -> None:
    if outcome.result is not None:
        _print_areas(outcome.result.areas, outcome.output)
        for file in outcome.result.extra_outputs:
            print_note(f"{file}")
        if outcome.result.polygons is not None:
            print_note(f"{outcome.result.polygons} polygons")
    if outcome.status != "failed":
        print_result(f"{outcome.output}")


def _note_calibration(options: "SceneOptions", calibration: "Calibration | None") -> None:
    if not options.measures_probabilities:
        return
    if calibration is None:
        print_note("Probabilities as trained: this model has no temperature; networks are often surer than right.")
        return
    temperatures = ", ".join(f"{value:.3g}" for value in dict.fromkeys(calibration.temperatures))
    print_note(f"Probabilities at temperature {temperatures}, fitted on {calibration.fitted_on}.")


@contextmanager
def _interruptible(*, resume_scene: bool, several: bool) -> Iterator[None]:
    """Treat SIGTERM, which schedulers send, like Ctrl-C, and print how to continue."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        lost = "its finished rows are kept" if resume_scene else "its finished rows are discarded"
        hints = ["--resume-scene"] if resume_scene else []
        hints += ["--skip-existing"] if several else []
        again = f" with {' '.join(hints)}" if hints else ""
        raise Interrupted(f"Interrupted; the scene is not complete, {lost}. Run the command again{again}.") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _part(text: str) -> tuple[int, int]:
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal()):
        raise UsageError(f"--part {text}: write 1/4 for the first of four parts.")
    return int(number), int(parts)
