"""Terminal output: results on stdout; messages, errors and the progress of loops on stderr."""

import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

if TYPE_CHECKING:
    from rsseg.metrics import Scores

INTERVAL_S = 10.0
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
"""Option of every command that prints a result."""
Engine = Annotated[str, typer.Option("--engine", help="torch, onnx, openvino or auto: program that runs the network.")]
Quantize = Annotated[str, typer.Option("--quantize", help="int8: 8-bit arithmetic, with onnx or openvino.")]
Calibrate = Annotated[
    Path | None, typer.Option("--calibrate", help="Prepared dataset whose images int8 is calibrated with.")
]
"""Options of the commands that run a network."""
_PIPE_WIDTH = 10_000
"""Width in a file or pipe: one line per row of a table. COLUMNS limits it."""
_LONG_CELL = 20
"""Characters from which a cell may be wrapped."""
_GAP = 3
"""Characters between columns; a table has two more at its sides."""


def stdout() -> Console:
    """Console for results."""
    limited = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal()
    return Console(width=None if limited else _PIPE_WIDTH, highlight=False)


def stderr() -> Console:
    """Console for progress and messages."""
    return Console(stderr=True, highlight=False)


def is_live() -> bool:
    """Whether stderr can show an updating line."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def print_error(message: str) -> None:
    """One red "error:" line per line of the message."""
    console = stderr()
    with suppress(OSError):  # a message that cannot be written must not change the exit code
        for line in message.splitlines():
            console.print("[bold red]error:[/] ", end="")
            console.print(line, markup=False, soft_wrap=True)


def print_note(message: str) -> None:
    """A message on stderr."""
    with suppress(OSError):
        stderr().print(message, markup=False, soft_wrap=True)


def print_result(text: str) -> None:
    """A result on stdout, never wrapped."""
    stdout().print(text, markup=False, soft_wrap=True)


def print_json(data: Any) -> None:
    """A result as JSON on stdout; Pydantic models and lists of them are dumped."""
    sys.stdout.write(json.dumps(_plain(data), indent=2, default=str) + os.linesep)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None, decimals: int = 4
) -> None:
    """A table on stdout; numbers are right-aligned, None is shown as "-".

    Headers and long cells are wrapped between words. Columns that do not fit beside each other follow in further
    tables, which repeat the first column.
    """
    values = [list(row) for row in rows]
    cells = [[shown(cell, decimals=decimals) for cell in row] for row in values]
    numeric = [all(isinstance(row[i], int | float | None) for row in values) for i in range(len(columns))]
    least = [_least_width(column, [row[i] for row in cells]) for i, column in enumerate(columns)]
    console = stdout()
    groups = [[0]] if columns else []
    for i in range(1, len(columns)):
        if len(groups[-1]) > 1 and sum(least[j] + _GAP for j in (*groups[-1], i)) - 1 > console.width:
            groups.append([0])
        groups[-1].append(i)
    for number, group in enumerate(groups):
        table = Table(box=SIMPLE_HEAD, title=None if number else title, title_justify="left", pad_edge=False)
        for i in group:
            justify: JustifyMethod = "right" if numeric[i] else "left"
            header = textwrap.fill(columns[i], least[i], break_long_words=False)
            short = all(len(row[i]) <= _LONG_CELL for row in cells)
            table.add_column(header, justify=justify, overflow="fold", no_wrap=short or i == 0 < len(group) - 1)
        for row in cells:
            # Text, because brackets in a plain cell would be taken for markup.
            table.add_row(*(Text(row[i]) for i in group))
        console.print(table)


def print_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Names and values on stdout, one per line and never cut; None, False and empty values are left out."""
    lines = [(name, shown(value, decimals=None)) for name, value in facts if value not in (None, False, "", (), [], {})]
    width = max((len(name) for name, _ in lines), default=0)
    print_result("\n".join(f"{name:{width}}  {text}" for name, text in lines))


def shown(value: object, *, decimals: int | None = 4) -> str:
    """A value as text: "-" for None, commas between the items of a list.

    Floats have that number of decimals; None: four significant digits.
    """
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}" if decimals is None else f"{value:.{decimals}f}"
        case list() | tuple():
            return ", ".join(shown(item, decimals=decimals) for item in value)
        case dict():
            return ", ".join(f"{key} {shown(item, decimals=decimals)}" for key, item in value.items())
    return str(value)


def _least_width(header: str, cells: Sequence[str]) -> int:
    """Characters that a column needs if only long cells and the header are wrapped, between words."""
    words = [len(word) for text in (header, *cells) for word in text.split()]
    return max([*words, *(min(len(cell), _LONG_CELL) for cell in cells)], default=1)


def print_scores(scores: "Scores") -> None:
    """Scores per class, best IoU first, and the means."""
    rows = sorted(scores.classes, key=lambda c: -1.0 if c.iou is None else c.iou, reverse=True)
    columns = ("class", "IoU", "F1", "precision", "recall", "pixels")
    print_table(columns, [(c.name, c.iou, c.f1, c.precision, c.recall, c.support) for c in rows])
    means = (("mIoU", scores.miou), ("mF1", scores.mf1), ("OA", scores.oa), ("pixels", scores.pixels))
    print_table([name for name, _ in means], [[value for _, value in means]])
    if scores.absent:
        print_note(f"{scores.absent} class(es) are neither labeled nor predicted; they are excluded from the means.")


def _plain(data: Any) -> Any:
    if isinstance(data, BaseModel):
        return data.model_dump(mode="json")
    if isinstance(data, list | tuple):
        return [_plain(item) for item in data]
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    return data


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Progress of one loop; the yielded function is called with (done, total), before the first item with 0."""
    with stage_bar() as advance:
        # Off a terminal, a loop of one item would be a line without information.
        yield lambda done, total: advance(title, done, total) if total != 1 or is_live() else None


@contextmanager
def stage_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Progress of several loops in turn; the yielded function is called with (title, done, total).

    A loop of at most one item is a message: off a terminal its title is printed once, without counts.
    """
    if not is_live():
        yield _Lines().advance
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr(), transient=True) as progress:
        task = progress.add_task("", total=None, visible=False)
        yield lambda title, done, total: progress.update(
            task, description=title, completed=done, total=total or None, visible=True
        )


class _Lines:
    """One tqdm counter per title."""

    def __init__(self) -> None:
        self._counters: dict[str, _LineCounter] = {}

    def advance(self, title: str, done: int, total: int) -> None:
        """Count; a line is printed once per interval."""
        if title not in self._counters:
            if total == 1:
                print_note(title)
            counts = "{n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left" if total else "{n_fmt}, {rate_fmt}"
            self._counters[title] = _LineCounter(
                desc=title,
                initial=done,
                mininterval=INTERVAL_S,
                delay=INTERVAL_S,
                miniters=1,
                bar_format=f"{{desc}}: {counts}",
            )
        counter = self._counters[title]
        counter.total = total or None
        counter.update(done - counter.n)


class _LineCounter(tqdm):  # type: ignore[type-arg]
    """tqdm for log files: prints whole lines and starts no thread."""

    monitor_interval = 0

    def display(self, msg: str | None = None, pos: int | None = None) -> None:  # noqa: ARG002
        """Print the counts."""
        print_note(msg or str(self))

    def close(self) -> None:
        """Print no last line."""
        self.disable = True
