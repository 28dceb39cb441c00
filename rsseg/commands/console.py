"""Printing: results on stdout, everything else on stderr."""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rsseg.metrics import Scores

PIPE_WIDTH = 160
"""Width of tables in a file or pipe, so that nothing is cut."""


def stdout() -> Console:
    """Console for results."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def stderr() -> Console:
    """Console for progress and messages."""
    return Console(stderr=True, highlight=False)


def is_live() -> bool:
    """Whether stderr can show an updating line."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def print_error(message: str) -> None:
    """One red "error:" line per line of the message."""
    console = stderr()
    for line in message.splitlines():
        console.print("[bold red]error:[/] ", end="")
        console.print(line, markup=False, soft_wrap=True)


def print_note(message: str) -> None:
    """A message on stderr."""
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
    """A table on stdout; numbers are right-aligned, None is shown as "-"."""
    cells = [["-" if cell is None else cell for cell in row] for row in rows]
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for i, column in enumerate(columns):
        numeric = all(isinstance(row[i], int | float) or row[i] == "-" for row in cells)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        # Text, because brackets in a plain cell would be taken for markup.
        table.add_row(*(Text(f"{cell:.{decimals}f}" if isinstance(cell, float) else str(cell)) for cell in row))
    stdout().print(table)


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
    return data
