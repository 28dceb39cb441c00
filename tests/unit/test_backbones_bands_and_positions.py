"""First convolutions, statistics and position tables, by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsseg.backbones.bodies import PositionMode, resample_positions
from rsseg.backbones.loading import (
    adapt_first_conv,
    convnext_from_mmpretrain,
    pretrained_statistics,
    vit_from_mmpretrain,
)
from rsseg.errors import WeightsError


@given(st.lists(st.sampled_from(["red", "Green", "BLUE", "nir", "swir1"]), min_size=1, max_size=9))
@settings(max_examples=30, deadline=None)
def test_adapted_kernels_answer_a_grey_image_as_before_if_bands_average_out(bands: list[str]) -> None:
    weight = torch.rand(4, 1, 3, 3).expand(4, 3, 3, 3)  # equal kernels: every band order has the same answer
    adapted = adapt_first_conv(weight, bands)
    assert adapted.shape == (4, len(bands), 3, 3)
    torch.testing.assert_close(adapted.sum(dim=1), weight.sum(dim=1))


def test_statistics_follow_the_color_and_other_bands_take_the_mean() -> None:
    values = pretrained_statistics((0.1, 0.2, 0.6), ("nir", "Blue", "red"))
    assert values == pytest.approx((0.3, 0.6, 0.1))


def cubic_weights(fraction: float) -> list[float]:
    """Keys' kernel with a = -0.75 at the four neighbours, as torch has it."""
    a = -0.75

    def near(x: float) -> float:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1

    def far(x: float) -> float:
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a

    return [far(1 + fraction), near(fraction), near(1 - fraction), far(2 - fraction)]


@pytest.mark.parametrize(("mode", "offset"), [("bicubic", 0.0), ("dinov2", 0.1)])
@pytest.mark.parametrize("cells", [3, 9])
def test_samples_lie_where_the_library_puts_them(mode: PositionMode, offset: float, cells: int) -> None:
    side = 6
    row = torch.rand(side, dtype=torch.float64)
    table = torch.cat([torch.tensor([5.0]), row.float().repeat(side)]).reshape(1, -1, 1)  # constant down the columns
    resized = resample_positions(table, (side, cells), prefix=1, mode=mode)
    assert resized[0, 0, 0] == 5
    for i in range(cells):
        source = (i + 0.5) * side / (cells + offset) - 0.5
        left = int(source // 1)
        taps = [row[min(max(left + k, 0), side - 1)] for k in (-1, 0, 1, 2)]
        expected = sum(w * t for w, t in zip(cubic_weights(source - left), taps, strict=True))
        assert float(resized[0, 1 + i, 0]) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("mode", ["timm", "dinov2", "bicubic"])
def test_stored_grid_is_untouched_and_shrinking_differs_by_mode(mode: PositionMode) -> None:
    torch.manual_seed(0)
    table = torch.rand(1, 1 + 49, 8)
    assert resample_positions(table, (7, 7), prefix=1, mode=mode) is table
    others = {other: resample_positions(table, (3, 5), prefix=1, mode=other) for other in ("timm", "dinov2", "bicubic")}
    for other, resized in others.items():
        assert resized.shape == (1, 1 + 15, 8)
        assert torch.equal(resized, others[mode]) == (other == mode)


def test_half_precision_table_is_resampled_in_float32() -> None:
    table = torch.rand(1, 16, 4)
    half = resample_positions(table.bfloat16(), (6, 6), prefix=0, mode="bicubic")
    exact = resample_positions(table.bfloat16().float(), (6, 6), prefix=0, mode="bicubic")
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, exact.bfloat16())


def test_table_that_is_not_square_is_refused() -> None:
    with pytest.raises(WeightsError, match="not square"):
        resample_positions(torch.rand(1, 1 + 12, 4), (3, 3), prefix=1, mode="timm")


@pytest.mark.parametrize("rename", [convnext_from_mmpretrain, vit_from_mmpretrain])
def test_foreign_names_are_refused(rename: object) -> None:
    assert callable(rename)
    with pytest.raises(WeightsError, match=r"'head\.fc\.weight'"):
        rename({"head.fc.weight": torch.zeros(1)})


def test_convnext_v2_names_are_known() -> None:
    renamed = convnext_from_mmpretrain({"stages.1.2.grn.gamma": torch.zeros(1), "stages.1.2.grn.beta": torch.ones(1)})
    assert set(renamed) == {
        "body.network.stages.1.blocks.2.mlp.grn.weight",
        "body.network.stages.1.blocks.2.mlp.grn.bias",
    }
