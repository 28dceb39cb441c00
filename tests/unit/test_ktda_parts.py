"""FAM, neck and FMM beyond what the golden cases fix."""

import pytest
import torch

from rsseg.layers.blocks import resize
from rsseg.methods.ktda.network import (
    BottleneckMlp,
    FeatureAlignment,
    FeatureModulation,
    MultiLevelNeck,
    TransformerBlock,
    fused,
)


def test_fixed_grid_is_square_whatever_the_image() -> None:
    fam = FeatureAlignment((4, 6), (8, 8), grid=5)
    maps = fam([torch.zeros(1, 4, 8, 16), torch.zeros(1, 6, 4, 8)], (32, 64))
    assert [tuple(level.shape) for level in maps] == [(1, 8, 5, 5)] * 2


def test_auto_grid_has_a_cell_per_started_patch() -> None:
    fam = FeatureAlignment((4,), (8,), grid=None, patch=14)
    assert fam([torch.zeros(1, 4, 8, 16)], (32, 57))[0].shape[-2:] == (3, 5)


def test_neck_with_sampling_ratio_covers_the_whole_map() -> None:
    level = torch.arange(5.0).expand(1, 1, 5, 5)
    factor, ratio = (MultiLevelNeck((1,), 1, scales=(0.5,), sampling=sampling) for sampling in ("factor", "ratio"))
    ratio.load_state_dict(factor.state_dict())
    assert factor._resize(level, 0.5)[0, 0, 0].tolist() == [0.5, 2.5]
    assert ratio._resize(level, 0.5)[0, 0, 0].tolist() == [0.75, 3.25]
    assert factor([level])[0].shape == ratio([level])[0].shape == (1, 1, 2, 2)


def test_neck_makes_every_level_of_a_single_input() -> None:
    neck = MultiLevelNeck((3,), 4, scales=(2, 1, 0.5))
    assert [level.shape[-1] for level in neck([torch.zeros(1, 3, 8, 8)])] == [16, 8, 4]


@pytest.mark.parametrize("block", [BottleneckMlp(8), TransformerBlock(8, heads=2)])
def test_modulation_keeps_shapes_of_any_map(block: torch.nn.Module) -> None:
    maps = [torch.randn(2, 8, 3, 5)]
    assert FeatureModulation([[block]])(maps)[0].shape == (2, 8, 3, 5)


def test_attention_equals_the_textbook_formula() -> None:
    torch.manual_seed(0)
    block, tokens = TransformerBlock(8, heads=2).double(), torch.randn(2, 6, 8, dtype=torch.float64)
    normed = block.norm1(tokens)
    query, key, value = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in block.qkv(normed).chunk(3, dim=2))
    weights = (query @ key.transpose(-1, -2) / 2.0).softmax(-1)
    attended = tokens + block.proj((weights @ value).transpose(1, 2).flatten(2))
    expected = attended + block.fc2(torch.nn.functional.gelu(block.fc1(block.norm2(attended))))
    torch.testing.assert_close(block(tokens), expected)


def test_attention_memory_grows_with_tokens_not_with_their_square() -> None:
    block, tokens = TransformerBlock(8, heads=8), torch.randn(1, 2048, 8)
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        block(tokens)
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert largest < 2048 * 2048 * 8 * 4 / 16  # a sixteenth of the matrix over all heads


def test_sum_of_levels_leaves_them_as_they_were() -> None:
    maps = [torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3)]
    assert fused(maps).unique().tolist() == [2.0]
    assert maps[0].unique().tolist() == [1.0]


@pytest.mark.parametrize("size", [(9, 12), (4, 5), (2, 3)])
def test_alignment_equals_projection_and_then_resize_for_levels_of_any_size(size: tuple[int, int]) -> None:
    fam = FeatureAlignment((6,), (16,), grid=None, resize_first=True)
    level = torch.randn(2, 6, *size)
    (aligned,) = fam([level], (56, 70))
    torch.testing.assert_close(aligned, resize(fam.projections[0](level), (4, 5)), rtol=1e-5, atol=1e-6)
