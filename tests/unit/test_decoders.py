"""Decoders: shapes, level handling and what a batch of one does."""

import pytest
import torch
from torch import Tensor

from rsseg.layers.blocks import resize
from rsseg.layers.decoders import FCNHead, SegFormerHead, UPerNet

WIDTHS = (4, 6, 8)


def levels() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(2, width, 12 >> i, 16 >> i, generator=draw) for i, width in enumerate(WIDTHS)]


@pytest.mark.parametrize("decoder", [UPerNet(WIDTHS, 5, channels=8), SegFormerHead(WIDTHS, 5, channels=8)])
def test_decoder_returns_logits_at_the_first_level(decoder: UPerNet | SegFormerHead) -> None:
    assert decoder(levels()).shape == (2, 5, 12, 16)


@pytest.mark.parametrize("decoder", [UPerNet(WIDTHS, 5, channels=8), SegFormerHead(WIDTHS, 5, channels=8)])
def test_every_parameter_of_a_decoder_gets_a_gradient(decoder: UPerNet | SegFormerHead) -> None:
    decoder(levels()).sum().backward()
    assert [name for name, p in decoder.named_parameters() if p.grad is None] == []


def test_upernet_needs_no_lower_levels() -> None:
    assert UPerNet((4,), 3, channels=8)([levels()[0]]).shape == (2, 3, 12, 16)


def test_upernet_leaves_its_inputs_as_they_were() -> None:
    maps = levels()
    UPerNet(WIDTHS, 5, channels=8)(maps)
    assert all(torch.equal(after, before) for after, before in zip(maps, levels(), strict=True))


def test_fcn_head_can_join_its_input() -> None:
    head = FCNHead(4, 3, channels=8, num_convs=2, concat_input=True)
    assert head.join is not None
    assert head.join.conv.in_channels == 12
    assert head(levels()[0]).shape == (2, 3, 12, 16)


def test_aligned_corners_change_the_resize() -> None:
    torch.manual_seed(0)
    decoder = SegFormerHead(WIDTHS, 5, channels=8).eval()
    plain = decoder(levels())
    decoder.align_corners = True
    assert not torch.allclose(plain, decoder(levels()))


@pytest.mark.parametrize("align_corners", [False, True])
def test_segformer_head_equals_stacking_the_levels_at_full_size(align_corners: bool) -> None:
    torch.manual_seed(0)
    head = SegFormerHead(WIDTHS, 5, channels=8, dropout=0.0, align_corners=align_corners).double()
    maps = [level.double() for level in levels()]
    size = maps[0].shape[-2:]
    projected = [
        resize(project(level), size, align_corners=align_corners)
        for project, level in zip(head.projections, maps, strict=True)
    ]
    stacked = head.classifier(head.fusion(torch.cat(projected, dim=1)))
    torch.testing.assert_close(head(maps), stacked, rtol=1e-10, atol=1e-12)
