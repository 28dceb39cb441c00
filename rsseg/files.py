"""Small text files of a run that are never half written."""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rsseg.errors import MachineError


def write_text(path: Path, text: str) -> None:
    """Replace a file through a temporary name; raises `MachineError` if that cannot be done."""
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
    """Add a line to a log; raises `MachineError` if the disk is full."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise MachineError(f"{path}: cannot be written: {error}. Free some space or choose another --output.") from None


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a CSV file; a column that the file does not have yet is added to all its rows."""
    columns = _columns(path)
    new = [name for name in row if name not in columns]
    if new:
        write_rows(path, [*read_rows(path), dict(row)], [*columns, *new])
    else:
        append_line(path, _csv_line([row.get(name, "") for name in columns]))


def _columns(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return next(csv.reader(file), [])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV file, values as text; none if there is no file. A last line that was cut off is dropped."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def write_rows(path: Path, rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Replace a CSV file."""
    lines = [_csv_line(columns), *(_csv_line([row.get(name, "") for name in columns]) for row in rows)]
    write_text(path, "\n".join(lines) + "\n")


def keep_rows_until(path: Path, step: int) -> None:
    """Drop the rows of steps that a resumed run will do again."""
    rows = read_rows(path)
    if rows:
        write_rows(path, [row for row in rows if int(row["step"]) <= step], list(rows[0]))


def _csv_line(values: Sequence[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    return line.getvalue()
