"""What a run is made of, for its folder and its model files: plan, versions, header, origin of every recipe value."""

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml
from pydantic import BaseModel

import rsseg
from rsseg.backbones.backbone import Backbone
from rsseg.checkpoint import ModelHeader
from rsseg.config import BackboneConfig
from rsseg.data.index import SegmentationIndex
from rsseg.methods.base import Segmenter
from rsseg.recipe import Recipe
from rsseg.runs import Manifest
from rsseg.training.results import TrainPlan


def backbone_configs(part: BaseModel, role: str = "") -> Iterator[tuple[str, BackboneConfig]]:
    """Every backbone that a recipe names, by its key path."""
    if isinstance(part, BackboneConfig):
        yield role, part
        return
    for name in type(part).model_fields:
        value = getattr(part, name)
        path = f"{role}.{name}" if role else name
        if isinstance(value, BaseModel):
            yield from backbone_configs(value, path)
        elif isinstance(value, Mapping | tuple):
            members = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, member in members:
                if isinstance(member, BaseModel):
                    yield from backbone_configs(member, f"{path}.{key}")


def model_header(recipe: Recipe, segmenter: Segmenter, training: dict[str, Any]) -> ModelHeader:
    """What a saved network says about itself."""
    backbones = {name: asdict(m.info) for name, m in segmenter.named_modules() if isinstance(m, Backbone)}
    return ModelHeader(
        recipe=recipe.model_dump(mode="json"),
        task=segmenter.task,
        backbones=backbones,
        training={"weights": recipe.ship, **training},
        made_with=versions(),
    )


def versions() -> dict[str, str]:
    """Version of everything that can change a number."""
    found = {"rsseg": rsseg.__version__, "python": platform.python_version()}
    for package in ("torch", "timm", "numpy", "opencv-python-headless", "rasterio"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def new_manifest(name: str, recipe: Recipe, plan: TrainPlan, frozen: Mapping[str, str]) -> Manifest:
    """The manifest of a run that begins now."""
    return Manifest(
        name=name,
        method=recipe.method,
        recipe=recipe.name,
        created=now(),
        host=socket.gethostname(),
        pid=os.getpid(),
        command=tuple(sys.argv),
        versions=versions() | {"platform": platform.platform()},
        commit=_commit(),
        device=plan.device_name,
        seed=recipe.seed,
        monitor=recipe.trainer.monitor,
        selection=plan.selection,
        plan=plan.model_dump(mode="json"),
        used=plan.used,
        frozen=frozen,
    )


def data_of(recipe: Recipe) -> dict[str, Any]:
    """The dataset's classes, colours, raw values, bands, scaling and statistics, without the list of images."""
    return SegmentationIndex.load(recipe.data.path).model_dump(mode="json", exclude={"items"})


def now() -> str:
    """Local time with its zone, to the microsecond, so that runs sort."""
    return datetime.now().astimezone().isoformat()


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every value, each marked `given` (recipe, --set or flag) or `default`; it loads as a recipe."""
    return "\n".join(_lines(recipe, recipe.model_dump(mode="json"), 0)) + "\n"


def _lines(part: Any, values: Mapping[str, Any], depth: int) -> Iterator[str]:
    for key, value in values.items():
        member = getattr(part, key, None) if isinstance(part, BaseModel) else part.get(key)
        given = not isinstance(part, BaseModel) or key in part.model_fields_set
        head = f"{'  ' * depth}{key}:"
        if isinstance(value, Mapping) and value:
            yield head
            yield from _lines(member, value, depth + 1)
        else:
            yield f"{head} {_scalar(value)}  # {'given' if given else 'default'}"


def _scalar(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _commit() -> str | None:
    commit = _git(["rev-parse", "HEAD"])
    if commit is None:
        return None
    return f"{commit}+" if _git(["status", "--porcelain", "--untracked-files=no"]) else commit


def _git(arguments: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
