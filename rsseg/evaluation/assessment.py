"""Accuracy and area of a map from a stratified random sample of reference points, with standard errors.

Source: Stehman 2014 (Int. J. Remote Sensing 35, 4923-4939), whose estimators hold whether or not the strata are the
classes of the map; where they are, the results equal those of Olofsson et al. 2014 (Remote Sens. Environ. 148, 42-57).
Every measure is a ratio of two stratified totals. Pixels of unequal ground area count with their area.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsseg.errors import DataError
from rsseg.fields import Result

Z_95 = 1.959964
"""Half width of a 95 % interval of the normal distribution, in standard errors."""
FEW_POINTS = 30
"""With fewer points in a stratum the normal interval is unreliable."""


@dataclass(frozen=True)
class Sample:
    """Labeled reference points.

    stratum  int (n,), position of each point's stratum in `Strata`
    mapped   int (n,), class index of the map
    truth    int (n,), class index of the reference
    area     float (n,), ground area of each point's pixel, any unit; ones if all pixels have the same area
    """

    stratum: NDArray[np.int64]
    mapped: NDArray[np.int64]
    truth: NDArray[np.int64]
    area: NDArray[np.float64]


class Estimate(Result):
    """A value with its standard error and 95 % interval, in the same unit; None where the sample cannot give it."""

    value: float | None
    se: float | None

    @property
    def half_width(self) -> float | None:
        """Half of the 95 % interval."""
        return None if self.se is None else Z_95 * self.se

    def scaled(self, factor: float | None) -> "Estimate | None":
        """The same estimate in another unit."""
        if factor is None:
            return None
        return Estimate(
            value=None if self.value is None else self.value * factor, se=None if self.se is None else self.se * factor
        )


class ClassAssessment(Result):
    """Estimates for one class."""

    name: str
    points: int
    """Number of reference points of this class."""
    users_accuracy: Estimate
    producers_accuracy: Estimate
    area_share: Estimate
    """Share of the class in the mapped area, by the reference."""
    mapped_share: float | None
    """Share of the class in the map, by pixel counting."""
    area_ha: Estimate | None
    """None if the map has no coordinates."""


class Assessment(Result):
    """Accuracy and areas of a map."""

    points: int
    overall_accuracy: Estimate
    classes: tuple[ClassAssessment, ...]
    matrix: tuple[tuple[float, ...], ...]
    """[map, reference], estimated shares of the area; they sum to 1."""
    counts: tuple[tuple[int, ...], ...]
    """[map, reference], points."""
    strata: Mapping[str, tuple[int, int]]
    """Name -> points and pixels."""
    total_ha: float | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Strata:
    """The sampled strata: names, and pixels of each in the whole map."""

    names: tuple[str, ...]
    pixels: tuple[int, ...]


def assess(
    sample: Sample,
    strata: Strata,
    classes: Sequence[str],
    *,
    mapped_shares: Sequence[float] | None = None,
    total_ha: float | None = None,
) -> Assessment:
    """Estimate accuracy and areas.

    Args:
        sample: labeled points; drawn at random within each stratum.
        strata: strata of the sample; every stratum with pixels needs at least two points.
        classes: names, by class index.
        mapped_shares: share of each class in the map, for comparison.
        total_ha: area of the map.

    Raises:
        DataError: a stratum has fewer than two points.
    """
    number = len(classes)
    sizes = np.array(strata.pixels, np.float64)
    counts = np.bincount(sample.stratum, minlength=len(sizes))
    if (bare := np.flatnonzero((counts < 2) & (sizes > 0))).size:
        which = ", ".join(f"{strata.names[i]} ({counts[i]})" for i in bare)
        raise DataError(
            f"a variance needs at least two labeled points in every stratum; there are too few in {which}. "
            "Label more points of the sample, or draw one with more points per stratum."
        )
    totals = _Totals(sample.stratum, sizes, counts)
    area = sample.area
    right = sample.mapped == sample.truth
    per_class = []
    for index, name in enumerate(classes):
        mapped, true = area * (sample.mapped == index), area * (sample.truth == index)
        share = totals.ratio(true, area)
        per_class.append(
            ClassAssessment(
                name=name,
                points=int((sample.truth == index).sum()),
                users_accuracy=totals.ratio(mapped * right, mapped),
                producers_accuracy=totals.ratio(true * right, true),
                area_share=share,
                mapped_share=None if mapped_shares is None else mapped_shares[index],
                area_ha=share.scaled(total_ha),
            )
        )
    cell = sample.mapped * number + sample.truth
    shares = np.array([totals.total(area * (cell == i)) for i in range(number**2)]) / totals.total(area)
    return Assessment(
        points=len(sample.truth),
        overall_accuracy=totals.ratio(area * right, area),
        classes=tuple(per_class),
        matrix=tuple(tuple(row) for row in shares.reshape(number, number).tolist()),
        counts=tuple(tuple(row) for row in np.bincount(cell, minlength=number**2).reshape(number, -1).tolist()),
        strata={n: (int(c), p) for n, c, p in zip(strata.names, counts, strata.pixels, strict=True)},
        total_ha=total_ha,
        warnings=tuple(
            f"stratum {name!r} has {count} points; below {FEW_POINTS} its interval is unreliable."
            for name, count, size in zip(strata.names, counts, sizes, strict=True)
            if size > 0 and count < FEW_POINTS
        ),
    )


class _Totals:
    """Stratified totals and their ratios."""

    def __init__(self, stratum: NDArray[np.int64], sizes: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        used = counts > 0
        self._stratum, self._number = stratum, len(sizes)
        self._weights = np.divide(sizes, counts, out=np.zeros_like(sizes), where=used)
        # Variance of a total per sum of squared deviations, with finite population correction.
        left = np.clip(1 - np.divide(counts, sizes, out=np.zeros_like(sizes), where=sizes > 0), 0, 1)
        self._variance = np.where(used, sizes**2 * left / np.maximum(counts * (counts - 1), 1), 0.0)
        self._counts = np.maximum(counts, 1)

    def total(self, values: NDArray[np.float64]) -> float:
        """Estimated sum of the values (n,) over all pixels of the map."""
        return float(self._weights @ self._sums(values))

    def ratio(self, part: NDArray[np.float64], whole: NDArray[np.float64]) -> Estimate:
        """Total of `part` over total of `whole`, both (n,), with its standard error (Stehman 2014, eq. 27 and 28)."""
        denominator = self.total(whole)
        if denominator <= 0:
            return Estimate(value=None, se=None)
        value = self.total(part) / denominator
        rest = part - value * whole
        deviations = rest - (self._sums(rest) / self._counts)[self._stratum]
        variance = float(self._variance @ self._sums(deviations**2))
        return Estimate(value=value, se=math.sqrt(variance) / denominator)

    def _sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(self._stratum, values, self._number).astype(np.float64)


def sample_size(shares: Sequence[float], expected_accuracy: Sequence[float], target_se: float) -> int:
    """Points needed for a standard error of the overall accuracy (Olofsson et al. 2014, eq. 13).

    Args:
        shares: of each stratum in the map, sum 1.
        expected_accuracy: expected user's accuracy of each stratum, 0..1.
        target_se: target standard error, as a share.
    """
    spread = sum(w * math.sqrt(u * (1 - u)) for w, u in zip(shares, expected_accuracy, strict=True))
    return math.ceil((spread / target_se) ** 2)


def allocate(total: int, shares: Sequence[float], least: int) -> tuple[int, ...]:
    """Points per stratum: proportional to its share, but at least `least` (Olofsson et al. 2014, 5.1.2).

    The extra points of rare strata are taken from the others, never below `least`.
    """
    rare = {i for i, share in enumerate(shares) if share * total < least}
    rest = max(total - least * len(rare), 0)
    common = sum(share for i, share in enumerate(shares) if i not in rare)
    return tuple(least if i in rare else max(round(rest * share / common), least) for i, share in enumerate(shares))
