"""Text: untrusted text decoded and parsed under limits on size and nesting, and values formatted for messages."""

import codecs
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rsseg.errors import DataError, RssegError, UsageError

MAX_BYTES = 1 << 18
"""Of a recipe or class file."""
LIST_BYTES = 64 << 20
"""Of a list of images or scenes."""
MAX_DEPTH = 32
MAX_VALUES = 20_000
"""Maximum number of values of a YAML document, aliases expanded."""

_BOMS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "timestamp", "seq", "map")}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SPECIAL = re.compile(r"[-+]?\.(inf|nan)", re.IGNORECASE).fullmatch


def read_text(path: Path, error: type[RssegError], *, limit: int = MAX_BYTES) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark.

    Args:
        path: a regular file.
        error: class to raise.
        limit: bytes it may have.

    Raises:
        RssegError: of that class; there is no such file, or it is too large, unreadable or in another encoding.
    """
    try:
        if not path.is_file():
            # Reading a pipe could block forever.
            raise error(f"{path}: {'is not a regular file' if path.exists() else 'there is no such file'}.")
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except (OSError, ValueError) as cause:  # ValueError: a NUL in the name
        raise error(f"{path}: cannot be read: {getattr(cause, 'strerror', None) or cause}.") from None
    if len(content) > limit:
        raise error(f"{path}: has more than {limit} bytes, too many for such a text file.")
    bom, encoding = next(((b, e) for b, e in _BOMS.items() if content.startswith(b)), (b"", "utf-8"))
    try:
        text = content[len(bom) :].decode(encoding)
    except UnicodeDecodeError as cause:
        line = content[: cause.start].count(b"\n") + 1
        raise error(f"{path}, line {line}: is not {encoding.upper()} text. Save the file as UTF-8.") from None
    if "\0" in text:
        raise error(f"{path}: is not a text file. Save it as UTF-8.")
    return text


def read_lines(path: Path) -> list[str]:
    """Lines of a list of images or scenes, except empty ones and those that begin with #; raises `DataError`."""
    lines = (line.strip() for line in read_text(path, DataError, limit=LIST_BYTES).splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def byte_size(text: str, option: str) -> int:
    """Bytes of a size such as 800M or 2GiB; raise `UsageError` naming the option."""
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = number[-1:] if number[-1:].isalpha() else ""
    try:
        size = int(float(number.removesuffix(unit)) * _UNITS[unit])
        if size < 1:
            raise ValueError
    except (KeyError, ValueError, OverflowError):
        raise UsageError(f"{option} {text}: write 800M or 2GiB.") from None
    return size


def duration(seconds: float) -> str:
    """Text such as "40 s", "12 min" or "3.5 h"."""
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class YamlDocument:
    """A parsed YAML document.

    values: dictionaries with text keys, lists, None and text. Numbers, dates and truth values stay text, which a schema
        converts: a folder may be called `2024` or `no`. Only infinities and NaN are floats.
    """

    values: Any
    _node: yaml.Node | None = None

    def line_of(self, path: Sequence[Any]) -> int | None:
        """1-based line of the deepest part of `path`, keys and indices, that is in the document."""
        line, node = None, self._node
        for part in path:
            if isinstance(node, yaml.MappingNode):
                pair = next(((k, v) for k, v in node.value if k.value == str(part)), None)
                if pair is None:
                    break
                line, node = pair[0].start_mark.line + 1, pair[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = node.start_mark.line + 1
            else:
                break
        return line


def load_yaml(text: str, label: str, error: type[RssegError]) -> YamlDocument:
    """Parse one YAML document of plain values.

    Args:
        text: the document.
        label: its file or option, for messages.
        error: class to raise.

    Raises:
        RssegError: of that class, with the line: not YAML, a key given twice, a tag, nested too deep, too many values.
    """
    try:
        node = _Loader(text).get_single_node()
        return YamlDocument(None if node is None else _Values().of(node), node)
    except yaml.YAMLError as cause:
        mark = getattr(cause, "problem_mark", None)
        where = f"{label}, line {mark.line + 1}" if mark else label
        problem = str(getattr(cause, "problem", None) or cause).partition("\n")[0]
        raise error(f"{where}: not valid YAML: {problem[:200]}.") from None


def shortened(value: Any) -> str:
    """`repr` of a value for a message, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def load_json(text: str | bytes, label: str, error: type[RssegError]) -> Any:
    """Parse JSON; raises an error of class `error` where it is invalid or nested deeper than `MAX_DEPTH`."""
    try:
        value = json.loads(text)
        level = [value]
        for _ in range(MAX_DEPTH):
            tables = [item for item in level if isinstance(item, dict)]
            words = [*(item for item in level if isinstance(item, str)), *(key for table in tables for key in table)]
            "".join(words).encode()  # half of a surrogate pair cannot be printed
            level = [item for table in tables for item in table.values()] + [
                item for row in level if isinstance(row, list) for item in row
            ]
        if level:
            raise RecursionError
    except RecursionError:
        raise error(f"{label}: invalid JSON: nested more than {MAX_DEPTH} levels deep.") from None
    except ValueError as cause:
        raise error(f"{label}: invalid JSON: {str(cause)[:200]}.") from None
    return value


class _Loader(yaml.SafeLoader):
    """Composes nodes; PyYAML recurses into them."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=f"nested more than {MAX_DEPTH} levels deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Values:
    """Converts nodes to values; aliases may repeat nodes or even contain themselves."""

    def __init__(self) -> None:
        self._left = MAX_VALUES

    def of(self, node: yaml.Node, depth: int = 1) -> Any:
        self._left -= 1
        if depth > MAX_DEPTH or self._left < 0:
            raise _problem(node, f"more than {MAX_VALUES} values or {MAX_DEPTH} levels, aliases expanded")
        if node.tag not in _TAGS:
            raise _problem(node, f"{node.tag.rpartition(':')[2][:40]!r} is a tag; only plain values are read")
        if isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            values = {}
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise _problem(key, "a key must be one word")
                line = key.start_mark.line + 1
                if key.value in values:
                    raise _problem(key, f"key {shortened(key.value)} is in line {lines[key.value]} already; remove one")
                lines[key.value], values[key.value] = line, self.of(value, depth + 1)
            return values
        if isinstance(node, yaml.SequenceNode):
            return [self.of(item, depth + 1) for item in node.value]
        if node.tag.endswith(":null"):
            return None
        special = node.tag.endswith(":float") and _SPECIAL(node.value)
        return float(node.value.replace(".", "")) if special else node.value


def _problem(node: yaml.Node, text: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=node.start_mark)
