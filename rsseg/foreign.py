"""Checkpoints of other code bases (.pth): their tensors, without running anything in the file."""

import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from rsseg.errors import WeightsError


def read_state_dict(path: Path, entry: str = "state_dict") -> dict[str, Tensor]:
    """The tensors of a .pth file under the names they have there.

    Training logs and settings that lie beside them are objects of other libraries; inert stand-ins take their place.

    Args:
        path: the file.
        entry: key of the state dict; a file that holds nothing but a state dict is read as it is.

    Raises:
        WeightsError: the file is missing or holds no state dict.
    """
    try:
        unknown: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
            (_Inert, name) for name in get_unsafe_globals_in_checkpoint(path)
        ]
        with safe_globals(unknown):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path}: not a readable checkpoint: {reason}. Give the authors' .pth file.") from None
    state = content.get(entry, content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{path}: holds no state dict {entry!r}. Give the authors' .pth file of a whole model.")
    return dict(state)


def rename(name: str, rules: Sequence[tuple[str, str]], network: str) -> str:
    """The name by the first rule (pattern, replacement) whose pattern matches all of it.

    Raises:
        WeightsError: no rule matches, so the tensor does not belong to `network`.
    """
    for pattern, replacement in rules:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    raise WeightsError(f"{name!r} is not a tensor of {network}. Give a checkpoint of that network.")


class _Inert:
    """Stands in for any foreign class or function of a checkpoint: takes everything, does nothing."""

    def __new__(cls, *_arguments: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_arguments: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass
