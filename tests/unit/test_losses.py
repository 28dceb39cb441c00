"""Losses against values worked out by hand or in float64."""

import math

import pytest
import torch

from rsseg.config import LossConfig
from rsseg.errors import RecipeError
from rsseg.layers.losses import (
    LabelLoss,
    class_weights_of,
    cosine_distance,
    cross_entropy,
    dice_loss,
    pixel_accuracy,
    softened_kl,
)
from rsseg.task import IGNORE_INDEX
from tests.conftest import rgb_task

LOGITS = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 1, 4).clone()
"""Four pixels whose class 0 has probability 1 / (1 + e^-2)."""

RIGHT, WRONG = math.log1p(math.exp(-2)), math.log1p(math.exp(2))


def masks(*values: int) -> torch.Tensor:
    return torch.tensor(values).view(1, 1, -1)


def test_cross_entropy_averages_over_labeled_pixels() -> None:
    assert cross_entropy(LOGITS, masks(0, 1, 255, 255)).item() == pytest.approx((RIGHT + WRONG) / 2)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, 1.0])])
def test_cross_entropy_of_deterministic_runs_uses_lists_of_pixels_and_equals_the_other(
    weights: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, target = torch.randn(2, 3, 5, 7), torch.randint(0, 3, (2, 5, 7))
    target[0, :2] = IGNORE_INDEX
    results = []
    for deterministic in (False, True):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda on=deterministic: on)
        leaf = logits.clone().requires_grad_()
        loss = cross_entropy(leaf, target, class_weights=weights)
        names = graph_of(loss)
        assert ("NllLoss2DBackward0" in names) != deterministic
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def graph_of(loss: torch.Tensor) -> set[str]:
    """Names of all operations that a loss is computed by."""
    names, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            names.add(node.name())
            todo += [following for following, _ in node.next_functions]
    return names


def test_cross_entropy_with_divisor_all_counts_unlabeled_pixels() -> None:
    assert cross_entropy(LOGITS, masks(0, 1, 255, 255), divisor="all").item() == pytest.approx((RIGHT + WRONG) / 4)


@pytest.mark.parametrize("divisor", ["all", "valid"])
def test_cross_entropy_without_labels_is_exactly_zero_and_has_zero_gradients(divisor: str) -> None:
    logits = LOGITS.clone().requires_grad_()
    loss = cross_entropy(logits, masks(255, 255, 255, 255), divisor=divisor)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.count_nonzero(logits.grad) == 0


def test_losses_stay_float32_under_autocast() -> None:
    maps = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = torch.nn.functional.conv2d(maps, torch.ones(2, 3, 1, 1))
        assert logits.dtype == torch.bfloat16
        assert cross_entropy(logits, torch.zeros(2, 8, 8, dtype=torch.long)).dtype == torch.float32
        assert softened_kl(logits, logits, axis=3).dtype == torch.float32
        assert cosine_distance(logits, logits).dtype == torch.float32


def test_accuracy_is_a_percentage_of_labeled_pixels() -> None:
    assert pixel_accuracy(LOGITS, masks(0, 0, 1, 255)).item() == pytest.approx(200 / 3)
    assert pixel_accuracy(LOGITS, masks(255, 255, 255, 255)).item() == 0.0


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
def test_kl_equals_its_definition_in_float64(axis: int, reduction: str) -> None:
    draw = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(2, 3, 4, 5, generator=draw) for _ in range(2))
    p, q = ((m.double() / 2).softmax(axis) for m in (teacher, student))
    count = 2 if reduction == "batchmean" else 2 * 3 * 4 * 5 // student.shape[axis]
    expected = 4 * (p * (p / q).log()).sum() / count
    actual = softened_kl(student, teacher, axis=axis, temperature=2.0, reduction=reduction)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)


def test_kl_is_finite_where_a_softmax_underflows() -> None:
    student = torch.tensor([0.0, 500.0]).view(1, 1, 1, 2).requires_grad_()
    loss = softened_kl(student, torch.tensor([500.0, 0.0]).view(1, 1, 1, 2), axis=3)
    loss.backward()
    assert loss.item() == pytest.approx(500.0)
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_cosine_distance_looks_at_directions_only() -> None:
    a = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(2))
    assert cosine_distance(a, 7 * a).item() == pytest.approx(0.0, abs=1e-6)
    assert cosine_distance(a, -a).item() == pytest.approx(2.0)


def test_classes_with_few_pixels_weigh_more_and_the_mean_over_pixels_stays() -> None:
    weights = class_weights_of([900, 100, 0])
    assert weights[1] / weights[0] == pytest.approx(3.0)
    assert (900 * weights[0] + 100 * weights[1]) / 1000 == pytest.approx(1.0)
    assert weights[2] == 1.0


def test_focal_factor_is_the_published_one_and_gamma_0_changes_nothing() -> None:
    logits, target = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    target[0, 0] = IGNORE_INDEX
    labeled = target != IGNORE_INDEX
    p = logits.softmax(1).gather(1, target.where(labeled, 0)[:, None])[:, 0]
    expected = (-((1 - p) ** 2) * p.log())[labeled].mean()
    torch.testing.assert_close(cross_entropy(logits, target, focal_gamma=2.0), expected)
    assert torch.equal(cross_entropy(logits, target, focal_gamma=0.0), cross_entropy(logits, target))


def test_focal_factor_goes_by_the_probability_not_by_the_weighted_loss() -> None:
    logits, target = torch.randn(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.long)
    weighted = cross_entropy(logits, target, focal_gamma=2.0, class_weights=torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(weighted, 3.0 * cross_entropy(logits, target, focal_gamma=2.0))


def test_dice_is_0_for_the_truth_and_1_for_its_opposite_and_counts_labeled_classes_only() -> None:
    target = torch.tensor([[[0, 1], [1, IGNORE_INDEX]]])
    right = 100.0 * torch.nn.functional.one_hot(target.where(target != IGNORE_INDEX, 2), 3).movedim(-1, 1).float()
    assert dice_loss(right, target).item() == pytest.approx(0.0, abs=1e-6)
    assert dice_loss(right[:, [1, 0, 2]], target).item() == pytest.approx(1.0, abs=1e-6)
    assert dice_loss(right, torch.full_like(target, IGNORE_INDEX)).item() == 0.0


def test_label_loss_is_plain_cross_entropy_unless_the_recipe_adds_something() -> None:
    logits, target = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    plain = cross_entropy(logits, target, divisor="all")
    assert torch.equal(LabelLoss()(logits, target, divisor="all"), plain)
    added = LabelLoss(LossConfig(dice=0.5))(logits, target, divisor="all")
    torch.testing.assert_close(added, plain + 0.5 * dice_loss(logits, target))
    weights = LabelLoss(LossConfig(class_weights=(1.0, 2.0, 3.0)))(logits, target)
    torch.testing.assert_close(weights, cross_entropy(logits, target, class_weights=torch.tensor([1.0, 2.0, 3.0])))


def test_weights_of_another_length_name_both_sides() -> None:
    with pytest.raises(RecipeError, match=r"2 entries, tiny has 3 classes: \['"):
        LabelLoss(LossConfig(class_weights=(1.0, 2.0)), rgb_task())
