"""Losses against values worked out by hand or in float64."""

import math

import pytest
import torch

from rsseg.layers.losses import cosine_distance, cross_entropy, pixel_accuracy, softened_kl

LOGITS = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 1, 4).clone()
"""Four pixels whose class 0 has probability 1 / (1 + e^-2)."""

RIGHT, WRONG = math.log1p(math.exp(-2)), math.log1p(math.exp(2))


def masks(*values: int) -> torch.Tensor:
    return torch.tensor(values).view(1, 1, -1)


def test_cross_entropy_averages_over_labeled_pixels() -> None:
    assert cross_entropy(LOGITS, masks(0, 1, 255, 255)).item() == pytest.approx((RIGHT + WRONG) / 2)


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
