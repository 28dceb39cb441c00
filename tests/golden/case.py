"""One golden case: its settings, its tensors, and the comparison of results with what it recorded."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from tests.golden.comparison import Comparison
from tests.golden.generated import DIGESTS, SPELLINGS, STATISTICS, Generator, cut, digest, slices_in
from tests.golden.settings import Settings, plain

RESULTS = (
    "out", "logits", "feat_", "grad", "after", "final", "end_", "negative", "state_after", "loss", "disc_", "acc_",
    "prob", "softmax", "argmax",
)  # fmt: skip
"""How the keys of recorded results begin."""
DESCRIPTIVE = (
    "tensors", "tolerance", "environment", "versions", "notes", "objective", "out_shapes", "seed", "observed",
    "float32", "palette", "num_classes", "scalars",
)  # fmt: skip
"""How the names of sections begin that hold no result of their own."""


class Tensors(Mapping[str, Tensor]):
    """Recorded tensors that track their use."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self.used: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.used.add(key)
        return self._tensors[key]

    def __contains__(self, key: object) -> bool:
        return key in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True)
class Case:
    """A recorded case and what has been compared with it.

    detail  what follows the first comma of a module that is a phrase (`..., grass geometry`)
    """

    name: str
    kind: str
    detail: str
    meta: Settings
    tensors: Tensors
    comparison: Comparison = field(default_factory=Comparison)

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors below `prefix.`, by the rest of their keys."""
        return {
            key.removeprefix(f"{prefix}."): self.tensors[key] for key in self.tensors if key.startswith(f"{prefix}.")
        }

    def sequence(self, prefix: str) -> list[Tensor]:
        """Tensors `prefix.0`, `prefix.1`, ... in order."""
        numbers = sorted(int(key.rpartition(".")[2]) for key in self._numbered(prefix))
        assert numbers == list(range(len(numbers))), f"{self.name}: {prefix} has the numbers {numbers}"
        return [self.tensors[f"{prefix}.{i}"] for i in numbers]

    def has(self, key: str) -> bool:
        """Whether a key is recorded as a tensor or as statistics."""
        return key in self.tensors or key in self.statistics

    def tolerance(self, what: str) -> dict[str, float]:
        """rtol and atol of `what`, with those of `forward` as fallback; a missing one is 0."""
        stated = self.meta["tolerance"]
        if stated == "exact" or stated.get("exact") is True:
            return {"rtol": 0.0, "atol": 0.0}
        names = {name: stated[f"{what}_{name}"] for name in ("rtol", "atol") if f"{what}_{name}" in stated}
        if names:
            return {"rtol": float(names.get("rtol", 0.0)), "atol": float(names.get("atol", 0.0))}
        for name in (what, "forward", "logits"):
            if isinstance(stated.get(name), Mapping):
                stated = stated[name]
                break
        assert "rtol" in stated or "atol" in stated, f"{self.name}: no tolerance for {what}"
        return {"rtol": float(stated.get("rtol", 0.0)), "atol": float(stated.get("atol", 0.0))}

    def close(self, label: str, actual: Any, expected: Any, what: str = "forward", **tolerance: float) -> None:
        """Compare numbers or tensors within the case's tolerance for `what`, or within an explicit tolerance."""
        self.comparison.close(label, actual, expected, **(tolerance or self.tolerance(what)))

    def check(self, actual: Tensor | None, key: str, what: str = "forward") -> None:
        """Compare with a recorded tensor, a recorded part of it, or its recorded statistics."""
        assert actual is not None, f"{self.name}: nothing was computed for {key}"
        assert self.has(key), f"{self.name}: {key} is not recorded"
        if key in self.tensors:
            expected = self.tensors[key]
            if actual.shape != expected.shape:
                actual_part = cut(actual, self._slices(key), expected.shape)
                if _without_ones(actual_part) == _without_ones(expected):
                    actual_part = actual_part.reshape(expected.shape)
            else:
                actual_part = actual
            self.close(key, actual_part.to(expected.dtype), expected, what)
        for name, recorded in self.statistics.get(key, {}).items():
            self._check_statistic(actual, key, name, recorded, what)

    def check_maps(self, maps: Sequence[Tensor], prefix: str, what: str = "forward") -> int:
        """Compare the recorded ones of `prefix.0`, `prefix.1`, ...; return their number."""
        recorded = {i for i in range(len(maps)) if self.has(f"{prefix}.{i}")}
        for i in sorted(recorded):
            self.check(maps[i], f"{prefix}.{i}", what)
        stored = self._numbered(prefix)
        assert len(stored) <= len(recorded), f"{self.name}: {len(maps)} maps were computed for {stored}"
        return len(recorded)

    def check_named(self, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str = "grad") -> None:
        """Compare every expected tensor with the actual one of the same name."""
        for name, tensor in expected.items():
            assert name in actual, f"{self.name}: there is no {name}"
            self.close(f"{what} {name}", actual[name], tensor, what)

    def check_classes(self, label: str, actual: Tensor, expected: Tensor, share: float = 0.999) -> None:
        """Compare class maps; fewer than `share` equal pixels fail (near-ties differ between machines)."""
        assert actual.numel() == expected.numel(), f"{self.name} {label}: {actual.shape}, recorded {expected.shape}"
        equal = (actual.reshape(expected.shape).long() == expected.long()).double().mean()
        self.comparison.close(label, float(equal), 1.0, atol=1 - share)

    def check_differs(self, actual: Tensor, key: str, least: float = 1e-2) -> None:
        """Negative control: fail unless the result is far from the recorded tensor."""
        far = float((actual.detach().reshape(self.tensors[key].shape) - self.tensors[key]).abs().max())
        assert far > least, f"{self.name}: {key} must not be what is computed, but is within {far}"
        self.comparison.count += 1

    def recorded(self, prefix: str) -> list[str]:
        """Names below `prefix.` that are recorded as tensors or statistics."""
        keys = dict.fromkeys([*self.tensors, *self.statistics])
        return [key.removeprefix(f"{prefix}.") for key in keys if key.startswith(f"{prefix}.")]

    @cached_property
    def generator(self) -> Generator | None:
        """Generator of tensors that are not stored, if the case has one."""
        if "generator" not in self.meta:
            return None
        owner = self.meta if "case_number" in self.meta else self.meta["generator"]
        return Generator(self.meta["generator"], int(owner["case_number"]))

    @cached_property
    def statistics(self) -> dict[str, dict[str, Any]]:
        """Recorded statistics by key of the tensor.

        They are looked for in every section: `key: {statistic: value}`, `key: value` in a section that is called like a
        statistic, and there also a list in the order of the recorded outputs.
        """
        found: dict[str, dict[str, Any]] = {}
        for section, entries in self.meta.untracked().items():
            name = section.removeprefix("out_")
            if isinstance(entries, list) and _is_statistic(name):
                keys = [key for key in self.meta["tensors"] if key.startswith("out.")]
                assert len(keys) == len(entries), f"{self.name}: {section} has {len(entries)} values for {keys}"
                entries = dict(zip(keys, entries, strict=True))
            for key, entry in entries.items() if isinstance(entries, Mapping) else ():
                if "." in key and isinstance(entry, Mapping):
                    named = self._statistics_of(key, entry, in_list=section == "tensors")
                elif "." in key and _is_statistic(name):
                    named = {name: entry}
                else:
                    continue
                if named:
                    found.setdefault(key, {}).update(named)
                    plain(self.meta[section])
        return found

    def unread_settings(self) -> list[str]:
        """Paths of hyper-parameters that the driver did not read."""
        sections = ("hyper", "hyper_parameters", "module", "segmentor", "optimizers", "optimiser", "hook")
        named = [self.meta[name] for name in sections if isinstance(self.meta.get(name), Settings)]
        return [path for section in named for path in section.unread()]

    def unread_results(self) -> list[str]:
        """Keys of recorded results that were not compared."""
        return [key for key in self.tensors if key.startswith(RESULTS) and key not in self.tensors.used]

    def unread_sections(self) -> list[str]:
        """Unread sections of the JSON, except text and descriptions."""
        sections = [key for key in self.meta.unread() if "." not in key and not key.startswith(DESCRIPTIVE)]
        return [key for key in sections if not isinstance(self.meta.untracked()[key], str)]

    def _statistics_of(self, key: str, entry: Mapping[str, Any], *, in_list: bool) -> dict[str, Any]:
        """Statistics of one tensor by name. Shapes in the list of tensors are those of the stored part."""
        named = {name: entry[name] for name in entry if name != "dtype" and not (in_list and name == "shape")}
        known = {name: value for name, value in named.items() if _is_statistic(name)}
        if known and len(known) < len(named):
            self.comparison.notes.append(f"{key}: unknown statistics {sorted(set(named) - set(known))}")
        return known

    def _numbered(self, prefix: str) -> list[str]:
        return [key for key in self.tensors if re.fullmatch(rf"{re.escape(prefix)}\.\d+", key)]

    def _slices(self, key: str) -> tuple[slice, ...]:
        texts = [self.meta[name] for name in ("keys", "key_notes", "note", "notes") if name in self.meta]
        stated: dict[str, tuple[slice, ...]] = {}
        for text in texts:
            stated |= slices_in("; ".join(text) if isinstance(text, list) else text)
        return stated.get(key) or stated.get(re.sub(r"\.\d+$", "", key)) or ()

    def _check_statistic(self, actual: Tensor, key: str, name: str, recorded: Any, what: str) -> None:
        label, known = f"{key} {name}", SPELLINGS.get(name, name)
        if known == "shape":
            self.close(label, list(actual.shape), plain(recorded), rtol=0.0, atol=0.0)
        elif known in DIGESTS and actual.is_floating_point() and key.startswith(RESULTS):
            self.comparison.notes.append(f"{label}: bytes of computed numbers differ by rounding and were not compared")
        elif known in DIGESTS:
            assert digest(actual, known) == str(recorded).lower().removeprefix("0x"), f"{self.name}: {label} differs"
            self.comparison.count += 1
        else:
            self.close(label, STATISTICS[known](actual.detach().double()), recorded, what)


def _is_statistic(name: str) -> bool:
    return SPELLINGS.get(name, name) in {*STATISTICS, *DIGESTS, "shape"}


def _without_ones(tensor: Tensor) -> list[int]:
    return [side for side in tensor.shape if side != 1]
