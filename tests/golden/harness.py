"""Golden cases: inputs, weights and outputs recorded from the original implementations, read from RSSEG_GOLDENS.

A case's kind is its JSON's `module` (of an object its `type`, of a phrase the part before the first comma), or where
there is none the leading words of its name. The driver of a kind builds the code under test from the case's own JSON.
It fails on a kind, a setting or a rule that it does not know.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.golden.case import Case, Tensors
from tests.golden.comparison import explain
from tests.golden.settings import Settings

GOLDENS = Path(os.environ.get("RSSEG_GOLDENS", Path(__file__).parents[2] / ".." / "shared" / "goldens")).resolve()
REAL_SIZE = " at real size"
"""Ending of modules that name parts of a published network; the kind of such a case."""
LARGE_INPUT = 512 * 512
"""Pixels of generated input from which a case is marked slow; so are whole models whose parameters are generated."""

Driver = Callable[[Case], None]
Drivers = Mapping[str, Driver]


class GoldenWarning(UserWarning):
    """Noteworthy property of a recorded case that passes."""


def case_paths(method: str) -> list[Path]:
    """JSON file of every case of a method; empty where the goldens are absent."""
    folder = GOLDENS / method
    return sorted(path for path in folder.glob("*.json") if path.stem.lower() != "index") if folder.is_dir() else []


def load_case(path: Path, drivers: Drivers, dtype: torch.dtype = torch.float32) -> Case:
    """Read a case; floating-point tensors become `dtype` (narrower ones were stored without loss)."""
    meta = json.loads(path.read_text(encoding="utf-8"))
    stored = path.with_suffix(".safetensors")
    tensors = load_file(stored) if stored.exists() else {}
    kind, detail = kind_of(meta, path.stem, drivers)
    return Case(path.stem, kind, detail, Settings(meta), Tensors({key: _cast(t, dtype) for key, t in tensors.items()}))


def kind_of(meta: Mapping[str, Any], name: str, drivers: Drivers) -> tuple[str, str]:
    """Kind, and the rest of a module that is a phrase."""
    module = meta.get("module")
    if module is None:
        words = [kind for kind in drivers if name == kind or name.startswith(f"{kind}_")]
        return max(words, key=len, default=name), ""
    if isinstance(module, Mapping):
        return str(module["type"]), ""
    if module in drivers:
        return module, ""
    phrase, _, rest = module.partition(",")
    if phrase.endswith(REAL_SIZE):
        return REAL_SIZE.strip(), rest.strip()
    return phrase.strip(), rest.strip()


def run_case(path: Path, drivers: Drivers) -> None:
    """Run a case with the driver of its kind, and fail on every difference, on unread settings and on doing nothing.

    Where float32 results differ, the case is run once more in float64, and a difference that is only rounding becomes a
    warning; see `explain`.
    """
    case = load_case(path, drivers)
    if case.kind not in drivers:
        pytest.fail(f"{path.name}: no driver for the kind {case.kind!r}")
    drivers[case.kind](case)
    for note in [*case.comparison.notes, *_explain_differences(case, path, drivers)]:
        warnings.warn(f"{case.name}: {note}", GoldenWarning, stacklevel=2)
    if unread := case.unread_settings():
        pytest.fail(f"{path.name}: the driver of {case.kind!r} does not know the settings {', '.join(unread)}")
    if unread := case.unread_results() + case.unread_sections():
        warnings.warn(f"{case.name}: not compared: {', '.join(unread)}", GoldenWarning, stacklevel=2)
    assert case.comparison.count, f"{path.name}: the driver of {case.kind!r} compared nothing"


def _explain_differences(case: Case, path: Path, drivers: Drivers) -> list[str]:
    """Fail on differences that are not rounding; describe the others."""
    differences = case.comparison.differences
    if not differences:
        return []
    possible = all(difference.may_be_rounding for difference in differences)
    exact, problem = run_in_float64(path, drivers) if possible else (None, "")
    values = exact.comparison.values if exact else {}
    noise = {difference.label: case.comparison.noise(values, difference) for difference in differences}
    reasons = [explain(d, values[d.label], noise[d.label]) if d.label in values else None for d in differences]
    wrong = [str(difference) for difference, reason in zip(differences, reasons, strict=True) if reason is None]
    if wrong:
        pytest.fail("\n".join([f"{path.name}:", *wrong, *([problem] if problem else [])]))
    return [reason for reason in reasons if reason is not None]


def run_in_float64(path: Path, drivers: Drivers) -> tuple[Case | None, str]:
    """The case after a run in float64, or None and the reason why there is none."""
    case = load_case(path, drivers, torch.float64)
    try:
        with float64():
            drivers[case.kind](case)
    except Exception as error:  # whatever does not run in float64; the float32 differences stand
        return None, f"(no float64 results: {type(error).__name__}: {error})"
    return case, ""


@contextmanager
def float64() -> Iterator[None]:
    """Make new tensors float64, and make `Tensor.float()` in the code under test keep it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with patch.object(Tensor, "float", Tensor.double):
            yield
    finally:
        torch.set_default_dtype(before)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    narrow = tensor.dtype in (torch.float16, torch.bfloat16, torch.float32)
    return tensor.to(dtype) if narrow else tensor


def parametrize_cases(method: str) -> pytest.MarkDecorator:
    """One test per case; a single skipped test where the goldens are absent."""
    paths = case_paths(method)
    if not paths:
        reason = f"no golden cases in {GOLDENS / method}; set RSSEG_GOLDENS"
        return pytest.mark.parametrize("path", [pytest.param(None, marks=pytest.mark.skip(reason=reason))])
    parameters = [pytest.param(path, marks=[pytest.mark.slow] if is_slow(path) else [], id=path.stem) for path in paths]
    return pytest.mark.parametrize("path", parameters)


def is_slow(path: Path) -> bool:
    """Whether a case has generated parameters and a large image or a whole network."""
    meta = json.loads(path.read_text(encoding="utf-8"))
    shape = meta.get("input_shape", ())
    pixels = shape[0] * shape[-1] * shape[-2] if len(shape) == 4 else 0
    whole = any(word in str(meta.get("module", "")).lower() for word in ("whole", "model", "encoderdecoder"))
    return "generator" in meta and (whole or pixels >= LARGE_INPUT)
