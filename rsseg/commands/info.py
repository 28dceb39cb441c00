"""`rsseg info` and `rsseg cog`: the contents of a model file or a scene, and the layout of GeoTIFFs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from rsseg.commands.console import print_error, print_facts, print_json, print_note, print_result, print_table
from rsseg.errors import CheckFailed, DataError


def info(
    name: Annotated[str, typer.Argument(metavar="MODEL|SCENE", help="Model file, run folder, or raster.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the classes and the training of a model, or the bands and the grid of a scene. Reads the header only."""
    path = Path(name)
    if path.suffix == ".safetensors" or path.is_dir():
        _show_model(path, as_json=as_json)
    else:
        _show_scene(name, as_json=as_json)


def _show_model(model: Path, *, as_json: bool) -> None:
    from dataclasses import asdict

    from rsseg.checkpoint import find_model, read_header

    header = read_header(find_model(model))
    if as_json:
        print_json(asdict(header) | {"task": header.task.model_dump(mode="json")})
        return
    task = header.task
    facts = [
        ("method", header.recipe.get("method")),
        ("recipe", header.recipe.get("name")),
        ("bands", ", ".join(task.bands)),
        ("pixel type", task.dtype),
        *((f"backbone {role}", f"{b.get('name')} ({b.get('license')})") for role, b in header.backbones.items()),
        # The hashes of the images it has seen are for `rsseg eval`.
        *((f"training {key}", value) for key, value in header.training.items() if not isinstance(value, dict)),
        *((f"made with {key}", value) for key, value in header.made_with.items()),
    ]
    print_facts(facts)
    rows = [(c.value, c.name, "#{:02x}{:02x}{:02x}".format(*c.color)) for c in task.classes]
    print_table(("value", "class", "colour"), rows)


def _show_scene(name: str, *, as_json: bool) -> None:
    from rsseg.raster import Raster

    if Path(name).is_fifo():
        raise DataError(f"{name}: a pipe, not a file. Save it to a file first.")
    with Raster(name) as raster:
        scene = raster.info
    placed = bool(not scene.transform.is_identity or scene.gcps or scene.rpcs)
    bands = list(zip(scene.numbers, scene.band_names, scene.colors, scene.scales, scene.offsets, strict=True))
    facts: dict[str, Any] = {
        "width": scene.width,
        "height": scene.height,
        "pixel type": scene.stored_dtype,
        "coordinate system": None if scene.crs is None else scene.crs.to_string(),
        "transform": None if scene.transform.is_identity else list(scene.transform)[:6],
        "ground control points": len(scene.gcps),
        "ground control points in": None if scene.gcps_crs is None else scene.gcps_crs.to_string(),
        "rational polynomial": scene.rpcs is not None,
        "pixel is": scene.area_or_point,
        "nodata": None if scene.nodata is None else str(scene.nodata),
        "alpha band": scene.has_alpha,
        "mask band": scene.has_mask,
        "stored block": list(scene.block_shape),
    }
    if as_json:
        keys = ("number", "name", "colour", "scale", "offset")
        print_json(facts | {"bands": [dict(zip(keys, band, strict=True)) for band in bands]})
        return
    transform = facts["transform"] and ", ".join(f"{value:.12g}" for value in facts["transform"])
    print_facts((facts | {"transform": transform, "ground control points": len(scene.gcps) or None}).items())
    print_table(
        ("band", "name", "colour", "scale", "offset"),
        [(str(b[0]), b[1], b[2], f"{b[3]:.9g}", f"{b[4]:.9g}") for b in bands],
    )
    if not placed:
        print_note("This raster has no coordinates, so outputs made from it have none.")


cog = typer.Typer(help="Check cloud-optimized GeoTIFFs.", no_args_is_help=True)


@cog.command("validate")
def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="GeoTIFFs on this machine.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check whether files are cloud-optimized GeoTIFFs; exit code 8 if one is not. A warning counts."""
    from rsseg.scene.cog import check_cog

    reports = [check_cog(file) for file in files]
    if as_json:
        print_json(reports)
    for report in reports:
        for finding in (*report.errors, *report.warnings):
            print_error(f"{report.file}: {finding}")
        if not as_json:
            print_result(f"{report.file}: {'valid' if report.is_valid else 'not valid'}")
    if wrong := sum(not report.is_valid for report in reports):
        raise CheckFailed(
            f"{wrong} of {len(reports)} files are not valid COGs. `rsseg predict --format cog` writes one."
        )
