import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score, confusion_matrix, f1_score, jaccard_score

from rsseg.errors import DataError
from rsseg.metrics import ConfusionMatrix, scores


@pytest.mark.parametrize("num_classes", [2, 6, 180, 181, 254])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_counts_equal_sklearn_and_ignore_unlabeled_pixels(num_classes: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_classes)
    target = torch.randint(0, num_classes, (3, 20, 21), generator=generator)
    prediction = torch.randint(0, num_classes, (3, 20, 21), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    confusion = ConfusionMatrix(num_classes)
    for t, p in zip(target, prediction, strict=True):
        confusion.update(p.to(dtype), t.to(dtype))
    kept = target != 255
    expected = confusion_matrix(target[kept], prediction[kept], labels=range(num_classes))
    assert np.array_equal(confusion.counts[:-1].numpy(), expected)
    assert confusion.counts[-1].sum() == (~kept).sum()


def test_update_rejects_shapes_that_differ_and_unknown_classes() -> None:
    confusion = ConfusionMatrix(2)
    with pytest.raises(DataError, match="shape"):
        confusion.update(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(DataError, match="index 7, the task has 2"):
        confusion.update(torch.tensor([7, 0]), torch.tensor([1, 1]))


def test_scores_equal_sklearn() -> None:
    generator = np.random.default_rng(0)
    target, prediction = generator.integers(0, 4, 500), generator.integers(0, 4, 500)
    result = scores(confusion_matrix(target, prediction), ["a", "b", "c", "d"])
    assert [c.iou for c in result.classes] == pytest.approx(jaccard_score(target, prediction, average=None))
    assert [c.f1 for c in result.classes] == pytest.approx(f1_score(target, prediction, average=None))
    assert result.miou == pytest.approx(jaccard_score(target, prediction, average="macro"))
    assert result.oa == pytest.approx((target == prediction).mean())
    assert result.kappa == pytest.approx(cohen_kappa_score(target, prediction))
    assert result.pixels == 500
    assert result.absent == 0


def test_absent_class_has_no_score_and_is_left_out_of_means() -> None:
    result = scores(np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]]), ["a", "b", "absent"])
    assert result.classes[2].iou is None
    assert result.classes[2].f1 is None
    assert result.classes[2].recall is None
    assert result.miou == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert result.variants["miou_absent_zero"] == pytest.approx((3 / 4 + 4 / 5) / 3)
    assert result.absent == 1


def test_class_that_is_predicted_but_never_labeled_counts_as_wrong() -> None:
    result = scores(np.array([[3, 1], [0, 0]]), ["a", "b"])
    assert result.classes[1].iou == 0
    assert result.classes[1].recall is None
    assert result.miou == pytest.approx(3 / 8)


def test_class_never_right_drops_out_of_the_nan_skipped_f1_only() -> None:
    result = scores(np.array([[4, 0], [4, 0]]), ["a", "never"])
    assert result.mf1 == pytest.approx((2 / 3 + 0) / 2)
    assert result.variants["mf1_nan_skipped"] == pytest.approx(2 / 3)


def test_empty_matrix_has_no_scores() -> None:
    result = scores(np.zeros((2, 2), np.int64), ["a", "b"])
    assert (result.miou, result.oa, result.kappa, result.absent) == (None, None, None, 2)


def test_ignored_class_is_not_listed_and_its_pixels_do_not_count() -> None:
    matrix = np.array([[5, 0, 1], [0, 6, 0], [2, 2, 2]])
    result = scores(matrix, ["a", "b", "clutter"], ignore=("clutter",))
    assert [c.name for c in result.classes] == ["a", "b"]
    assert result.pixels == 12
    assert result.classes[0].iou == pytest.approx(5 / 6)
    assert result.classes[1].iou == 1.0
    with pytest.raises(DataError, match="'cluter' is not one of"):
        scores(matrix, ["a", "b", "clutter"], ignore=("cluter",))


def test_predictions_on_unlabeled_pixels_enter_only_the_variants_of_that_name() -> None:
    labeled = np.array([[3, 1], [0, 4]])
    plain = scores(labeled, ["a", "b"])
    extra = scores(np.vstack([labeled, [2, 0]]), ["a", "b"])
    assert extra.model_copy(update={"variants": plain.variants}) == plain
    assert extra.variants["mf1_all_predictions"] < plain.variants["mf1_all_predictions"]
