"""Small text files, written atomically: JSON, CSV, logs."""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rsseg.errors import MachineError


def write_text(path: Path, text: str) -> None:
    """Replace a file through a temporary name; raise `MachineError` if it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise MachineError(f"{path}: cannot be written: {error}. Free some space or choose another --output.") from None


def write_json(path: Path, values: Any) -> None:
    """Replace a JSON file; see `write_text`."""
    write_text(path, json.dumps(values, indent=1, default=str) + "\n")


def append_line(path: Path, line: str) -> None:
    """Append a line to a log; raise `MachineError` if the disk is full."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise MachineError(f"{path}: cannot be written: {error}. Free some space or choose another --output.") from None


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a CSV file; new columns are added to all rows."""
    columns: list[str] = []
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            columns = next(csv.reader(file), [])
    new = [name for name in row if name not in columns]
    if new:
        write_rows(path, [*read_rows(path), dict(row)], [*columns, *new])
    else:
        append_line(path, _csv_line([row.get(name, "") for name in columns]))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV file, values as text; empty without a file. A truncated last line is dropped."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def write_rows(path: Path, rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Replace a CSV file."""
    lines = [_csv_line(columns), *(_csv_line([row.get(name, "") for name in columns]) for row in rows)]
    write_text(path, "\n".join(lines) + "\n")


def keep_rows_until(path: Path, step: int) -> None:
    """Drop the rows of steps after `step`."""
    rows = read_rows(path)
    if rows:
        write_rows(path, [row for row in rows if int(row["step"]) <= step], list(rows[0]))


def _csv_line(values: Sequence[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    return line.getvalue()
