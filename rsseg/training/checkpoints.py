"""State of a run and the files that it is saved in: exact resume, and the models.

The resume state holds everything the next step depends on, in one safetensors file without pickle. Randomness and data
order are functions of (seed, rank, step, micro-step), so no random state is stored."""

import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

import rsseg
from rsseg.checkpoint import ModelHeader, load_into, read_tensors, write_model, write_tensors
from rsseg.config import BaseRecipe
from rsseg.data.streams import Batch
from rsseg.errors import DataError, RecipeError, RssegError, UsageError, WeightsError
from rsseg.files import publish
from rsseg.layers.ema import Ema, Frozen
from rsseg.methods.base import Method, Segmenter, backbone_infos
from rsseg.recipe import Recipe
from rsseg.runs import RunFolder
from rsseg.training.device import shared_as, whole

FREE_KEYS = (
    "name", "title", "reference", "data.path", "data.cache", "trainer.steps", "trainer.eval_every",
    "trainer.checkpoint_every", "trainer.log", "trainer.log_every", "trainer.keep_checkpoints", "trainer.patience",
    "trainer.max_hours", "trainer.workers", "trainer.device", "trainer.sharding", "eval.batch_size",
)  # fmt: skip
"""Recipe values that may change on resume; images are compared by name, not by `data.path`."""


PREVIOUS = "previous.safetensors"
"""Name of the previous state, in case the newest is damaged."""


class Counters(BaseModel):
    """Progress of a run."""

    step: int = 0
    """Optimizer steps done."""
    best_score: float | None = None
    best_step: int | None = None
    since_best: int = 0
    """Evaluations since the best score."""
    elapsed_s: float = 0.0
    skipped: int = 0
    """Steps skipped because a loss was not finite."""
    skipped_in_row: int = 0
    evaluation_due: bool = False
    """The evaluation after `step` was not finished."""


class Identity(BaseModel):
    """Values that must not change on resume."""

    recipe: dict[str, Any]
    frozen: dict[str, str]
    """Module of a teacher -> SHA-256 of its weights."""
    splits: dict[str, str]
    """Stream or split -> SHA-256 of its image names."""
    processes: int

    def sharing(self) -> tuple[int, int]:
        """Processes, and micro-steps of each: their product times the batch size is the global batch."""
        return self.processes, self.recipe.get("trainer", {}).get("grad_accum_steps", 1)


@dataclass(frozen=True)
class Parts:
    """The objects whose tensors are saved and restored."""

    method: Method
    ema: Ema | None
    optimizers: Mapping[str, Optimizer]
    scaler: GradScaler
    template: Segmenter | None = None
    """The shipped network without weights if the others are divided among processes, see `training.device.shard`."""


def save_state(path: Path, parts: Parts, counters: Counters, identity: Identity, *, writes: bool = True) -> None:
    """Replace the state file atomically: `path` is the complete old or the complete new state at any time.

    All ranks must call it; the one that `writes` keeps the complete tensors in the host's memory for a moment.

    Raises:
        MachineError: it cannot be written; the old state is kept.
    """
    live = {f"method/{name}": tensor for name, tensor in parts.method.state_dict().items()}
    if parts.ema is not None:
        live |= {f"ema/{name}": tensor for name, tensor in parts.ema.module.state_dict().items()}
    for name, optimizer in parts.optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            live |= {f"optimizer/{name}/{index}/{key}": v for key, v in state.items() if v is not None}
    tensors = {}
    for name, tensor in live.items():
        complete = whole(tensor)
        if writes:
            tensors[name] = complete if complete is tensor else complete.cpu()
    if not writes:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        publish(path, path.with_name(PREVIOUS))
    metadata = {
        "counters": counters.model_dump_json(),
        "identity": identity.model_dump_json(),
        "scaler": json.dumps(parts.scaler.state_dict()),
    }
    write_tensors(path, tensors, metadata)


def load_state(
    path: Path,
    parts: Parts,
    identity: Identity,
    *,
    anyway: bool = False,
    warn: Callable[[str], None] = lambda _: None,
) -> Counters:
    """Restore a saved state into `parts`, or the one saved before it if it is damaged.

    Args:
        path: state file.
        parts: method, average and optimizers as the recipe builds them.
        identity: of the resumed run.
        anyway: a changed recipe, dataset, teacher or number of processes is a warning.
        warn: gets the warnings.

    Raises:
        WeightsError: the state is missing or damaged, or a teacher has other weights than before.
        RecipeError: a value that must not change differs from the run's.
        DataError: a split has other images than before.
    """
    previous = path.with_name(PREVIOUS)
    try:
        counters, before, scaler, stored = _read_state(path)
    except WeightsError:
        if not previous.exists():
            raise
        counters, before, scaler, stored = _read_state(previous)
        warn(f"{path} is damaged; the run resumes from the state before it, after step {counters.step}.")
    if (then := before.sharing()) != (now := identity.sharing()) and math.prod(then) == math.prod(now):
        warn(
            f"trained by {then[0]} processes with trainer.grad_accum_steps {then[1]} so far, now by {now[0]} with "
            f"{now[1]}: the global batch is the same, dropout and batch-norm statistics are not."
        )
    if changes := list(_changes(before, identity)):
        what = "; ".join(change.what for change in changes)
        if not anyway:
            first = changes[0]
            raise first.error(
                f"{path.parents[2]}: cannot be resumed: {what}. {first.remedy} --resume-anyway accepts the change."
            )
        warn(f"resumed with changes: {what}.")
    load_into(parts.method, _section(stored, "method"), str(path), shared_as)
    if parts.ema is not None:
        load_into(parts.ema.module, _section(stored, "ema"), str(path), shared_as)
    for name, optimizer in parts.optimizers.items():
        kinds = {each.recipe.get("optimizers", {}).get(name, {}).get("name") for each in (before, identity)}
        if len(kinds) > 1:
            warn(f"optimizer {name!r} has another type than before and starts without a state.")
            continue
        try:
            _load_optimizer(optimizer, _section(stored, f"optimizer/{name}"))
        except (LookupError, ValueError) as error:
            raise RecipeError(
                f"{path.parents[2]}: the state of optimizer {name!r} does not fit: {error}. Start a new run."
            ) from None
    if scaler:
        parts.scaler.load_state_dict(scaler)
    return counters


def _read_state(path: Path) -> tuple[Counters, Identity, dict[str, Any], dict[str, Tensor]]:
    counters, before, scaler = _read_metadata(path)
    return counters, before, scaler, read_tensors(path)[0]


def _read_metadata(path: Path) -> tuple[Counters, Identity, dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            counters = Counters.model_validate_json(metadata["counters"])
            return counters, Identity.model_validate_json(metadata["identity"]), json.loads(metadata["scaler"])
    except (OSError, SafetensorError, KeyError, ValueError, ValidationError) as error:
        raise WeightsError(
            f"{path}: no state to resume from: {error}. Start a new run, or --resume another one."
        ) from None


def with_global_batch(recipe: Recipe, path: Path, processes: int) -> Recipe:
    """The recipe with the micro-steps for which `processes` train on the global batches of a saved state.

    Unchanged where there are none, where the recipe has another number than the run, or where the state is unreadable.
    """
    try:
        before = _read_metadata(path)[1].sharing()
    except WeightsError:
        return recipe
    total, micro_steps = math.prod(before), recipe.trainer.grad_accum_steps
    # The run's recipe is that of its last resume, of which there may be no state yet.
    shared = micro_steps in (each[1] for each in (before, _last_sharing(path)) if math.prod(each) == total)
    if not shared or total % processes or micro_steps * processes == total:
        return recipe
    trainer = recipe.trainer.model_copy(update={"grad_accum_steps": total // processes})
    return recipe.model_copy(update={"trainer": trainer})


def _last_sharing(path: Path) -> tuple[int, int]:
    """`Identity.sharing` of the last start of the run with this state; zeros if its manifest does not say."""
    with suppress(UsageError, KeyError):
        plan = RunFolder(path.parents[2]).manifest().plan
        return plan["processes"], plan["grad_accum_steps"]
    return 0, 0


def frozen_hashes(method: nn.Module) -> dict[str, str]:
    """SHA-256 of the weights of every frozen module of a method, by module name."""
    return {name: _digest(m.module) for name, m in method.named_modules() if isinstance(m, Frozen)}


def changed_values(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`key.path: was A, is B` for every changed recipe value outside `FREE_KEYS`."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    return [
        f"{key}: was {old.get(key)!r}, is {new.get(key)!r}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key) and key not in FREE_KEYS
    ]


class _Change(NamedTuple):
    """A difference that changes a resumed run: error to raise, clause, and remedy."""

    error: type[RssegError]
    what: str
    remedy: str


def _changes(before: Identity, now: Identity) -> Iterator[_Change]:
    same_batch = math.prod(before.sharing()) == math.prod(now.sharing())
    for value in changed_values(before.recipe, now.recipe):
        if not (same_batch and value.startswith("trainer.grad_accum_steps:")):
            yield _Change(RecipeError, value, "Restore the recipe, or start a new run.")
    if before.processes != now.processes and not same_batch:
        what = (
            f"it was trained by {before.processes} processes, now there are {now.processes}, which changes the batches"
        )
        remedy = f"Start as many as before, or a number that divides {math.prod(before.sharing())}."
        yield _Change(RecipeError, what, remedy)
    for name in (name for name, digest in now.frozen.items() if before.frozen.get(name) != digest):
        what = f"the weights of the frozen {name!r} differ from those at the start of the run"
        yield _Change(WeightsError, what, "Restore the original weight file, or start a new run.")
    for name in (name for name, digest in now.splits.items() if before.splits.get(name) != digest):
        what = f"the images of {name!r} differ from those at the start of the run"
        yield _Change(DataError, what, "Restore the dataset, or start a new run.")


def _load_optimizer(optimizer: Optimizer, stored: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, tensor in stored.items():
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = shared_as(tensor, parameters[int(index)])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _section(stored: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): tensor for name, tensor in stored.items() if name.startswith(f"{prefix}/")}


def _digest(module: nn.Module) -> str:
    sha = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _leaves(values: Any, path: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from _leaves(value, (*path, str(key)))
    else:
        yield ".".join(path), values


class Checkpoints:
    """Writes `best`, `last`, older checkpoints, the resume state and the model to ship."""

    def __init__(
        self, folder: RunFolder, recipe: BaseRecipe, identity: Identity, *, used: Mapping[str, str], writes: bool
    ) -> None:
        """Prepare for saving.

        Args:
            folder: of the run.
            recipe: written into every model file; `trainer` sets what is kept.
            identity: written into the resume state.
            used: split hash -> `training` or `selection`, written into every model file.
            writes: False on all ranks but the main one.
        """
        self._folder = folder
        self._recipe = recipe
        self._config = recipe.trainer
        self._identity = identity
        self._used = dict(used)
        self._writes = writes

    def save_best(self, segmenter: Segmenter, counters: Counters) -> None:
        """Save the network as the best, which ships unless the recipe ships the last."""
        if not self._writes or self._config.monitor == "last":
            return
        self._write(self._folder.best, segmenter, counters)
        publish(self._folder.best, self._folder.model)

    def save_last(self, segmenter: Segmenter, parts: Parts, counters: Counters) -> None:
        """Save the network as the last, and the state to resume from; all ranks must call it."""
        state = self._folder.state
        if not self._writes:
            save_state(state, parts, counters, self._identity, writes=False)
            return
        last = self._folder.last
        self._write(last, segmenter, counters)
        if self._config.keep_checkpoints > 1:
            publish(last, last.with_name(f"step-{counters.step:08d}.safetensors"))
            for old in sorted(last.parent.glob("step-*.safetensors"))[: -self._config.keep_checkpoints]:
                old.unlink()
        if self._config.monitor == "last" or counters.best_step is None:
            publish(last, self._folder.model)
        save_state(state, parts, counters, self._identity)
        self._folder.update_manifest(steps=counters.step, best_score=counters.best_score, best_step=counters.best_step)

    def save_batch(self, batch: Batch, rank: int) -> Path:
        """Save a batch for inspection: the tensors of each stream as `stream/images` and so on."""
        path = self._folder.path / f"diverged-batch-{rank}.safetensors"
        values = {f"{name}/{key}": value for name, samples in batch.items() for key, value in vars(samples).items()}
        write_tensors(path, {name: value for name, value in values.items() if value is not None}, {})
        return path

    def last_good(self) -> str:
        """Sentence for error messages that names the last checkpoint."""
        kept = self._folder.last
        return f"The last good checkpoint is {kept}." if kept.exists() else "No checkpoint was saved."

    def _write(self, path: Path, segmenter: Segmenter, counters: Counters) -> None:
        training = {
            "step": counters.step,
            "used": self._used,
            "monitor": self._config.monitor,
            "score": counters.best_score if counters.best_step == counters.step else None,
        }
        write_model(path, segmenter.state_dict(), model_header(self._recipe, segmenter, training))


def model_header(recipe: BaseRecipe, segmenter: Segmenter, training: dict[str, Any]) -> ModelHeader:
    """The metadata of a saved network."""
    return ModelHeader(
        recipe=recipe.model_dump(mode="json"),
        task=segmenter.task,
        backbones=backbone_infos(segmenter),
        training={"weights": recipe.ship, **training},
        made_with=versions(),
    )


def versions() -> dict[str, str]:
    """Versions of everything that can change results."""
    found = {"rsseg": rsseg.__version__, "python": platform.python_version()}
    for package in ("torch", "timm", "numpy", "opencv-python-headless", "rasterio"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
