"""`rsseg doctor`: check this machine."""

import os
import platform
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rsseg import __version__
from rsseg.commands.console import AsJson, print_facts, print_json, print_note
from rsseg.errors import CheckFailed

PACKAGES = (
    "torch", "timm", "numpy", "rasterio", "tifffile", "imagecodecs", "pillow", "opencv-python-headless", "safetensors",
    "huggingface_hub", "pydantic", "typer", "rich",
)  # fmt: skip
FOREIGN = ("GDAL_DATA", "PROJ_LIB", "PROJ_DATA", "GDAL_DRIVER_PATH")
"""Variables that point to the data of another GDAL or PROJ, which breaks rasterio's own."""


def doctor(as_json: AsJson = False) -> None:
    """Check versions, devices, codecs, disk and cache; exit 8 and name the remedy if something is wrong."""
    facts, problems = _versions()
    for check in (_devices, _codecs, _disk, _environment):
        more_facts, more_problems = check()
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
