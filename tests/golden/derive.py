"""Cases derived from recorded ones: other situations of the same kinds, and wrong values, which must fail."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.golden.harness import GOLDENS, Drivers, run_case

Meta = dict[str, Any]
Edit = Callable[[Meta, dict[str, Tensor]], None]

FAILURES = (Exception, pytest.fail.Exception)


def recorded(method: str, name: str) -> Path:
    """JSON file of a recorded case; skips the test where it is absent."""
    path = GOLDENS / method / f"{name}.json"
    if not path.exists():
        pytest.skip(f"no golden case {path}; set RSSEG_GOLDENS")
    return path


def read(path: Path) -> tuple[Meta, dict[str, Tensor]]:
    """Settings and tensors of a case."""
    stored = path.with_suffix(".safetensors")
    return json.loads(path.read_text(encoding="utf-8")), load_file(stored) if stored.exists() else {}


def derive(source: Path, folder: Path, *edits: Edit, name: str | None = None) -> Path:
    """Write a copy of a case after some edits, under its own name unless another is given."""
    meta, tensors = read(source)
    for edit in edits:
        edit(meta, tensors)
    return write(folder / f"{name or source.stem}.json", meta, tensors)


def write(path: Path, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write a case; returns its JSON file."""
    path.write_text(json.dumps(meta), encoding="utf-8")
    stored = path.with_suffix(".safetensors")
    stored.unlink(missing_ok=True)  # of an earlier case of this name
    if tensors:
        save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, stored)
    return path


def fails(path: Path, drivers: Drivers, match: str | None = None) -> None:
    """Fail unless running the case fails."""
    with pytest.raises(FAILURES, match=match):
        run_case(path, drivers)


def drop(*prefixes: str) -> Edit:
    """Drop the tensors whose keys start with one of the prefixes."""

    def edit(_meta: Meta, tensors: dict[str, Tensor]) -> None:
        found = [key for key in tensors if key.startswith(prefixes)]
        assert found, f"nothing begins with {prefixes}"
        for key in found:
            del tensors[key]

    return edit


def spoil(key: str) -> Edit:
    """Change one value of a tensor by more than any tolerance."""

    def edit(_meta: Meta, tensors: dict[str, Tensor]) -> None:
        tensors[key] = spoilt(tensors[key])

    return edit


def spoilt(tensor: Tensor) -> Tensor:
    """Copy with a wrong value in the middle."""
    changed = tensor.contiguous().clone()
    flat = changed.view(-1)
    place = flat.numel() // 2
    if changed.is_floating_point():
        flat[place] += 1 + flat.abs().max()
    else:
        flat[place] = 1 - flat[place] if flat[place] <= 1 else flat[place] - 1
    return changed


def put(path: str, value: Any) -> Edit:
    """Set an entry of the JSON, given as `hyper.arch.depths` or with numbers for places in lists."""

    def edit(meta: Meta, _tensors: dict[str, Tensor]) -> None:
        *parents, last = path.split(".")
        owner: Any = meta
        for parent in parents:
            owner = owner[int(parent)] if isinstance(owner, list) else owner[parent]
        owner[int(last) if isinstance(owner, list) else last] = value

    return edit


def statistics_of(tensor: Tensor) -> dict[str, float]:
    """Statistics that a case may store in place of a large tensor."""
    values = tensor.detach().double()
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "abs_mean": float(values.abs().mean()),
        "min": float(values.min()),
        "max": float(values.max()),
    }


def one_wrong(values: Mapping[str, float]) -> dict[str, float]:
    """Statistics with a wrong mean magnitude."""
    return dict(values) | {"abs_mean": 1.1 * values["abs_mean"] + 0.1}


def exact_sum(x: Tensor) -> float:
    """Float64 sum."""
    return float(x.double().sum())


def seeded(*shape: int, seed: int = 0) -> Tensor:
    """Seeded normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generator_rules() -> dict[str, Any]:
    """Rules for tensors that are not stored, worded as in the recorded cases."""
    return {
        "steps": [
            "s = crc32(utf-8 key name) xor case_number (32 bits)",
            "for element index i = 1..n in row-major order: x = (i*2654435761 + s*40503) mod 2^32",
            "x ^= x>>16; x = x*73244475 mod 2^32; x ^= x>>16; x = x*73244475 mod 2^32; x ^= x>>16",
            "u = x/2^32 - 0.5 in float64",
        ],
        "rules_in_order": [
            "key ends with num_batches_tracked: 0",
            "two or more dimensions: 2*u/sqrt(n/shape[0])",
            "key contains gamma: 0.1",
            "key ends with running_var: 1+u",
            "otherwise: u",
        ],
        "input_rule": "sqrt(12)*u with key name image, row-major NCHW",
        "label_rule": "floor((u+0.5)*5) with key name label",
    }
