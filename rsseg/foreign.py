"""Checkpoints of other code bases (.pth), read without executing anything in the file."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from rsseg.errors import WeightsError


def read_state_dict(path: Path, entry: str = "state_dict") -> dict[str, Tensor]:
    """Read the tensors of a .pth file under their stored names.

    Objects of other libraries, such as training logs, are replaced by inert stand-ins.

    Args:
        path: the file.
        entry: key of the state dict; a file that is itself a state dict needs none.

    Raises:
        WeightsError: the file is missing or holds no state dict.
    """
    try:
        unknown: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
            (_Inert, name) for name in get_unsafe_globals_in_checkpoint(path)
        ]
        with safe_globals(unknown):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged or hostile pickles raise almost anything
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise WeightsError(f"{path}: not a readable checkpoint: {reason}. Give the authors' .pth file.") from None
    state = content.get(entry, content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(map(_is_tensor, state, state.values())):
        raise WeightsError(f"{path}: has no state dict {entry!r}. Give the authors' .pth file of a whole model.")
    return dict(state)


def _is_tensor(name: object, value: object) -> bool:
    """Whether an entry of a state dict is a named, dense tensor of numbers in memory."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return isinstance(name, str) and plain and not value.is_quantized  # type: ignore[attr-defined]


@contextmanager
def odd_tensors_refused(path: Path, network: str) -> Iterator[None]:
    """Turn the failure of an operation on tensors of unexpected shape or number into a `WeightsError`."""
    try:
        yield
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise WeightsError(
            f"{path}: its tensors do not fit {network}: {reason}. Give a checkpoint of that network."
        ) from None


def rename(name: str, rules: Sequence[tuple[str, str]], network: str) -> str:
    """Rename a tensor by the first rule (pattern, replacement) whose pattern matches the whole name.

    Raises:
        WeightsError: no rule matches; the tensor does not belong to `network`.
    """
    for pattern, replacement in rules:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    raise WeightsError(f"{name[:200]!r} is not a tensor of {network}. Give a checkpoint of that network.")


class _Inert:
    """Stand-in for any foreign class or function of a checkpoint: accepts all arguments and does nothing."""

    def __new__(cls, *_arguments: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_arguments: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass
