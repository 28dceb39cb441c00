"""The plan of a run: device, weights and images, looked up before anything is built."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from pydantic import BaseModel

from rsseg.backbones.zoo import WeightsFile, check_weights
from rsseg.config import BackboneConfig, SelectConfig
from rsseg.data.index import digest_of
from rsseg.data.sources import Datasets, Source
from rsseg.data.streams import StreamSpec
from rsseg.distributed import Ranks
from rsseg.errors import DataError
from rsseg.fields import Result
from rsseg.methods.base import Method
from rsseg.recipe import Recipe
from rsseg.task import Task
from rsseg.training.device import Hardware


class SplitPlan(Result):
    """Images of a training stream or of the validation."""

    path: str
    split: str
    images: int
    digest: str
    """SHA-256 over the image names."""
    batch_size: int
    """Samples per process and micro-step; for validation: tiles."""


class TrainPlan(Result):
    """Everything known about a run before its first step."""

    method: str
    name: str
    title: str
    reference: str
    device: str
    device_name: str
    amp: str
    processes: int
    seed: int
    steps: int
    grad_accum_steps: int
    streams: Mapping[str, SplitPlan]
    validation: SplitPlan | None
    """None: no evaluation, the last weights ship."""
    selection: str
    """How the weights to ship are chosen, in words."""
    classes: tuple[str, ...]
    bands: tuple[str, ...]
    backbones: Mapping[str, str]
    """Role in the recipe -> name, weights and licence."""
    weight_hashes: Mapping[str, str]
    """Role -> SHA-256 of the weight file, where there is one."""
    start_step: int = 0
    """Optimizer steps done before a resume."""
    parameters: int
    """Parameters of the shipped network."""
    trainable: int
    run: Path | None = None

    @property
    def used(self) -> dict[str, str]:
        """Split hash -> `training` or `selection`: scores on these images are not independent."""
        return {stream.digest: "training" for stream in self.streams.values()} | (
            {self.validation.digest: "selection"} if self.validation else {}
        )

    def text(self) -> str:
        """Summary of at most twelve lines."""
        lines = [f"{self.method}  {self.name}" + (f"  ({self.title})" if self.title else "")]
        lines += [f"  {role}: {backbone}" for role, backbone in self.backbones.items()]
        lines.append(f"  parameters: {self.parameters / 1e6:.2f} M shipped, {self.trainable / 1e6:.2f} M trained")
        lines.append(f"  classes: {', '.join(self.classes)};  bands: {', '.join(self.bands)}")
        for name, stream in self.streams.items():
            samples = self.steps * self.grad_accum_steps * self.processes * stream.batch_size
            lines.append(
                f"  {name}: {stream.images} images of {stream.path} ({stream.split}), batch {stream.batch_size}, "
                f"{samples / stream.images:.1f} epochs"
            )
        validation = self.validation
        images = f"{validation.images} images ({validation.split})" if validation else "none"
        lines.append(f"  validation: {images}; {self.selection}")
        processes = f" x {self.processes} processes" if self.processes > 1 else ""
        lines.append(f"  {self.device_name} ({self.device}){processes}, autocast {self.amp}, seed {self.seed}")
        accumulated = f" of {self.grad_accum_steps} micro-steps" if self.grad_accum_steps > 1 else ""
        resumed = f", resuming after step {self.start_step}" if self.start_step else ""
        lines.append(f"  {self.steps} steps{accumulated}{resumed}")
        if self.run is not None:
            lines.append(f"  {self.run}")
        return "\n".join(lines)


def backbone_configs(part: BaseModel, role: str = "") -> Iterator[tuple[str, BackboneConfig]]:
    """Key path and configuration of every backbone in a recipe."""
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


def find_weights(recipe: Recipe) -> dict[str, WeightsFile]:
    """The weight file of each backbone that has one, by role.

    Raises:
        WeightsError: weights are missing; the message names the command that fetches them.
    """
    found = {role: check_weights(config) for role, config in backbone_configs(recipe)}
    return {role: file for role, file in found.items() if file is not None}


def open_validation(recipe: Recipe, task: Task, datasets: Datasets) -> Source | None:
    """The validation images; None if there are none and the recipe ships the last weights anyway.

    Raises:
        DataError: the validation split is empty or has no masks.
    """
    try:
        return datasets.open(recipe.data.val, "val", task, masks=recipe.trainer.monitor != "entropy")
    except DataError as error:
        if recipe.trainer.monitor == "last":
            return None
        raise DataError(f"{error} Without validation images, set trainer.monitor: last.") from None


def class_pixels(method: Method, streams: Mapping[str, Source]) -> list[int]:
    """Pixels of each class in the images of the labeled streams, as counted when their dataset was prepared.

    Raises:
        DataError: the index has no counts.
    """
    items = [item for spec in method.streams if spec.masks for item in streams[spec.name].items]
    counts = [item.classes for item in items if item.classes is not None]
    if len(counts) < len(items):
        raise DataError(
            "loss.class_weights: auto needs the class counts of the labeled images, which the index lacks. "
            "Prepare the dataset again."
        )
    return [sum(column) for column in zip(*counts, strict=True)]


def absent_classes(method: Method, streams: Mapping[str, Source], task: Task) -> list[str]:
    """One warning per labeled stream that lacks a class, by the class counts of the index."""
    warnings = []
    for spec in (spec for spec in method.streams if spec.masks):
        counts = [item.classes for item in streams[spec.name].items]
        absent = [name for i, name in enumerate(task.class_names) if not any(c is None or c[i] for c in counts)]
        if absent:
            warnings.append(
                f"stream {spec.name!r}: none of its {len(counts)} images contains {', '.join(absent)}; the network "
                "cannot learn these classes. Add images that contain them, or select such images in data.streams."
            )
    return warnings


def make_plan(
    recipe: Recipe,
    task: Task,
    hardware: Hardware,
    method: Method,
    weights: Mapping[str, WeightsFile],
    streams: Mapping[str, Source],
    validation: Source | None,
    ranks: Ranks,
) -> TrainPlan:
    """Collect what is known before the first step."""
    config, device = recipe.trainer, hardware.device
    backbones = {
        role: f"{backbone.name}, {weights[role].source if role in weights else 'random weights'}"
        for role, backbone in backbone_configs(recipe)
    }
    return TrainPlan(
        method=recipe.method,
        name=recipe.name,
        title=recipe.title,
        reference=recipe.reference,
        device=str(device),
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        amp={torch.bfloat16: "bf16", torch.float16: "fp16", None: "none"}[hardware.amp_dtype],
        processes=ranks.world_size,
        seed=recipe.seed,
        steps=config.steps,
        grad_accum_steps=config.grad_accum_steps,
        streams={
            spec.name: _split_plan(
                recipe,
                _select(recipe, spec),
                spec.split,
                streams[spec.name],
                batch_size=config.batch_of(spec.name),
            )
            for spec in method.streams
        },
        validation=None
        if validation is None
        else _split_plan(recipe, recipe.data.val, "val", validation, batch_size=recipe.eval.batch_size),
        selection=_selection(recipe, method, validation),
        classes=task.class_names,
        bands=task.bands,
        backbones=backbones,
        weight_hashes={role: file.sha256 for role, file in weights.items()},
        parameters=sum(p.numel() for p in method.deployable().parameters()),
        trainable=sum(p.numel() for p in method.parameters() if p.requires_grad),
    )


def _select(recipe: Recipe, spec: StreamSpec) -> SelectConfig:
    return recipe.data.streams.get(spec.name, SelectConfig())


def _split_plan(recipe: Recipe, select: SelectConfig, split: str, source: Source, *, batch_size: int) -> SplitPlan:
    return SplitPlan(
        path=str(select.path or recipe.data.path),
        split=select.split or split,
        images=len(source.items),
        digest=digest_of(source.items),
        batch_size=batch_size,
    )


def _selection(recipe: Recipe, method: Method, validation: Source | None) -> str:
    """How the weights to ship are chosen, in words: by which score, on whose labels.

    Selection by labels of a domain that trains without them must be visible in the run.
    """
    monitor = recipe.trainer.monitor
    if validation is None or monitor == "last":
        return "the last weights ship, without selection"
    images = len(validation.items)
    if monitor == "entropy":
        return f"lowest entropy on {images} images, without labels"
    chosen = _domain(recipe, recipe.data.val)
    sharing = [spec for spec in method.streams if _domain(recipe, _select(recipe, spec)) == chosen]
    unlabeled = bool(sharing) and not any(spec.masks for spec in sharing)
    whose = f" of the domain of stream {sharing[0].name!r}, which trains without labels" if unlabeled else ""
    return f"best {monitor} on labels of {images} images{whose}"


def _domain(recipe: Recipe, select: SelectConfig) -> tuple[str, str | None]:
    return str(select.path or recipe.data.path), select.domain
