"""Several processes of one command, one per GPU."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import typer

from rsseg.commands.console import print_error
from rsseg.errors import Interrupted


def start_workers(gpus: int) -> int:
    """Run this same command once per GPU under torchrun; returns the exit code of the process that failed first, or 0.

    Whoever fails has said why; torchrun, which would add a report of its own, ends the others.
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
            print_error(f"process {first.local_rank} was killed by signal {-first.exitcode}; was memory short?")
            return 128 - first.exitcode
        return first.exitcode
    except SignalException:
        return 130
    return 0


@contextmanager
def silent(when: bool) -> Iterator[None]:
    """Of several processes that do the same, and are interrupted together, one talks."""
    if not when:
        yield
        return
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    except Interrupted as error:
        raise typer.Exit(error.exit_code) from None
