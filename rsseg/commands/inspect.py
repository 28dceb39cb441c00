"""`rsseg info`, `rsseg cog`, `rsseg doctor`: inspect a model file, a scene, the layout of GeoTIFFs, this machine."""

import os
import platform
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from rsseg import __version__
from rsseg.commands.console import AsJson, print_error, print_facts, print_json, print_note, print_result, print_table
from rsseg.errors import CheckFailed, DataError

PACKAGES = (
    "torch", "timm", "numpy", "rasterio", "tifffile", "imagecodecs", "pillow", "opencv-python-headless", "safetensors",
    "huggingface_hub", "pydantic", "typer", "rich",
)  # fmt: skip
FOREIGN = ("GDAL_DATA", "PROJ_LIB", "PROJ_DATA", "GDAL_DRIVER_PATH")
"""Variables that point to the data of another GDAL or PROJ, which breaks rasterio's own."""
cog = typer.Typer(help="Check cloud-optimized GeoTIFFs.", no_args_is_help=True)


def info(
    name: Annotated[str, typer.Argument(metavar="MODEL|SCENE", help="Model file, run folder, or raster.")],
    as_json: AsJson = False,
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
    from rsseg.vector.grid import Grid

    if Path(name).is_fifo():
        raise DataError(f"{name}: a pipe, not a file. Save it to a file first.")
    with Raster(name) as raster:
        scene = raster.info
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
    if not Grid(scene).is_located:
        print_note("This raster has no coordinates, so outputs made from it have none.")


@cog.command("validate")
def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="GeoTIFFs on this machine.")],
    as_json: AsJson = False,
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


def doctor(as_json: AsJson = False) -> None:
    """Check versions, devices, codecs, disk and cache; exit 8 and name the remedy if something is wrong."""
    facts, problems = _versions()
    for check in (_devices, _codecs, _disk, _environment):
        try:
            more_facts, more_problems = check()
        except (ImportError, OSError) as error:  # a package that is missing or damaged
            more_facts, more_problems = {}, [f"a package cannot be imported: {error}. Reinstall rsseg."]
        facts |= more_facts
        problems += more_problems
    if as_json:
        print_json({"facts": facts, "problems": problems})
    else:
        print_facts(facts.items())
        print_note("\n".join(problems) if problems else "No problem found.")
    if problems:
        raise CheckFailed(f"{len(problems)} problem(s) found; see above.")


def _versions() -> tuple[dict[str, str], list[str]]:
    facts = {"python": sys.version.split()[0], "system": platform.platform(), "rsseg": __version__}
    problems = []
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "missing"
            problems.append(f"{package} is missing: run `pip install {package}`.")
    return facts, problems


def _devices() -> tuple[dict[str, str], list[str]]:
    import torch

    if not torch.cuda.is_available():
        return {"device": f"cpu ({os.cpu_count()} cores), no CUDA device"}, []
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"device": f"{len(names)} x {', '.join(dict.fromkeys(names))}", "cuda": str(torch.version.cuda)}, []


def _codecs() -> tuple[dict[str, str], list[str]]:
    import rasterio
    from rasterio.drivers import raster_driver_extensions

    drivers = set(raster_driver_extensions().values())
    wanted = ("GTiff", "PNG", "JPEG", "JP2OpenJPEG", "VRT")
    missing = [name for name in wanted if name not in drivers]
    problems = [f"GDAL has no driver {name}: reinstall rasterio from its wheel." for name in missing]
    return {"gdal": rasterio.__gdal_version__, "raster drivers": str(len(drivers))}, problems


def _disk() -> tuple[dict[str, str], list[str]]:
    free = shutil.disk_usage(Path()).free / 2**30
    facts = {"free disk here": f"{free:.1f} GiB"}
    try:
        with tempfile.NamedTemporaryFile(dir=Path(), prefix=".rsseg-doctor-"):
            pass
    except OSError as error:
        return facts, [f"the working folder cannot be written: {error.strerror}. Change to another folder."]
    return facts, ["less than 2 GiB of disk are free: runs and scenes may not fit."] if free < 2 else []


def _environment() -> tuple[dict[str, str], list[str]]:
    from huggingface_hub.constants import HF_HUB_CACHE

    offline = os.environ.get("RSSEG_OFFLINE") or os.environ.get("HF_HUB_OFFLINE")
    facts = {"weights cache": str(HF_HUB_CACHE), "offline": "yes" if offline else "no"}
    foreign = [name for name in FOREIGN if name in os.environ]
    return facts, [f"{name} is set and may point to another GDAL: run `unset {name}`." for name in foreign]
