"""Model files: safetensors with one JSON metadata entry, written under a temporary name.

Independent of the methods. Imports torch only where tensors are read or written, so that `rsseg info` and `rsseg runs`
start fast.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from rsseg.errors import WeightsError
from rsseg.files import replaced
from rsseg.task import Task
from rsseg.text import load_json, shortened

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT = 1
METADATA_KEY = "rsseg"
MODEL_NAME = "model.safetensors"
_FLOATS = ("torch.float16", "torch.bfloat16", "torch.float32", "torch.float64")


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


_HEADER = TypeAdapter(ModelHeader)


def write_model(path: Path, tensors: "Mapping[str, Tensor]", header: ModelHeader) -> None:
    """Write a model; `path` is always the old file or the complete new one.

    Raises:
        MachineError: the folder cannot be written or the disk is full.
    """
    values = {"format": FORMAT, **asdict(header), "task": header.task.model_dump(mode="json")}
    write_tensors(path, tensors, {METADATA_KEY: json.dumps(values)})


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name, flush it to the disk, and rename it.

    Raises:
        MachineError: the folder cannot be written or the disk is full.
    """
    from safetensors.torch import save_file

    owned: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        # safetensors refuses memory that two tensors share.
        owned[name] = plain.clone() if plain.untyped_storage().data_ptr() in storages else plain
        storages.add(plain.untyped_storage().data_ptr())
    with replaced(path, SafetensorError) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(owned, temporary, dict(metadata))
        temporary.chmod(mode)  # safetensors creates files that other users cannot read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())


def read_header(path: Path) -> ModelHeader:
    """Read the metadata of a model and no tensor.

    Raises:
        WeightsError: the file is missing, damaged, foreign, or of a newer format.
    """
    with _opened(path, "numpy") as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
    if text is None:
        raise WeightsError(
            f"{path}: safetensors without rsseg's header, so not a model of rsseg. "
            "Give a model.safetensors of a run, or convert them with `rsseg weights import`."
        )
    values = load_json(text, f"{path}: damaged header", WeightsError)
    if not isinstance(values, dict):
        raise WeightsError(f"{path}: damaged header: {shortened(values)}. Train or import the model again.")
    if (found := values.pop("format", None)) != FORMAT:
        made_with = values.get("made_with")
        version = made_with.get("rsseg") if isinstance(made_with, dict) else None
        raise WeightsError(
            f"{path}: format {shortened(found)}, this rsseg reads format {FORMAT}. "
            f"Use rsseg {version or 'of a newer version'}, which wrote it."
        )
    try:
        return _HEADER.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise WeightsError(
            f"{path}: damaged header: {where[:200]}: {first['msg']}. Train or import the model again."
        ) from None


@dataclass(frozen=True)
class Calibration:
    """Temperatures of a network's probabilities, one per class, and the images that they were fitted on, in words."""

    temperatures: tuple[float, ...]
    fitted_on: str


def calibration_of(header: ModelHeader, path: Path) -> Calibration | None:
    """The temperatures in a header, if there are any; raises `WeightsError` if they are damaged."""
    if (stored := header.training.get("calibration")) is None:
        return None
    try:
        calibration = TypeAdapter(Calibration).validate_python(stored)
        values = calibration.temperatures
        if len(values) == header.task.num_classes and all(0 < value < math.inf for value in values):
            return calibration
    except ValidationError:
        pass
    raise WeightsError(f"{path}: damaged header: calibration. Train or import the model again.")


def find_model(path: Path) -> Path:
    """The model file at a path: the file itself, or the model of a run folder.

    Raises:
        WeightsError: there is none.
    """
    remedy = "Give a model.safetensors or the folder of a run; see `rsseg runs ls`."
    try:
        if path.is_file():
            return path
        file = path / MODEL_NAME
        if file.is_file():
            return file
        what = "this run has no model yet" if path.is_dir() else "no such file or folder"
        raise WeightsError(f"{path}: {'not a regular file' if path.exists() and not path.is_dir() else what}. {remedy}")
    except OSError as error:
        raise WeightsError(f"{shortened(str(path))}: {error.strerror}. {remedy}") from None


def load_tensors(module: "nn.Module", path: Path) -> None:
    """Copy a model's tensors into `module`, strictly; names and shapes are compared before any tensor is read.

    Raises:
        WeightsError: the file is unreadable, keys differ (the first missing and the first unexpected one are named),
            a shape or a kind of number differs, or a value is not finite.
    """
    with _opened(path, "pt") as file:
        names = file.keys()
        _check_shapes(module.state_dict(), {name: tuple(file.get_slice(name).get_shape()) for name in names}, str(path))
        stored = {name: file.get_tensor(name) for name in names}
    load_into(module, stored, str(path))


def read_tensors(path: Path) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """Tensors and metadata of a file of `write_tensors`; raises `WeightsError` if it is unreadable."""
    with _opened(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def load_into(
    module: "nn.Module",
    stored: "Mapping[str, Tensor]",
    label: str,
    place: "Callable[[Tensor, Tensor], Tensor]" = lambda tensor, _: tensor,
) -> None:
    """Copy tensors into `module`'s state, strictly; `label` is their file in messages. See `load_tensors`.

    `place` turns a stored tensor into one that can be copied into the module's.
    """
    own = module.state_dict()
    _check_shapes(own, {name: tuple(tensor.shape) for name, tensor in stored.items()}, label)
    for name, tensor in stored.items():
        floating = own[name].is_floating_point()
        if (
            tensor.is_floating_point() != floating
            or tensor.is_complex()
            or (floating and str(tensor.dtype) not in _FLOATS)
        ):
            kind = "a floating-point" if floating else "an integer"
            raise WeightsError(f"{label}: {name!r} is of type {tensor.dtype}, the network needs {kind} type.")
        if floating and not tensor.isfinite().all():
            raise WeightsError(f"{label}: {name!r} holds NaN or infinity. Train or import the model again.")
    module.load_state_dict({name: place(tensor, own[name]) for name, tensor in stored.items()})


def _check_shapes(own: "Mapping[str, Tensor]", stored: Mapping[str, tuple[int, ...]], label: str) -> None:
    problems = [
        f"{what} {shortened(names[0])}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for what, names in (
            ("missing tensor", [name for name in own if name not in stored]),
            ("unexpected tensor", [name for name in stored if name not in own]),
        )
        if names
    ]
    problems += [
        f"{name!r} has shape {stored[name]}, the network {tuple(own[name].shape)}"
        for name in own
        if name in stored and stored[name] != own[name].shape
    ][:1]
    if problems:
        raise WeightsError(
            f"{label}: does not fit the network: {'; '.join(problems)}. Use the recipe it was made with."
        )


@contextmanager
def _opened(path: Path, framework: str) -> Iterator[Any]:
    """An open safetensors file; opening it for `pt` imports torch."""
    problem: object
    try:
        if path.is_file():
            with safe_open(path, framework=framework) as file:
                yield file
            return
        problem = "no such regular file"
    except (OSError, SafetensorError, ValueError) as error:
        problem = error
    raise WeightsError(f"{path}: not a readable model file: {problem}. Give a model.safetensors of a run.")
