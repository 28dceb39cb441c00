"""`rsseg predict`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from rsseg.commands.console import print_error, print_json, print_note, print_result, print_table
from rsseg.errors import PartialFailure, RssegError, UsageError

SUFFIXES = (".tif", ".tiff", ".vrt", ".jp2", ".png", ".jpg", ".jpeg", ".img")


def predict(
    scenes: Annotated[list[str], typer.Argument(metavar="SCENE...", help="Rasters, or folders of rasters.")],
    model: Annotated[Path | None, typer.Option("--model", help="Run folder or model file; the newest run.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File for one scene, folder for several: STEM_rsseg.tif.")
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", help="Folder that holds the runs.")] = Path("runs"),
    tile: Annotated[int | None, typer.Option("--tile", help="Tile side in pixels; the model's own.")] = None,
    overlap: Annotated[int | None, typer.Option("--overlap", help="Pixels shared by tiles; the model's own.")] = None,
    blend: Annotated[str, typer.Option("--blend", help="crop, hann or mean.")] = "crop",
    bands: Annotated[
        str | None, typer.Option("--bands", help="Names or numbers of the file's bands, in the model's order: 4,3,2.")
    ] = None,
    nodata: Annotated[float | None, typer.Option("--nodata", help="Value without data, if not declared.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Tiles at once.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    file_format: Annotated[str, typer.Option("--format", help="cog or gtiff.")] = "cog",
    preview: Annotated[Path | None, typer.Option("--preview", help="Also a PNG with scene, classes, legend.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, then stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Segment scenes of any size; the output has the grid, CRS and nodata of the input."""
    from rsseg.commands.progress import bar
    from rsseg.inference.load import load_segmenter
    from rsseg.scene.options import SceneOptions
    from rsseg.scene.predict import plan_scene, predict_scene
    from rsseg.training.runs import choose_model

    targets = _targets(_expand(scenes), output)
    if preview is not None and len(targets) > 1:
        raise UsageError("--preview draws one scene; give one scene.")
    options = SceneOptions.model_validate(
        {
            "tile": tile,
            "overlap": overlap,
            "blend": blend,
            "bands": bands.split(",") if bands else None,
            "nodata": nodata,
            "batch_size": batch_size,
            "device": device,
            "format": file_format,
            "overwrite": overwrite,
        }
    )
    file = choose_model(model, runs)
    print_note(f"Model: {file}")
    segmenter = load_segmenter(file, device=device)
    results: list[Any] = []
    failures: list[str] = []
    for scene, target in targets:
        try:
            print_note(plan_scene(segmenter, scene, target, options).text())
            if dry_run:
                continue
            with bar(scene) as advance:
                results.append(predict_scene(segmenter, scene, target, options, progress=advance))
        except RssegError as error:
            if len(targets) == 1:
                raise
            failures.append(f"{scene}: {error}")
            print_error(failures[-1])
    if preview is not None and results:
        from rsseg.scene.preview import draw_preview

        draw_preview(targets[0][0], targets[0][1], segmenter.task, preview)
    _print(results, as_json=as_json)
    if failures:
        raise PartialFailure(f"{len(failures)} of {len(targets)} scenes failed:\n" + "\n".join(failures))


def _print(results: list[Any], *, as_json: bool) -> None:
    if as_json:
        print_json(results)
        return
    for result in results:
        print_table(
            ("class", "pixels", "share", "area (ha)"), [(a.name, a.pixels, a.share, a.hectares) for a in result.areas]
        )
        print_result(f"{result.output}")


def _expand(scenes: list[str]) -> list[str]:
    """Files as given (also URLs and GDAL names), folders as the rasters in them."""
    found: list[str] = []
    for scene in scenes:
        if Path(scene).is_dir():
            inside = sorted(str(p) for p in Path(scene).iterdir() if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise UsageError(f"{scene}: no raster in this folder (looked for {', '.join(SUFFIXES)}).")
            found += inside
        else:
            found.append(scene)
    return found


def _targets(scenes: list[str], output: Path | None) -> list[tuple[str, Path]]:
    names = [f"{Path(scene).stem}_rsseg.tif" for scene in scenes]
    if len(set(names)) < len(names):
        raise UsageError("two scenes have the same file name and would write one output; predict them one by one.")
    is_folder = output is not None and (len(scenes) > 1 or output.is_dir() or output.suffix == "")
    if output is not None and not is_folder:
        return [(scenes[0], output)]
    return [(scene, (output or Path()) / name) for scene, name in zip(scenes, names, strict=True)]
