"""Golden cases: inputs, weights and outputs recorded from the original implementations, read from RSSEG_GOLDENS.

A case's kind is its JSON's `module` (or that entry's `type`), or where there is none the leading words of its name.
Handlers build the module from the case's own JSON, so that other cases of a kind run unchanged; a kind without a
handler fails.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDENS = Path(os.environ.get("RSSEG_GOLDENS", Path(__file__).parents[2] / ".." / "shared" / "goldens")).resolve()


@dataclass(frozen=True)
class Case:
    name: str
    kind: str
    meta: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose key starts with `prefix.`, the prefix taken off."""
        return {
            key.removeprefix(f"{prefix}."): value for key, value in self.tensors.items() if key.startswith(f"{prefix}.")
        }

    def sequence(self, prefix: str) -> list[Tensor]:
        """Tensors `prefix.0`, `prefix.1`, ... in order."""
        group = self.group(prefix)
        return [group[str(i)] for i in range(len(group)) if str(i) in group]

    def tolerance(self, what: str) -> dict[str, float]:
        """rtol and atol of `what`; the one that is missing is 0."""
        stated = self.meta["tolerance"]
        chosen = stated.get(what, stated)
        return {"rtol": float(chosen.get("rtol", 0.0)), "atol": float(chosen.get("atol", 0.0))}

    def check(self, actual: Tensor, key: str, what: str = "forward") -> None:
        """Compare with the recorded tensor within the case's own tolerance."""
        expected = self.tensors[key]
        torch.testing.assert_close(
            actual.detach().to(expected.dtype),
            expected,
            **self.tolerance(what),
            msg=lambda text: f"{self.name} {key}: {text}",
        )


Handler = Callable[[Case], None]


def case_paths(method: str) -> list[Path]:
    """JSON file of every case of a method; empty where the goldens are absent."""
    folder = GOLDENS / method
    return sorted(path for path in folder.glob("*.json") if path.stem.lower() != "index") if folder.is_dir() else []


def load_case(path: Path) -> Case:
    meta = json.loads(path.read_text(encoding="utf-8"))
    tensors_file = path.with_suffix(".safetensors")
    module = meta.get("module")
    kind = module["type"] if isinstance(module, dict) else module or re.sub(r"(_[a-z0-9])?$", "", path.stem)
    return Case(path.stem, kind, meta, load_file(tensors_file) if tensors_file.exists() else {})


def run_case(path: Path, handlers: Mapping[str, Handler]) -> None:
    """Find the handler of a case by its kind, or by the longest handler name that its name starts with."""
    case = load_case(path)
    by_name = max((name for name in handlers if case.name.startswith(name)), key=len, default=None)
    handler = handlers.get(case.kind) or (handlers[by_name] if by_name else None)
    if handler is None:
        pytest.fail(f"{path.name}: no handler for kind {case.kind!r}")
    handler(case)


def parametrize_cases(method: str) -> pytest.MarkDecorator:
    """One test per case; a single skipped test where the goldens are absent."""
    paths = case_paths(method)
    if not paths:
        reason = f"no golden cases in {GOLDENS / method}; set RSSEG_GOLDENS"
        return pytest.mark.parametrize("path", [pytest.param(None, marks=pytest.mark.skip(reason=reason))])
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)
