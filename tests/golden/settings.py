"""JSON objects that track which entries were read, so that no recorded setting is ignored silently."""

from collections.abc import Iterator, Mapping
from typing import Any

INERT = ("seed", "init_cfg", "with_cp", "note", "comment", "description")
"""Parts of the names of entries that change no number: seeds and initial values of weights, which are recorded;
recomputation in backward, which is exact; and text."""


class Settings(Mapping[str, Any]):
    """A JSON object that marks entries as read on lookup; `in` does not mark them."""

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self._values, self._path = values, path
        self._read: set[str] = set()
        self._wrapped: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        self._read.add(key)
        if key not in self._wrapped:
            self._wrapped[key] = _wrap(value, self._path_of(key))
        return self._wrapped[key]

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Settings({self._path or 'case'}: {dict(self._values)!r})"

    def expect(self, key: str, *allowed: Any) -> None:
        """Fail if an entry is present with a value that the code under test does not support."""
        if key in self:
            value = plain(self[key])
            assert value in allowed, f"{self._path_of(key)}: {value!r} is not supported, only {list(allowed)}"

    def untracked(self) -> Mapping[str, Any]:
        """Raw values, for searches that must not mark entries as read."""
        return self._values

    def unread(self) -> list[str]:
        """Paths of unread entries, except inert ones and null values."""
        paths: list[str] = []
        for key, value in self._values.items():
            if value is None or any(part in key for part in INERT):
                continue
            if key not in self._read:
                paths.append(self._path_of(key))
            else:
                paths += _unread_below(self._wrapped.get(key))
        return paths

    def _path_of(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key


def plain(value: Any) -> Any:
    """Untracked copy of a value; everything in it counts as read."""
    if isinstance(value, Mapping):
        return {key: plain(value[key]) for key in value}
    return [plain(entry) for entry in value] if isinstance(value, list) else value


def _wrap(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        return Settings(value, path)
    if isinstance(value, list):
        return [_wrap(entry, f"{path}[{i}]") for i, entry in enumerate(value)]
    return value


def _unread_below(value: Any) -> list[str]:
    if isinstance(value, Settings):
        return value.unread()
    return [path for entry in value for path in _unread_below(entry)] if isinstance(value, list) else []
