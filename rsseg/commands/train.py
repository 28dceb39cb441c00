"""`rsseg train`, and running a command in several processes, one per GPU."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsseg.commands.console import is_live, print_error, print_json, print_note, print_result, print_scores, stderr
from rsseg.commands.recipe import Overrides
from rsseg.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from rsseg.recipe import Recipe
    from rsseg.training.progress import TrainResult


def train(
    recipe: Annotated[str | None, typer.Option("--recipe", help="A file, or the name of a packaged recipe.")] = None,
    method: Annotated[str | None, typer.Option("--method", help="Must agree with the recipe.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Prepared dataset (recipe: data.path).")] = None,
    overrides: Overrides = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps (trainer.steps).")] = None,
    batch_size: Annotated[
        str | None, typer.Option("--batch-size", help="A number, or auto: what fits into memory (trainer.batch_size).")
    ] = None,
    grad_accum_steps: Annotated[int | None, typer.Option("--grad-accum-steps", help="trainer.grad_accum_steps")] = None,
    amp_dtype: Annotated[str | None, typer.Option("--amp-dtype", help="auto, bf16, fp16 or none.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = None,
    log: Annotated[
        str | None, typer.Option("--log", help="Trackers: tensorboard, wandb or both (trainer.log).")
    ] = None,
    max_hours: Annotated[
        float | None, typer.Option("--max-hours", help="Save and stop after this many hours (trainer.max_hours).")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Random seed.")] = None,
    output: Annotated[Path, typer.Option("--output", help="Folder for runs.")] = Path("runs"),
    name: Annotated[str | None, typer.Option("--name", help="Name of the run folder.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Run folder to continue.")] = None,
    resume_anyway: Annotated[
        bool, typer.Option("--resume-anyway", help="Resume even if the recipe or dataset has changed.")
    ] = False,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Processes to start, one per GPU.")] = 1,
    check: Annotated[
        bool, typer.Option("--check", help="Run one step, one evaluation, saving and loading, then stop.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved plan, then stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a model; print the scores, the model file and the next command.

    Examples: rsseg train --method ktda --recipe grass.yaml
              rsseg train --resume runs/latest
    """
    from rsseg.recipe import Flag, load_recipe

    flags = (
        Flag("data.path", data, "--data"),
        Flag("trainer.steps", steps, "--steps"),
        Flag("trainer.batch_size", batch_size, "--batch-size"),
        Flag("trainer.grad_accum_steps", grad_accum_steps, "--grad-accum-steps"),
        Flag("trainer.amp_dtype", amp_dtype, "--amp-dtype"),
        Flag("trainer.device", device, "--device"),
        Flag("trainer.max_hours", max_hours, "--max-hours"),
        Flag("trainer.log", None if log is None else [name.strip() for name in log.split(",")], "--log"),
        Flag("seed", seed, "--seed"),
    )
    settings = [*(overrides or ()), *(flag for flag in flags if flag.value is not None)]
    if resume is not None:
        if recipe is not None:
            raise UsageError("--resume continues a run with its own recipe; leave --recipe out.")
        from rsseg.runs import find_run

        recipe = str(find_run(resume, output).recipe_file)
    if recipe is None:
        raise UsageError("which recipe? Give --recipe NAME; `rsseg recipe ls` lists the packaged ones.")
    loaded = load_recipe(recipe, settings, method=method)
    if gpus > 1 and "LOCAL_RANK" not in os.environ:
        raise typer.Exit(start_workers(gpus))
    with silent(os.environ.get("RANK", "0") != "0"):
        options = {"output": output, "name": name, "resume": resume, "resume_anyway": resume_anyway}
        _train(loaded, recipe, options, check=check, dry_run=dry_run, as_json=as_json)


def _train(
    loaded: "Recipe", recipe: str, options: dict[str, Any], *, check: bool, dry_run: bool, as_json: bool
) -> None:
    from rsseg.recipe import read_recipe
    from rsseg.training import run
    from rsseg.training.progress import LineProgress, LiveProgress

    if dry_run:
        plan = run.plan(loaded, **{key: value for key, value in options.items() if key != "name"})
        print_json(plan) if as_json else print_result(plan.text())
        return
    if check:
        print_note(run.check(loaded))
        return
    source = read_recipe(recipe).text
    progress = LiveProgress(stderr()) if is_live() else LineProgress()
    try:
        result = run.train(loaded, progress=progress, source=source, **options)
    finally:
        progress.close()
    if as_json:
        print_json(result)
        _report(result)
        return
    if result.scores is not None and result.scores.pixels:
        print_scores(result.scores)
    print_result(result.text())
    _report(result)


def _report(result: "TrainResult") -> None:
    """Write the report, if there was an evaluation with labels; a failure does not fail the training."""
    from rsseg.errors import RssegError
    from rsseg.runs import RunFolder

    run = RunFolder(result.run)
    if os.environ.get("RANK", "0") != "0" or not run.evaluation("val").is_file():
        return
    from rsseg.report.page import write_report

    try:
        print_note(f"Report: {write_report(run)}")
    except RssegError as error:
        print_note(f"No report: {error}")


def wait_passively() -> None:
    """Make OpenMP threads sleep while they wait, unless the user's environment says how; call before importing torch.

    Spinning threads take the cores from the other threads and programs that they wait for.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def start_workers(gpus: int) -> int:
    """Run this command once per GPU under torchrun; return the exit code of the first process that failed, or 0.

    The failed process has printed its message, so torchrun's own report is suppressed.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = list(sys.argv[1:])
    if "--gpus" in arguments:
        at = arguments.index("--gpus")
        del arguments[at : at + 2]
    arguments = [a for a in arguments if not a.startswith("--gpus=")]
    logging.disable()
    options = ["--standalone", f"--nproc-per-node={gpus}", "-m", "rsseg", *arguments]
    try:
        run.run(run.parse_args(options))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode < 0:
            print_error(
                f"process {first.local_rank} was killed by signal {-first.exitcode}, possibly for lack of memory."
            )
            return 128 - first.exitcode
        return first.exitcode
    except SignalException:
        return 130
    return 0


@contextmanager
def silent(when: bool) -> Iterator[None]:
    """Discard what this process prints; used in all but one of several processes with the same output."""
    if not when:
        yield
        return
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    except Interrupted as error:
        raise typer.Exit(error.exit_code) from None
