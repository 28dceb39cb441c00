"""Model files: safetensors with one JSON metadata entry, written under a temporary name. Free of methods."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rsseg.errors import MachineError, WeightsError
from rsseg.task import Task

FORMAT = 1
METADATA_KEY = "rsseg"
MODEL_NAME = "model.safetensors"


@dataclass(frozen=True)
class ModelHeader:
    """Metadata of a model file, complete enough that prediction needs no other file.

    recipe: fully resolved, as JSON values.
    task: classes, bands and scaling the network was trained for.
    backbones: role ("student") -> name, statistics, patch size and licence.
    training: step, which weights ("student", "average"), score.
    made_with: package -> version.
    """

    recipe: dict[str, Any]
    task: Task
    backbones: dict[str, dict[str, Any]]
    training: dict[str, Any]
    made_with: dict[str, str]


def write_model(path: Path, tensors: Mapping[str, Tensor], header: ModelHeader) -> None:
    """Write a model; `path` is always the old file or the complete new one.

    Raises:
        MachineError: the folder cannot be written or the disk is full.
    """
    values = {"format": FORMAT, **asdict(header), "task": header.task.model_dump(mode="json")}
    write_tensors(path, tensors, {METADATA_KEY: json.dumps(values)})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name, flush it to the disk, and rename it.

    Raises:
        MachineError: the folder cannot be written or the disk is full.
    """
    owned: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        # safetensors refuses memory that two tensors share.
        owned[name] = plain.clone() if plain.untyped_storage().data_ptr() in storages else plain
        storages.add(plain.untyped_storage().data_ptr())
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(owned, temporary, dict(metadata))
        temporary.chmod(mode)  # safetensors hides its files from other users
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise MachineError(f"{path}: cannot be written: {error}. Free some space or choose another --output.") from None


def read_header(path: Path) -> ModelHeader:
    """Read the metadata of a model and no tensor.

    Raises:
        WeightsError: the file is missing, damaged, foreign, or of a newer format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: not a readable model file: {error}. Give a model.safetensors of a run.") from None
    if text is None:
        raise WeightsError(
            f"{path}: safetensors without rsseg's header: these are foreign weights. "
            "Give a model.safetensors of a run, or convert them with `rsseg weights import`."
        )
    try:
        values = json.loads(text)
        found = values.pop("format")
        if found != FORMAT:
            made_with = values.get("made_with", {}).get("rsseg", "a newer version")
            raise WeightsError(
                f"{path}: format {found}, this rsseg reads format {FORMAT}. Use rsseg {made_with}, which wrote it."
            )
        task = Task.model_validate(values.pop("task"))
        return ModelHeader(task=task, **{f.name: values[f.name] for f in fields(ModelHeader) if f.name != "task"})
    except (ValueError, KeyError, AttributeError, TypeError, ValidationError) as error:
        raise WeightsError(f"{path}: damaged header: {error!r}. Train or import the model again.") from None


def find_model(path: Path) -> Path:
    """The model file at a path: the file itself, or the model of a run folder.

    Raises:
        WeightsError: there is none.
    """
    if path.is_file():
        return path
    file = path / MODEL_NAME
    if not file.is_file():
        what = "this run has no model yet" if path.is_dir() else "no such file or folder"
        raise WeightsError(f"{path}: {what}. Give a model.safetensors or the folder of a run; see `rsseg runs ls`.")
    return file


def load_tensors(module: nn.Module, path: Path) -> None:
    """Copy a model's tensors into `module`, strictly.

    Raises:
        WeightsError: the file is unreadable, keys differ (the first missing and the first unexpected one are named),
            or a shape differs.
    """
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: not a readable model file: {error}. Give a model.safetensors of a run.") from None
    load_into(module, stored, str(path))


def load_into(module: nn.Module, stored: Mapping[str, Tensor], label: str) -> None:
    """Copy tensors into `module`'s state, strictly; `label` is their file in messages. See `load_tensors`."""
    own = module.state_dict()
    problems = [
        f"{what} {names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for what, names in (
            ("missing tensor", [name for name in own if name not in stored]),
            ("unexpected tensor", [name for name in stored if name not in own]),
        )
        if names
    ]
    problems += [
        f"{name!r} has shape {tuple(stored[name].shape)}, the network {tuple(own[name].shape)}"
        for name in own
        if name in stored and stored[name].shape != own[name].shape
    ][:1]
    if problems:
        raise WeightsError(
            f"{label}: does not fit the network: {'; '.join(problems)}. Use the recipe it was made with."
        )
    module.load_state_dict(dict(stored))
