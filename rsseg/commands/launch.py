"""Run one command in several processes, one per GPU."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import typer

from rsseg.commands.console import print_error
from rsseg.errors import Interrupted


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
