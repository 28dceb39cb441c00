"""The result of an evaluation and its file, and the comparison of runs by such results; no network is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from rsseg.errors import DataError, MachineError, UsageError
from rsseg.evaluation.details import Details, Difference, ImageScores, Scorer, paired_differences
from rsseg.fields import Result
from rsseg.files import write_text
from rsseg.inference.engines import Quantization
from rsseg.metrics import Scores, scores
from rsseg.runs import RunFolder


class Evaluation(Result):
    """A confusion matrix and the scores derived from it."""

    counts: tuple[tuple[int, ...], ...]
    """(K + 1) rows of K: [target, prediction]; the last row counts the predictions on unlabeled pixels."""
    scores: Scores
    images: int
    seconds: float
    seen: str | None = None
    """`training` or `selection` if the model was trained or selected on these images: not an independent test."""
    engine: str = "torch"
    """Program that ran the network."""
    quantization: Quantization | None = None
    """Of a network in int8 arithmetic, with its loss of mIoU on the images of the calibration's dataset."""
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


@dataclass(frozen=True)
class Compared:
    """A run with its evaluation, and its differences to the first run (None for that run itself)."""

    run: RunFolder
    evaluation: Evaluation
    differences: dict[str, Difference] | None


def evaluations_of(run: RunFolder) -> dict[str, Evaluation]:
    """Name -> evaluation with details; `test` first, then by name, `val` last.

    Raises:
        UsageError: there is none.
        DataError: one is damaged.
    """
    files = sorted((run.path / "evaluations").glob("*.json"), key=lambda f: (f.stem != "test", f.stem == "val", f.stem))
    found = {file.stem: load_evaluation(file) for file in files}
    found = {name: evaluation for name, evaluation in found.items() if evaluation.details is not None}
    if not found:
        raise UsageError(f"{run.path}: has no evaluation. Make one with `rsseg eval --model {run.path} --split test`.")
    return found


def scorer_of(run: RunFolder, evaluation: Evaluation) -> Scorer:
    """Class names of an evaluation as in its matrices."""
    names = tuple(str(name) for name in run.manifest().plan["classes"])
    listed = {c.name for c in evaluation.scores.classes}
    background = evaluation.details.background if evaluation.details is not None else None
    return Scorer(names, [name for name in names if name not in listed], background)


def compare_runs(runs: Sequence[RunFolder], split: str | None = None) -> tuple[str, list[Compared]]:
    """Compare runs with the first one.

    Args:
        runs: two or more.
        split: name of an evaluation; None: `test`, or else another one that all runs have.

    Returns:
        The name of the evaluation, and the runs.

    Raises:
        UsageError: a run lacks the evaluation, or a run is named twice.
        DataError: the runs were evaluated on different images or classes.
    """
    paths = [run.path.resolve() for run in runs]
    if len(set(paths)) < max(2, len(paths)):
        raise UsageError("comparing takes two different runs or more. `rsseg runs ls` lists them.")
    every = [evaluations_of(run) for run in runs]
    common = [name for name in every[0] if all(name in evaluations for evaluations in every)]
    name = split or next(iter(common), "test")
    for run, evaluations in zip(runs, every, strict=True):
        if name not in evaluations:
            raise UsageError(
                f"{run.path}: has no evaluation of {name}. Make it with `rsseg eval --model {run.path} --split {name}`."
            )
    first = every[0][name]
    scorer, images = scorer_of(runs[0], first), _images(first)
    compared = [Compared(runs[0], first, None)]
    for run, evaluations in zip(runs[1:], every[1:], strict=True):
        other = evaluations[name]
        _check_alike(runs[0].path, run.path, first, other, name)
        if scorer_of(run, other).names != scorer.names:
            raise DataError(f"{run.path}: other classes than {runs[0].path}. Compare runs of the same classes.")
        compared.append(Compared(run, other, paired_differences(images, _images(other), scorer)))
    return name, compared


def score_name(key: str) -> str:
    """Readable name of a score."""
    names = {"miou": "mIoU", "mf1": "mF1", "oa": "overall accuracy", "boundary_miou": "boundary mIoU"}
    names |= {"miou_without_background": "mIoU without background"}
    return names.get(key, key.replace("iou_", "IoU ", 1))


def _images(evaluation: Evaluation) -> tuple[ImageScores, ...]:
    return () if evaluation.details is None else evaluation.details.images


def _check_alike(first: Path, second: Path, ours: Evaluation, theirs: Evaluation, name: str) -> None:
    names = [{image.image for image in _images(evaluation)} for evaluation in (ours, theirs)]
    pixels = [{image.image: image.pixels for image in _images(evaluation)} for evaluation in (ours, theirs)]
    if names[0] != names[1] or pixels[0] != pixels[1]:
        raise DataError(
            f"{first} and {second}: their evaluations {name!r} are not of the same labeled images, so they cannot be "
            f"paired. Evaluate both again on one dataset: `rsseg eval --model RUN --data DATASET --split {name}`."
        )
