"""Train a recipe: the only place that composes data, method, trainer and run folder."""

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.amp.grad_scaler import GradScaler

from rsseg import distributed
from rsseg.backbones.timm_adapter import synchronize_batch_norms
from rsseg.data.sources import Datasets, Source
from rsseg.data.streams import open_streams, training_batches
from rsseg.errors import Interrupted, MachineError, RecipeError, RssegWarning, UsageError, machine_error
from rsseg.evaluation.model import check_settings, evaluate
from rsseg.inference.machine import keep_heap
from rsseg.inference.network import load_segmenter
from rsseg.layers.ema import Ema
from rsseg.methods.base import Method
from rsseg.methods.registry import method_for
from rsseg.recipe import Recipe
from rsseg.runs import ENDED, ExitState, RunFolder, create_run, find_run
from rsseg.task import Task
from rsseg.training.batch_size import largest_batch
from rsseg.training.checkpoints import (
    Checkpoints,
    Counters,
    Identity,
    Parts,
    frozen_hashes,
    load_state,
    with_global_batch,
)
from rsseg.training.device import Hardware, check_gpu, choose_hardware, float32_products, shard, without_weights
from rsseg.training.final import evaluate_shipped, open_statistics, ship_statistics
from rsseg.training.plan import (
    TrainPlan,
    absent_classes,
    class_pixels,
    find_weights,
    make_plan,
    open_validation,
)
from rsseg.training.progress import LineProgress, Progress, TrainResult
from rsseg.training.recorder import Recorder, require_trackers, with_trackers
from rsseg.training.step import build_optimizers
from rsseg.training.trainer import Evaluate, Trainer

_NOT_DETERMINISTIC = " does not have a deterministic implementation"


@dataclass(frozen=True)
class _Built:
    """All parts of a recipe, checked and on the device."""

    task: Task
    datasets: Datasets
    hardware: Hardware
    method: Method
    streams: dict[str, Source]
    validation: Source | None
    statistics: Source | None
    plan: TrainPlan


def train(
    recipe: Recipe,
    *,
    output: Path = Path("runs"),
    name: str | None = None,
    resume: Path | None = None,
    progress: Progress | None = None,
    source: str | None = None,
    resume_anyway: bool = False,
) -> TrainResult:
    """Train a recipe.

    Args:
        recipe: see `rsseg.load_recipe`.
        output: folder for runs.
        name: part of the run folder's name; None uses the recipe's.
        resume: run to continue from its last state; `trainer.steps` may be larger than before.
        progress: listener; None prints plain lines on stderr.
        source: the recipe's text as given, for the run folder.
        resume_anyway: a recipe or dataset that changed since the checkpoint is a warning, not an error.

    Raises:
        DataError, WeightsError, RecipeError, MachineError: something is missing or does not fit; all files are looked
            up before anything is built.
        RecipeError: training diverged.
        Interrupted: SIGINT or SIGTERM; the run is saved and can be resumed.
    """
    recorder: Recorder | None = None

    def record(message: str) -> None:
        if recorder is not None:
            recorder.on_error(MachineError(message))

    with _session(recipe, record) as ranks:
        recipe = _sized(recipe, ranks, None if resume is None else find_run(resume, output).state)
        built = _build(recipe, ranks)
        parts, identity = _parts_and_identity(recipe, built)
        notes = absent_classes(built.method, built.streams, built.task)
        load = partial(load_state, parts=parts, identity=identity, anyway=resume_anyway, warn=notes.append)
        run, counters = _open_run(recipe, load, output=output, name=name, resume=resume)
        plan = built.plan.model_copy(update={"run": run.path, "start_step": counters.step})
        listener = Progress()
        if ranks.is_main:
            console = LineProgress() if progress is None else progress
            console = with_trackers(run, recipe, console, start_step=counters.step)
            listener = recorder = Recorder(run, recipe, built.task.class_names, console)
            recorder.begin(plan, identity.frozen, built.datasets.index(), source=source, resumed=resume is not None)
        with _recorded_failure(recorder), distributed.StopSignals() as signals:
            trainer = Trainer(
                parts,
                recipe,
                built.hardware,
                counters,
                batches_from=lambda step: training_batches(
                    recipe,
                    built.method.streams,
                    built.task,
                    device=built.hardware.device,
                    start_step=step,
                    sources=built.streams,
                    rank=ranks.rank,
                    world_size=ranks.world_size,
                ),
                evaluate=_evaluation(recipe, built),
                checkpoints=Checkpoints(run, recipe, identity, used=plan.used, writes=ranks.is_main),
                progress=listener,
                signals=signals,
            )
            listener.on_start(plan)
            for note in notes:
                listener.on_message(f"warning: {note}")
            reason = trainer.fit()
            if built.statistics and recipe.norm_statistics and ranks.is_main and not reason.startswith("SIG"):
                device = str(built.hardware.device)
                ship_statistics(recipe, recipe.norm_statistics, built.statistics, run.model, device)
            calibration = ""
            if built.validation is not None and recipe.trainer.monitor != "entropy" and not reason.startswith("SIG"):
                calibration = evaluate_shipped(
                    run,
                    recipe,
                    plan,
                    built.validation,
                    built.streams,
                    built.hardware.device,
                    stop=lambda: signals.received is not None,
                )
        result = _result(run, recipe, counters, reason, recorder).model_copy(update={"calibration": calibration})
        listener.on_end(result)
        if result.state == "interrupted":
            raise Interrupted(
                f"{reason}: stopped after step {counters.step} of {recipe.trainer.steps}; the run is saved. "
                f"Continue with `rsseg train --resume {run.path}`."
            )
        return result


def plan(
    recipe: Recipe, *, output: Path = Path("runs"), resume: Path | None = None, resume_anyway: bool = False
) -> TrainPlan:
    """What `train` would do with these arguments: opens all inputs, builds the networks, writes nothing. Same errors.

    Its warnings are raised as `RssegWarning`.
    """
    with _session(recipe) as ranks:
        recipe = _sized(recipe, ranks, None if resume is None else find_run(resume, output).state)
        built = _build(recipe, ranks)
        notes = absent_classes(built.method, built.streams, built.task)
        plan = built.plan
        if resume is not None:
            parts, identity = _parts_and_identity(recipe, built)
            load = partial(load_state, parts=parts, identity=identity, anyway=resume_anyway, warn=notes.append)
            run, counters = _open_run(recipe, load, output=output, name=None, resume=resume)
            plan = plan.model_copy(update={"run": run.path, "start_step": counters.step})
        for note in notes:
            warnings.warn(note, RssegWarning, stacklevel=2)
        return plan


def check(recipe: Recipe) -> str:
    """Train one step, score one image, save and load, all in a temporary folder; return a summary. Same errors."""
    shortened = recipe.model_copy(
        update={
            "trainer": recipe.trainer.model_copy(update={"steps": 1, "workers": 0}),
            "data": recipe.data.model_copy(
                update={"val": recipe.data.val.model_copy(update={"count": 1, "fraction": None})}
            ),
        }
    )
    # All processes share the main process's folder; the others leave it before it is removed.
    with _session(recipe) as ranks, tempfile.TemporaryDirectory(prefix="rsseg-check-") as folder:
        result = train(shortened, output=Path(distributed.broadcast_from_main(folder)), progress=Progress())
        parameters = 0
        if ranks.is_main:
            parameters = sum(p.numel() for p in load_segmenter(result.model).parameters())
    return (
        f"{recipe.name}: one step, one evaluation, saving and loading work; {parameters / 1e6:.2f} M parameters ship. "
        "Train with `rsseg train`."
    )


@contextmanager
def _session(recipe: Recipe, on_peer_failure: Callable[[str], None] = lambda _: None) -> Iterator[distributed.Ranks]:
    """Process group and torch's global settings for the length of a run."""
    keep_heap()
    before = torch.are_deterministic_algorithms_enabled()
    if recipe.trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by the first cuBLAS call
    # An unknown device raises inside the group, so that only one message is printed.
    device_type = "cuda" if torch.cuda.is_available() and recipe.trainer.device != "cpu" else "cpu"
    with distributed.process_group(device_type, on_peer_failure) as ranks:
        torch.use_deterministic_algorithms(before or recipe.trainer.deterministic)
        tf32 = device_type == "cuda" and recipe.trainer.tf32 and not recipe.trainer.deterministic
        try:
            with float32_products(tf32=tf32), _explained():
                yield ranks
        finally:
            torch.use_deterministic_algorithms(before)


@contextmanager
def _explained() -> Iterator[None]:
    """Turn torch's errors that a user can fix into errors with a remedy."""
    try:
        yield
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            reason = str(error).splitlines()[0].rstrip(".")
            raise MachineError(
                f"{reason}. Choose a smaller batch (trainer.batch_size, with more trainer.grad_accum_steps, or auto), "
                "smaller crops (data.augment.crop_size), trainer.amp_dtype: bf16, or a smaller network."
            ) from None
        if (machine := machine_error(error)) is not None:
            raise machine from None
        if _NOT_DETERMINISTIC in str(error):
            kernel = str(error).partition(_NOT_DETERMINISTIC)[0]
            raise RecipeError(
                f"trainer.deterministic: {kernel} has no deterministic form on this device. Set it to false, or "
                "replace the layer that uses it."
            ) from None
        raise


def _sized(recipe: Recipe, ranks: distributed.Ranks, state: Path | None) -> Recipe:
    """The recipe with a number for `trainer.batch_size: auto`, and with the global batch of a state to resume."""
    if state is not None:
        recipe = with_global_batch(recipe, state, ranks.world_size)
    if recipe.trainer.batch_size != "auto":
        return recipe
    if recipe.trainer.sharding == "full":
        raise RecipeError(
            "trainer.batch_size: auto measures an undivided network. Give a number with trainer.sharding: full."
        )
    task = Datasets(recipe.data, recipe.seed).task
    size = largest_batch(recipe, task, choose_hardware(recipe.trainer, ranks))
    return recipe.model_copy(update={"trainer": recipe.trainer.model_copy(update={"batch_size": size})})


def _check_sharding(recipe: Recipe) -> None:
    """Raise `RecipeError` for options that do not work with `trainer.sharding: full`."""
    if recipe.trainer.sharding == "none":
        return
    single = recipe.single if recipe.method == "dasegnet" else None
    key, tune = ("tune", getattr(recipe, "tune", "full")) if single is None else ("single.tune", single.tune)
    if recipe.trainer.amp_dtype == "fp16":
        raise RecipeError("trainer.sharding: full does not scale losses as fp16 needs. Set trainer.amp_dtype: bf16.")
    if tune != "full":
        raise RecipeError(f"trainer.sharding: full is for networks that train as a whole, not for {key}: {tune}.")


def _build(recipe: Recipe, ranks: distributed.Ranks) -> _Built:
    require_trackers(recipe)
    hardware = choose_hardware(recipe.trainer, ranks)
    datasets = Datasets(recipe.data, recipe.seed)
    task = datasets.task
    weights, validation = find_weights(recipe), open_validation(recipe, task, datasets)
    torch.manual_seed(recipe.seed)
    method = method_for(recipe, task).to(hardware.device)
    if recipe.trainer.sync_batch_norm and ranks.world_size > 1:
        check_gpu(hardware, "trainer.sync_batch_norm", "Set it to false")
        synchronize_batch_norms(method)
    _check_sharding(recipe)
    check_settings(recipe.eval, method.deployable())
    if recipe.trainer.channels_last:
        method = method.to(memory_format=torch.channels_last)
    streams = open_streams(recipe, method.streams, task, datasets)
    if recipe.loss.class_weights == "auto":
        method.label_loss.weigh(class_pixels(method, streams), hardware.device)
    statistics = open_statistics(recipe, method.deployable(), task, datasets)
    plan = make_plan(recipe, task, hardware, method, weights, streams, validation, ranks)
    return _Built(task, datasets, hardware, method, streams, validation, statistics, plan)


def _parts_and_identity(recipe: Recipe, built: _Built) -> tuple[Parts, Identity]:
    """The objects that are trained and saved, and what must stay the same; teachers get their storage type."""
    method, device, identity = built.method, built.hardware.device, _identity(recipe, built)
    if built.hardware.amp_dtype is not None:
        for teacher in method.frozen_teachers():
            teacher.store_as(built.hardware.amp_dtype)
    ema, template = Ema(method.deployable(), recipe.ema_decay) if recipe.trainer_averages else None, None
    if recipe.trainer.sharding == "full" and built.plan.processes > 1:
        template = without_weights(method.deployable())
        shard(method, [] if ema is None else [ema.module], device, built.plan.processes)
    parts = Parts(
        method=method,
        ema=ema,
        optimizers=build_optimizers(method, recipe.optimizers),
        scaler=GradScaler(device.type, enabled=built.hardware.amp_dtype == torch.float16),
        template=template,
    )
    return parts, identity


def _evaluation(recipe: Recipe, built: _Built) -> Evaluate | None:
    if built.validation is None:
        return None
    labels = recipe.trainer.monitor != "entropy"
    return partial(evaluate, recipe=recipe, source=built.validation, device=built.hardware.device, labels=labels)


def _identity(recipe: Recipe, built: _Built) -> Identity:
    splits = {name: stream.digest for name, stream in built.plan.streams.items()}
    if built.plan.validation is not None:
        splits["val"] = built.plan.validation.digest
    return Identity(
        recipe=recipe.model_dump(mode="json"),
        frozen=frozen_hashes(built.method),
        splits=splits,
        processes=built.plan.processes,
    )


def _open_run(
    recipe: Recipe, load: Callable[[Path], Counters], *, output: Path, name: str | None, resume: Path | None
) -> tuple[RunFolder, Counters]:
    if resume is None:
        main = distributed.current_ranks().is_main
        path = str(create_run(output, method=recipe.method, name=name or recipe.name).path) if main else ""
        return RunFolder(Path(distributed.broadcast_from_main(path))), Counters()
    run = find_run(resume, output)
    counters = load(run.state)
    # A run that was killed after its last step still lacks what follows it: statistics, last evaluation, calibration.
    ended = run.manifest().state in ENDED
    if ended and counters.step >= recipe.trainer.steps and not counters.evaluation_due:
        raise UsageError(
            f"{run.path}: has its {counters.step} steps already. Set a larger trainer.steps, or start a new run."
        )
    return run, counters


@contextmanager
def _recorded_failure(recorder: Recorder | None) -> Iterator[None]:
    """Record the reason of any failure in the run folder."""
    try:
        with _explained():
            yield
    except BaseException as error:
        if recorder is not None:
            recorder.on_error(error)
        raise


def _result(run: RunFolder, recipe: Recipe, counters: Counters, reason: str, recorder: Recorder | None) -> TrainResult:
    state: ExitState = "interrupted" if reason.startswith("SIG") else "stopped" if reason == "max_hours" else "finished"
    shipped = counters.step if recipe.trainer.monitor == "last" else counters.best_step
    return TrainResult(
        run=run.path,
        state=state,
        reason=reason,
        steps=counters.step,
        total=recipe.trainer.steps,
        monitor=recipe.trainer.monitor,
        best_score=counters.best_score,
        best_step=counters.best_step,
        scores=None if recorder is None else recorder.scores_at(shipped),
        model=run.model,
        seconds=counters.elapsed_s,
        next_command=f"rsseg eval --model {run.path}" if state == "finished" else f"rsseg train --resume {run.path}",
    )
