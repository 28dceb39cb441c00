"""A recipe -> a trained run: the only composition of training."""

import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.amp.grad_scaler import GradScaler

from rsseg import distributed
from rsseg.config import check_eval
from rsseg.data.streams import Batch, training_batches
from rsseg.data.task import open_task
from rsseg.errors import Interrupted, MachineError, RssegError, UsageError
from rsseg.evaluation.model import Evaluation, evaluate
from rsseg.files import write_json, write_text
from rsseg.inference.device import keep_heap, resolve_device
from rsseg.inference.network import load_segmenter
from rsseg.layers.ema import Ema
from rsseg.methods.base import Method, Segmenter
from rsseg.methods.registry import method_for
from rsseg.recipe import Recipe, dump_recipe
from rsseg.runs import RunFolder, create_run, find_run
from rsseg.task import Task
from rsseg.training import describe
from rsseg.training.checkpoints import Checkpoints
from rsseg.training.hardware import Hardware, choose_hardware
from rsseg.training.optimizers import build_optimizers
from rsseg.training.plan import absent_classes, check_files, make_plan
from rsseg.training.progress import LineProgress, Progress, Silent, Together
from rsseg.training.recorder import Recorder
from rsseg.training.results import TrainPlan, TrainResult
from rsseg.training.signals import StopSignals
from rsseg.training.state import Counters, Identity, Parts, frozen_hashes, load_state
from rsseg.training.trainer import Surroundings, Trainer


@dataclass(frozen=True)
class _Built:
    """Everything that a recipe describes, checked and on the device."""

    task: Task
    hardware: Hardware
    method: Method
    plan: TrainPlan


def train(
    recipe: Recipe,
    *,
    output: Path = Path("runs"),
    name: str | None = None,
    resume: Path | None = None,
    progress: Progress | None = None,
    source: str | None = None,
) -> TrainResult:
    """Train as a recipe says.

    Args:
        recipe: what to do; see `rsseg.load_recipe`.
        output: folder for runs.
        name: part of the run folder's name; None takes the recipe's.
        resume: run to continue exactly where it was saved; `trainer.steps` may be larger than before.
        progress: listener; None prints plain lines on stderr.
        source: the recipe's text as given, for the run folder.

    Raises:
        DataError, WeightsError, RecipeError, MachineError: something is missing or does not fit; all files are looked
            for before anything is built.
        RecipeError: training diverged.
        Interrupted: SIGINT or SIGTERM; the run was saved and can be resumed.
    """
    with _opened(recipe) as ranks:
        built = _build(recipe, ranks)
        parts, identity = _parts(recipe, built), _identity(recipe, built)
        run, counters = _open_run(recipe, parts, identity, output=output, name=name, resume=resume)
        plan = built.plan.model_copy(update={"run": run.path, "start_step": counters.step})
        listener, recorder = Together(()), None
        if ranks.is_main:
            recorder = Recorder(run.path, class_names=built.task.class_names, ignore_classes=recipe.eval.ignore_classes)
            _write_beginning(run, recipe, plan, identity, source=source, resumed=resume is not None)
            recorder.forget_after(counters.step)
            listener = Together([recorder, LineProgress() if progress is None else progress])
        with _recorded_failure(run, recorder), StopSignals() as signals:
            checkpoints = Checkpoints(
                run,
                recipe.trainer,
                identity,
                partial(describe.model_header, recipe),
                used=plan.used,
                writes=ranks.is_main,
            )
            surroundings = Surroundings(
                batches_from=_batches_from(recipe, built, ranks),
                evaluate=_evaluation(recipe, built),
                checkpoints=checkpoints,
                progress=listener,
                signals=signals,
            )
            listener.on_start(plan)
            for warning in absent_classes(recipe, built.method, built.task):
                listener.on_message(warning)
            reason = Trainer(parts, recipe, built.hardware, surroundings, counters).fit()
        result = _result(run, recipe, counters, reason, recorder)
        if ranks.is_main:
            run.update_manifest(state=result.state, reason=reason, finished=describe.now(), steps=counters.step)
        listener.on_end(result)
        if result.state == "interrupted":
            raise Interrupted(
                f"{reason}: stopped after step {counters.step} of {recipe.trainer.steps}; everything is saved. "
                f"Go on with `rsseg train --resume {run.path}`."
            )
        return result


def plan(recipe: Recipe) -> TrainPlan:
    """What `train` would do; every file is looked for and the networks are built, nothing is written. Same errors."""
    with _opened(recipe) as ranks:
        return _build(recipe, ranks).plan


def check(recipe: Recipe) -> str:
    """Train one step, score one image, save and load, all in a temporary folder; returns what was done. Same errors."""
    shortened = recipe.model_copy(
        update={
            "trainer": recipe.trainer.model_copy(update={"steps": 1, "workers": 0}),
            "data": recipe.data.model_copy(
                update={"val": recipe.data.val.model_copy(update={"count": 1, "fraction": None})}
            ),
        }
    )
    with tempfile.TemporaryDirectory(prefix="rsseg-check-") as folder:
        result = train(shortened, output=Path(folder), progress=Silent())
        segmenter = load_segmenter(result.model)
    parameters = sum(p.numel() for p in segmenter.parameters())
    return (
        f"{recipe.name}: one step, one evaluation, saving and loading work; {parameters / 1e6:.2f} M parameters ship. "
        "Train with `rsseg train`."
    )


@contextmanager
def _opened(recipe: Recipe) -> Iterator[distributed.Ranks]:
    """Process group and torch's global settings for the length of a run."""
    keep_heap()
    before = torch.are_deterministic_algorithms_enabled()
    with distributed.process_group(resolve_device(recipe.trainer.device).type) as ranks:
        torch.use_deterministic_algorithms(before or recipe.trainer.deterministic)
        try:
            yield ranks
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise _out_of_memory(error) from None
        except RuntimeError as error:
            if "can't allocate memory" in str(error):
                raise _out_of_memory(error) from None
            raise
        finally:
            torch.use_deterministic_algorithms(before)


def _out_of_memory(error: BaseException) -> MachineError:
    first_line = str(error).splitlines()[0] if str(error) else "no memory left"
    return MachineError(
        f"memory does not suffice: {first_line} Halve trainer.batch_size and double trainer.grad_accum_steps, or "
        "choose a smaller crop or network."
    )


def _build(recipe: Recipe, ranks: distributed.Ranks) -> _Built:
    hardware = choose_hardware(recipe.trainer, ranks)
    task = open_task(recipe.data)
    weights = check_files(recipe, task)
    torch.manual_seed(recipe.seed)
    method = method_for(recipe, task).to(hardware.device)
    if recipe.trainer.channels_last:
        method = method.to(memory_format=torch.channels_last)
    check_eval(recipe.eval, task.class_names, method.deployable().tile.size)
    return _Built(task, hardware, method, make_plan(recipe, task, hardware, method, weights, ranks))


def _parts(recipe: Recipe, built: _Built) -> Parts:
    """What trains and is saved."""
    return Parts(
        method=built.method,
        ema=Ema(built.method.deployable(), recipe.ema_decay) if recipe.trainer_averages else None,
        optimizers=build_optimizers(built.method, recipe.optimizers),
        scaler=GradScaler(built.hardware.device.type, enabled=built.hardware.amp_dtype == torch.float16),
    )


def _batches_from(recipe: Recipe, built: _Built, ranks: distributed.Ranks) -> Callable[[int], Generator[Batch]]:
    return lambda step: training_batches(
        recipe,
        built.method.streams,
        built.task,
        device=built.hardware.device,
        start_step=step,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )


def _evaluation(recipe: Recipe, built: _Built) -> Callable[[Segmenter], Evaluation] | None:
    if built.plan.validation is None:
        return None
    return partial(
        evaluate,
        recipe=recipe,
        select=recipe.data.val,
        split="val",
        device=built.hardware.device,
        labels=recipe.trainer.monitor != "entropy",
    )


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
    recipe: Recipe, parts: Parts, identity: Identity, *, output: Path, name: str | None, resume: Path | None
) -> tuple[RunFolder, Counters]:
    if resume is None:
        main = distributed.current_ranks().is_main
        path = str(create_run(output, method=recipe.method, name=name or recipe.name).path) if main else ""
        return RunFolder(Path(distributed.told_by_main(path))), Counters()
    run = find_run(resume, output)
    counters = load_state(run.state, parts, identity)
    if counters.step >= recipe.trainer.steps:
        raise UsageError(
            f"{run.path}: has its {counters.step} steps already. Give more with --set trainer.steps=N, or start anew."
        )
    return run, counters


def _write_beginning(
    run: RunFolder, recipe: Recipe, plan: TrainPlan, identity: Identity, *, source: str | None, resumed: bool
) -> None:
    """The files that say what the run is made of."""
    write_text(run.recipe_file, describe.resolved_yaml(recipe))
    manifest = describe.new_manifest(run.path.name, recipe, plan, identity.frozen)
    if resumed:
        before = run.manifest()
        entry = f"{manifest.created} after step {plan.start_step}"
        kept = {name: getattr(before, name) for name in ("created", "steps", "best_score", "best_step")}
        manifest = manifest.model_copy(update={**kept, "resumed": (*before.resumed, entry)})
    else:
        write_text(run.path / "recipe.yaml", source if source is not None else dump_recipe(recipe))
        write_json(run.path / "data.json", describe.data_of(recipe))
    run.write_manifest(manifest)


@contextmanager
def _recorded_failure(run: RunFolder, recorder: Recorder | None) -> Iterator[None]:
    """Leave the reason in the run folder, whatever ends the training."""
    try:
        yield
    except BaseException as error:
        if recorder is not None:
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            reason = str(error) if isinstance(error, RssegError) else repr(error)
            # A full disk may be the very reason; it must not hide the first error.
            try:
                run.update_manifest(state=state, reason=reason, finished=describe.now())
                recorder.on_error(error)
            except RssegError:
                pass
        raise


def _result(run: RunFolder, recipe: Recipe, counters: Counters, reason: str, recorder: Recorder | None) -> TrainResult:
    interrupted = reason.startswith("SIG")
    shipped = counters.step if recipe.trainer.monitor == "last" else counters.best_step
    return TrainResult(
        run=run.path,
        state="interrupted" if interrupted else "finished",
        reason=reason,
        steps=counters.step,
        monitor=recipe.trainer.monitor,
        best_score=counters.best_score,
        best_step=counters.best_step,
        scores=None if recorder is None else recorder.scores_at(shipped),
        model=run.model,
        seconds=counters.elapsed_s,
        next_command=f"rsseg train --resume {run.path}" if interrupted else f"rsseg eval --model {run.path}",
    )
