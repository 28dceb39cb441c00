"""The DPT head: levels, sizes, and the two layers whose order is free."""

import pytest
import torch

from rsseg.layers.blocks import resize
from rsseg.layers.decoders import DPTHead, FusionBlock


@pytest.mark.parametrize("grid", [(4, 4), (5, 3), (1, 2)])
def test_maps_of_one_stride_give_logits_at_eight_times_their_size(grid: tuple[int, int]) -> None:
    head = DPTHead([6] * 4, [14] * 4, 3, widths=(4, 4, 6, 8), features=5)
    logits = head([torch.randn(2, 6, *grid) for _ in range(4)])
    assert logits.shape == (2, 3, 8 * grid[0], 8 * grid[1])


def test_pyramid_levels_are_taken_as_they_are() -> None:
    head = DPTHead([4, 6, 8, 10], [4, 8, 16, 32], 3, widths=(4, 4, 6, 8), features=5)
    maps = [torch.randn(1, c, 32 // 2**i, 24 // 2**i) for i, c in enumerate((4, 6, 8, 10))]
    assert head(maps).shape == (1, 3, 64, 48)
    assert not list(head.reassemble.parameters())


@pytest.mark.parametrize("strides", [(4, 8, 8, 8), (14, 14, 14), (32, 16, 8, 4)])
def test_other_strides_are_refused(strides: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"strides|four maps"):
        DPTHead([6] * len(strides), strides, 3)


def test_every_parameter_gets_a_gradient() -> None:
    head = DPTHead([6] * 4, [14] * 4, 3, widths=(4, 4, 6, 8), features=5)
    head([torch.randn(1, 6, 3, 3) for _ in range(4)]).sum().backward()
    assert [name for name, parameter in head.named_parameters() if parameter.grad is None] == []


def test_projection_before_the_resize_equals_the_published_order() -> None:
    torch.manual_seed(0)
    block = FusionBlock(6, skip=True).double()
    x, skip = torch.randn(2, 1, 6, 5, 4, dtype=torch.float64)
    published = block.project(resize(block.refine(x + block.skip(skip)), (9, 8), align_corners=True))  # type: ignore[misc]
    torch.testing.assert_close(block(x, skip, (9, 8)), published, rtol=0, atol=1e-12)
