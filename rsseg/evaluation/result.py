"""The result of an evaluation, and its file; read without loading a network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from rsseg.errors import DataError, MachineError
from rsseg.evaluation.details import Details
from rsseg.fields import Result
from rsseg.files import write_text
from rsseg.metrics import Scores, scores


class Evaluation(Result):
    """A confusion matrix and the scores derived from it."""

    counts: tuple[tuple[int, ...], ...]
    """(K + 1) rows of K: [target, prediction]; the last row counts the predictions on unlabeled pixels."""
    scores: Scores
    images: int
    seconds: float
    seen: str | None = None
    """`training` or `selection` if the model was trained or selected on these images: not an independent test."""
    entropy: float | None = None
    """Mean normalized entropy of the probabilities, 0..1, if `evaluate` ran without labels; `counts` and `scores` are
    then empty."""
    unpredicted: int = 0
    """Labeled pixels where a class raster has no data; excluded from the scores."""
    details: Details | None = None
    """None where only the sums were asked for."""

    @classmethod
    def of(
        cls,
        counts: NDArray[np.int64],
        names: Sequence[str],
        ignore: Sequence[str],
        *,
        images: int,
        seconds: float,
        entropy: float | None = None,
        unpredicted: int = 0,
    ) -> Self:
        """Score int64 (K + 1, K) counts; raises `DataError` for an ignored class that does not exist."""
        return cls(
            counts=tuple(tuple(row) for row in counts.tolist()),
            scores=scores(counts, names, ignore=ignore),
            images=images,
            seconds=seconds,
            entropy=entropy,
            unpredicted=unpredicted,
        )

    @property
    def matrix(self) -> NDArray[np.int64]:
        """int64 (K, K) of labeled pixels, [target, prediction]."""
        return np.array(self.counts[:-1], np.int64)


def save_evaluation(result: Evaluation, file: Path) -> None:
    """Write an evaluation as JSON; raises `MachineError` if the folder cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{file.parent}: cannot be written: {error}. Free some space.") from None
    write_text(file, result.model_dump_json() + "\n")


def load_evaluation(file: Path) -> Evaluation:
    """Read what `save_evaluation` wrote; raises `DataError` for a damaged file."""
    try:
        return Evaluation.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{file}: not a readable evaluation: {error}. Make it again with `rsseg eval`.") from None
