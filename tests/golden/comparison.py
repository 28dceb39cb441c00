"""Comparison of results with recorded values, which are float32 and so have rounding errors of their own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LARGEST_EXCESS = 10.0
"""Largest error of a float32 value, in tolerances, that counts as rounding."""
LARGEST_SHARE = 0.01
"""Largest fraction of such values in a tensor (one is always allowed)."""
LARGEST_NOISE_RATIO = 16.0
"""Largest ratio of the recorded error to our own largest float32 error."""
SMALL = 64
"""Number of values below which a tensor is too small to estimate our float32 error from."""


@dataclass(frozen=True)
class Difference:
    """A result outside the tolerance of the recorded value, as float64 copies."""

    label: str
    actual: Tensor
    expected: Tensor
    rtol: float
    atol: float

    @property
    def may_be_rounding(self) -> bool:
        """Whether it is small and rare enough to be compared with the float64 result."""
        if self.actual.shape != self.expected.shape:
            return False
        error, bound = (self.actual - self.expected).abs(), self.atol + self.rtol * self.expected.abs()
        disputed = ~(error <= bound)
        few = int(disputed.sum()) <= max(1, LARGEST_SHARE * disputed.numel())
        return few and bool((error[disputed] <= 2 * LARGEST_EXCESS * bound[disputed]).all())

    def __str__(self) -> str:
        if self.actual.shape != self.expected.shape:
            return f"{self.label}: shape {tuple(self.actual.shape)}, recorded {tuple(self.expected.shape)}"
        error = (self.actual - self.expected).abs()
        bound = self.atol + self.rtol * self.expected.abs()
        wrong = ~(error <= bound)
        return (
            f"{self.label}: {int(wrong.sum())} of {wrong.numel()} values differ, by up to {float(error.max()):.3g} "
            f"where {float(bound.flatten()[error.argmax()]):.3g} is allowed"
        )


@dataclass
class Comparison:
    """Everything that one run of a case compared."""

    values: dict[str, Tensor] = field(default_factory=dict)
    tolerances: dict[str, tuple[float, float]] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    count: int = 0

    def close(self, label: str, actual: Any, expected: Any, *, rtol: float = 0.0, atol: float = 0.0) -> None:
        """Record a difference of more than atol + rtol * |expected|.

        Recorded NaNs accept any finite value: there the original overflows or divides by zero.
        """
        self.count += 1
        label = self._unique(label)
        result, recorded = (_as_float64(value) for value in (actual, expected))
        self.values[label], self.tolerances[label] = result, (rtol, atol)
        if result.shape != recorded.shape:
            self.differences.append(Difference(label, result, recorded, rtol, atol))
            return
        undefined = recorded.isnan()
        if undefined.any():
            self.notes.append(f"{label}: {int(undefined.sum())} of {undefined.numel()} recorded values are NaN")
            recorded = torch.where(undefined & result.isfinite(), result, recorded)
        near = (result - recorded).abs() <= atol + rtol * recorded.abs()
        if not (near | (result == recorded)).all():  # infinities are equal, but have no difference
            self.differences.append(Difference(label, result, recorded, rtol, atol))

    def noise(self, exact: Mapping[str, Tensor], difference: Difference) -> float:
        """Largest float32 error of ours, in tolerances: of this tensor, or if it is small of all with its tolerance."""
        tolerance = self.tolerances[difference.label]
        alone = difference.actual.numel() >= SMALL
        labels = [difference.label] if alone else [label for label, t in self.tolerances.items() if t == tolerance]
        pairs = [(self.values[label], exact[label]) for label in labels if label in exact]
        errors = [_in_tolerances(own, value, *tolerance) for own, value in pairs if own.shape == value.shape]
        return max((float(error.nan_to_num(posinf=0.0).max()) for error in errors if error.numel()), default=0.0)

    def _unique(self, label: str) -> str:
        number = 1
        unique = label
        while unique in self.values:
            number += 1
            unique = f"{label} (comparison {number})"
        return unique


def _as_float64(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", torch.float64)
    return torch.tensor(value, dtype=torch.float64)


def _in_tolerances(value: Tensor, exact: Tensor, rtol: float, atol: float) -> Tensor:
    """Error of every value over what is allowed there."""
    return (value - exact).abs() / (atol + rtol * exact.abs())


def explain(difference: Difference, exact: Tensor, noise: float) -> str | None:
    """Description of a difference that is only rounding, or None if it is not.

    `exact` is the same result computed in float64. Where the recorded float32 value is itself outside the tolerance of
    `exact`, ours is compared with `exact` instead, within the same tolerance; where only ours is outside, the recorded
    value is compared with `exact`. To be taken for rounding, such values must be few and near the bound, and a recorded
    one not much worse than `noise`, our own largest float32 error in tolerances.
    """
    actual, expected = difference.actual, difference.expected
    if actual.shape != expected.shape or actual.shape != exact.shape or not exact.isfinite().all():
        return None
    disputed = ~((actual - expected).abs() <= difference.atol + difference.rtol * expected.abs())
    recorded, own = (
        _in_tolerances(value, exact, difference.rtol, difference.atol)[disputed] for value in (expected, actual)
    )
    believable = (
        bool((torch.minimum(recorded, own) <= 1).all())
        and bool((torch.maximum(recorded, own) <= LARGEST_EXCESS).all())
        and int(disputed.sum()) <= max(1, LARGEST_SHARE * disputed.numel())
        and bool((recorded[recorded > 1] <= LARGEST_NOISE_RATIO * noise).all())
    )
    if not believable:
        return None
    return (
        f"{difference.label}: {int(disputed.sum())} of {disputed.numel()} values differ by rounding; from the float64 "
        f"result recorded ones are up to {float(recorded.max()):.2f} tolerances away, ours {float(own.max()):.2f}"
    )
