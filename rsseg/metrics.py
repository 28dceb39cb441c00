"""An integer confusion matrix, and the scores derived from it."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from rsseg.errors import DataError
from rsseg.fields import Result


class ConfusionMatrix:
    """Counts of (labeled class, predicted class), in host memory.

    `counts` is int64 (K + 1, K): row = labeled class, column = predicted class; the last row counts the predictions on
    unlabeled pixels, which only the `*_all_predictions` variants use.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes + 1, num_classes, dtype=torch.int64)
        # The narrowest index type, because memory traffic limits the speed.
        self._index_type = torch.int16 if (num_classes + 1) * num_classes <= 2**15 - 1 else torch.int32

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add the pixels of some images.

        Args:
            prediction: uint8 or int64 class indices < K, any shape.
            target: uint8 or int64 class indices of the same shape; 255 has no label.

        Raises:
            DataError: shapes differ, or the prediction holds an index >= K.
        """
        if prediction.shape != target.shape:
            raise DataError(
                f"the prediction has shape {tuple(prediction.shape)}, the mask {tuple(target.shape)}. "
                "Give a mask and a prediction of the same image."
            )
        if prediction.numel() and (largest := int(prediction.max())) >= self.num_classes:
            raise DataError(
                f"the prediction holds class index {largest}, the task has {self.num_classes} classes. "
                "Predict with a model of this task."
            )
        # Unlabeled pixels go to the extra row, which avoids boolean indexing.
        rows = target.clamp(max=self.num_classes).to(self._index_type)
        index = rows.mul_(self.num_classes).add_(prediction.to(self._index_type))
        self.counts += torch.bincount(index.flatten(), minlength=self.counts.numel()).view_as(self.counts)


class ClassScores(Result):
    """Scores of one class, 0..1; None where the denominator is 0."""

    name: str
    iou: float | None
    """None if the class is neither labeled nor predicted."""
    f1: float | None
    """None exactly where `iou` is."""
    precision: float | None
    """None if the class was never predicted."""
    recall: float | None
    """None if the class was never labeled."""
    support: int
    """Labeled pixels."""
    predicted: int
    """Predicted pixels among the labeled ones."""


class Scores(Result):
    """Scores of a confusion matrix, 0..1. Means are over the classes whose entry is not None."""

    classes: tuple[ClassScores, ...]
    """Ignored classes are not listed."""
    miou: float | None
    mf1: float | None
    mprecision: float | None
    macc: float | None
    """Mean recall."""
    oa: float | None
    """Share of labeled pixels that are correct."""
    kappa: float | None
    """Cohen's kappa over the listed classes."""
    pixels: int
    """Labeled pixels of the listed classes."""
    absent: int
    """Classes without IoU, excluded from the means."""
    variants: Mapping[str, float | None]
    """Definitions used in publications, by name:
    `mf1_nan_skipped` excludes classes never predicted or without a hit (mmsegmentation's mFscore);
    `miou_absent_zero` counts an absent class as 0 (UniMatch, RS-MTDF);
    `mf1_all_predictions`, `kappa_all_predictions` count predictions on unlabeled pixels in the totals (RS-MTDF)."""

    def miou_without(self, names: Sequence[str]) -> float | None:
        """Mean IoU over the other classes; confusions with the left-out classes still count as errors."""
        kept = [c.iou for c in self.classes if c.name not in names and c.iou is not None]
        return float(np.mean(kept)) if kept else None


def scores(matrix: Tensor | ArrayLike, class_names: Sequence[str], *, ignore: Sequence[str] = ()) -> Scores:
    """Compute the scores of a confusion matrix.

    Args:
        matrix: integers (K, K) or (K + 1, K), [target, prediction]; a last extra row counts unlabeled pixels.
        class_names: K names in index order.
        ignore: names of classes whose labeled pixels are excluded; they are not listed.

    Raises:
        DataError: an ignored class does not exist, or the shape does not match the names.
    """
    counts = matrix.cpu().numpy() if isinstance(matrix, Tensor) else np.asarray(matrix)
    k = len(class_names)
    if counts.shape not in {(k, k), (k + 1, k)}:
        raise DataError(f"a confusion matrix of shape {counts.shape} does not fit the {k} classes {list(class_names)}.")
    unknown = [name for name in ignore if name not in class_names]
    if unknown:
        raise DataError(f"ignored class {unknown[0]!r} is not one of {list(class_names)}. Name classes of the task.")
    kept = [i for i, name in enumerate(class_names) if name not in ignore]
    labeled = counts[kept].astype(np.float64)
    hits = labeled[range(len(kept)), kept]
    support = labeled.sum(1)
    predicted = labeled.sum(0)[kept]
    everywhere = counts.sum(0)[kept].astype(np.float64)
    union = support + predicted - hits
    total = support.sum()

    iou, f1 = _ratio(hits, union), _ratio(2 * hits, support + predicted)
    precision, recall = _ratio(hits, predicted), _ratio(hits, support)
    all_precision = _ratio(hits, everywhere)
    return Scores(
        classes=tuple(
            ClassScores(
                name=class_names[index],
                iou=_optional(iou[i]),
                f1=_optional(f1[i]),
                precision=_optional(precision[i]),
                recall=_optional(recall[i]),
                support=int(support[i]),
                predicted=int(predicted[i]),
            )
            for i, index in enumerate(kept)
        ),
        miou=_mean(iou),
        mf1=_mean(f1),
        mprecision=_mean(precision),
        macc=_mean(recall),
        oa=_optional(hits.sum() / total) if total else None,
        kappa=_kappa(hits, support, predicted),
        pixels=int(total),
        absent=int(np.isnan(iou).sum()),
        variants={
            "mf1_nan_skipped": _mean(_ratio(2 * precision * recall, precision + recall)),
            "miou_absent_zero": _mean(hits / (union + 1e-10)),
            "mf1_all_predictions": _mean(np.nan_to_num(_ratio(2 * all_precision * recall, all_precision + recall))),
            "kappa_all_predictions": _kappa(hits, support, everywhere),
        },
    )


def _ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """NaN where the denominator is 0 or NaN."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)


def _optional(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def _kappa(hits: NDArray[np.float64], support: NDArray[np.float64], predicted: NDArray[np.float64]) -> float | None:
    total = support.sum()
    if not total:
        return None
    agreement, chance = hits.sum() / total, (support * predicted).sum() / total**2
    return float((agreement - chance) / (1 - chance)) if chance < 1 else None
