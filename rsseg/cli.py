"""The command line: commands, error messages and exit codes."""

import atexit
import gc
import os
import sys
import traceback
import warnings
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from rsseg import __version__
from rsseg.commands import (
    dataset,
    evaluate,
    inspect,
    predict,
    recipe,
    runs,
    train,
    weights,
)
from rsseg.commands.console import print_error, print_note
from rsseg.errors import RssegError, RssegWarning, UsageError, machine_error
from rsseg.text import shortened

EXIT_CODES = (
    "Exit codes: 0 done, 1 bug in rsseg, 2 wrong usage, 3 recipe invalid, 4 data invalid or missing, "
    "5 weights or model missing, 6 memory, disk or device, 7 some scenes of a batch failed, 8 check not met, "
    "130 interrupted, state saved."
)

app = typer.Typer(
    name="rsseg",
    help="Train, evaluate and apply remote-sensing image segmentation where labels are few.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("predict")(predict.predict)
app.command("export")(runs.export)
app.command("report")(runs.report)
app.command("suggest")(evaluate.suggest)
app.command("sample")(evaluate.sample)
app.command("assess")(evaluate.assess)
dataset.app.command("gap")(evaluate.gap)
app.add_typer(dataset.app, name="dataset")
app.add_typer(recipe.app, name="recipe")
app.add_typer(runs.app, name="runs")
app.add_typer(weights.backbones, name="backbone")
app.add_typer(weights.app, name="weights")
app.add_typer(inspect.cog, name="cog")
app.command("info")(inspect.info)
app.command("doctor")(inspect.doctor)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"rsseg {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[  # noqa: ARG001 - handled by its callback
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never download anything.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options before the command apply to all commands."""
    if offline:
        os.environ["RSSEG_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    if debug:
        os.environ["RSSEG_DEBUG"] = "1"


def run(arguments: list[str] | None = None) -> int:
    """Run one command line; return the exit code.

    Expected errors are printed as one message. Any other exception is a bug: its traceback goes to a report file.
    """
    try:
        with warnings.catch_warnings():
            show = warnings.showwarning

            def note(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
                """Print our own warnings without the line of code that raised them."""
                if issubclass(category, RssegWarning):
                    print_note(f"warning: {message}")
                else:
                    show(message, category, *where, **more)

            warnings.showwarning = note
            app(arguments)
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # met by the library of the command line
            return _reader_has_gone()
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except RssegError as error:
        if os.environ.get("RSSEG_DEBUG"):
            traceback.print_exc()
        print_error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        print_error("Interrupted.")
        return 130
    except BrokenPipeError:
        return _reader_has_gone()
    except Exception as error:  # every bug ends here
        if (machine := machine_error(error)) is not None:
            print_error(str(machine))
            return machine.exit_code
        if isinstance(error, OSError) and error.filename is not None:
            # Last resort: where the purpose of the file is known, there is a better message.
            print_error(f"{shortened(str(error.filename))}: {error.strerror}. Give another file or folder.")
            return UsageError.exit_code
        return _report_bug(error)
    return 0


def _reader_has_gone() -> int:
    """The reader of the pipe, such as head, has closed it: Python must not complain when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _report_bug(error: Exception) -> int:
    text = f"rsseg {__version__}, Python {sys.version}\ncommand: {sys.argv}\n\n{traceback.format_exc()}"
    if os.environ.get("RSSEG_DEBUG"):
        print_error(text)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rsseg"
    report = cache / f"rsseg-bug-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.txt"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        report.write_text(text, encoding="utf-8")
        where = f"The traceback is in {report}; please attach it to a bug report."
    except OSError:
        where = text
    print_error(f"This is a bug in rsseg: {type(error).__name__}: {error}. {where}")
    return 1


def main() -> None:
    """Entry point of the console script.

    Imports create about a million objects that live until the end. Searching them for cycles while they grow, and
    freeing each of them at exit, would take a good part of a short prediction.
    """
    gc.set_threshold(100_000)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    code = 1  # if Python itself ends the process

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # full, or closed
                stream.flush()
        os._exit(code)

    atexit.register(leave)  # before all others, so that it runs after them
    code = run()
    if code and "LOCAL_RANK" in os.environ:
        leave()  # Python's normal exit could deadlock with processes that wait for this one.
    sys.exit(code)
