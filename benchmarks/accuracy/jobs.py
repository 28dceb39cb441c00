"""From a cell of the table to a job: the whole recipe, and a key that changes with whatever can change its number."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

import rsseg
from benchmarks.accuracy.table import NEEDED, Arm, Profile, Setting
from rsseg.backbones.zoo import check_weights
from rsseg.errors import WeightsError
from rsseg.recipe import Recipe, recipe_from_dict
from rsseg.training.plan import backbone_configs

CODE = ("backbones", "data", "evaluation", "inference", "layers", "methods", "training")
"""Packages that can change a score."""

AUGMENT = {"scale_range": [0.7, 1.4], "hflip": 0.5, "vflip": 0.5, "rot90": 0.5, "photometric": "fast"}
"""Of every arm whose recipe does not say otherwise."""


@dataclass(frozen=True)
class Job:
    """One training.

    folder  where it is done; its name ends with the keys of recipe, weights and data, and of the code
    recipe  complete
    rate    factor on the arm's learning rate
    score   True: a cell, scored on the test split once; False: part of the sweep, which never sees it
    """

    setting: Setting
    arm: Arm
    seed: int
    rate: float
    score: bool
    recipe: Recipe
    folder: Path

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    @property
    def model(self) -> Path:
        """Kept if another arm needs it."""
        return self.folder / "model.safetensors"

    @property
    def done(self) -> bool:
        """Whether there is a result, and the model if another arm needs it."""
        if not self.result.is_file():
            return False
        needed = self.score and self.arm.name in NEEDED and "error" not in json.loads(self.result.read_text())
        return not needed or self.model.is_file()

    @property
    def name(self) -> str:
        what = f"seed {self.seed}" if self.score else f"rate x{self.rate:g}"
        return f"{self.setting.name}  {self.arm.name}  {what}"


def make_job(
    setting: Setting,
    arm: Arm,
    profile: Profile,
    dataset: Path,
    output: Path,
    *,
    seed: int,
    rate: float,
    score: bool,
    weights: Path | None,
    models: Mapping[str, Path] = MappingProxyType({}),
    any_code: bool = False,
) -> Job:
    """The job of a cell, or of one rate of its sweep.

    Args:
        setting, arm, profile: of the table.
        dataset: prepared by `data.py`.
        output: holds all jobs.
        seed, rate, score: see `Job`.
        weights: folder with weights by backbone name.
        models: by recipe key, the model of another arm; see `Arm.needs`.
        any_code: take a result of another version of the code, if there is one.

    Raises:
        WeightsError: a pretrained network's weights are neither in `weights` nor in the cache.
    """
    values = _merged(setting, arm, profile, dataset, seed=seed, rate=rate, score=score)
    recipe = recipe_from_dict(values, arm.name)
    found = {}
    for role, config in backbone_configs(recipe):
        if config.weights == "pretrained":
            local = weights / f"{config.name}.safetensors" if weights is not None else None
            if local is not None and local.is_file():
                _set(values, f"{role}.weights", str(local.resolve()))
                found[role] = _sha256(local)
            elif (file := check_weights(config)) is not None:
                found[role] = file.sha256
    for role, model in models.items():
        _set(values, role, str(model))
    recipe = recipe_from_dict(values, arm.name)
    # Places do not count, nor do values that are the code's own, which has a key of its own.
    plain = recipe.model_dump(mode="json", exclude_defaults=True) | {"title": ""}
    plain["data"]["path"] = ""
    for role in found:
        _set(plain, f"{role}.weights", "")
    for stream in plain["data"]["streams"].values():
        stream |= {"items": Path(stream["items"]).name} if "items" in stream else {}
    facts = {"recipe": plain, "weights": found, "data": (dataset / "digest.txt").read_text()}
    for role, model in models.items():
        _set(plain, role, model.parent.name)
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]
    kind = f"seed{seed}" if score else f"rate{rate:g}"
    arm_folder = output / "cells" / setting.name / arm.name
    folder = arm_folder / f"{kind}-{key}-{code_version()}"
    if any_code and not (folder / "result.json").is_file():
        folder = next((file.parent for file in arm_folder.glob(f"{kind}-{key}-*/result.json")), folder)
    return Job(setting, arm, seed, rate, score, recipe, folder)


def missing_weights(setting: Setting, arm: Arm, profile: Profile, dataset: Path, weights: Path | None) -> str | None:
    """Why an arm cannot be run; None if it can."""
    try:
        make_job(setting, arm, profile, dataset, Path(), seed=0, rate=1.0, score=True, weights=weights)
    except WeightsError as error:
        return str(error)
    return None


@cache
def code_version() -> str:
    """Hash of the packages that can change a score."""
    root, sha = Path(rsseg.__file__).parent, hashlib.sha256()
    for file in sorted(file for package in CODE for file in (root / package).rglob("*.py")):
        sha.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return sha.hexdigest()[:10]


def _merged(
    setting: Setting, arm: Arm, profile: Profile, dataset: Path, *, seed: int, rate: float, score: bool
) -> dict[str, Any]:
    """The arm's recipe with the images of the setting and the training of the profile."""
    values: dict[str, Any] = yaml.safe_load(arm.recipe.read_text())
    steps = arm.lengths * profile.steps if score else profile.sweep_steps
    every = max(steps // profile.evaluations, 1)
    needed = recipe_from_dict(values, arm.name).stream_names()
    own = values["data"]
    values["seed"] = seed
    values["data"] = own | {
        "path": str(dataset),
        "bands": None if setting.bands is None else list(setting.bands),
        "augment": {"crop_size": profile.crop, **own.get("augment", AUGMENT)},
        "streams": {name: _select(setting.streams[name], dataset) for name in needed},
        "val": dict(setting.val),
        "test": dict(setting.test),
    }
    values["trainer"] = values.get("trainer", {}) | {
        "steps": steps,
        "batch_size": profile.batch_size,
        "amp_dtype": "auto",
        "eval_every": every,
        "checkpoint_every": every,
        "workers": profile.workers,
        "device": profile.device,
    }
    for optimizer in values["optimizers"].values():
        optimizer["lr"] *= rate
    return values


def _select(select: Mapping[str, Any], dataset: Path) -> dict[str, Any]:
    return dict(select) | ({"items": str(dataset / select["items"])} if "items" in select else {})


def _set(values: dict[str, Any], path: str, value: str) -> None:
    *parents, leaf = path.split(".")
    node: Any = values
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[leaf] = value


@cache
def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
