import pytest
import torch
import torch.nn.functional as F

from rsseg.inference.tiling import Span
from rsseg.inference.torch_network import TensorLogits


@pytest.mark.parametrize("low", [(64, 48), (32, 24), (256, 192), (37, 28), (85, 64)])
@pytest.mark.parametrize("rows", [Span(0, 256), Span(13, 250), Span(100, 101)])
def test_bands_are_the_rows_of_the_whole_to_the_last_bit(low: tuple[int, int], rows: Span) -> None:
    torch.manual_seed(0)
    stored = torch.randn(1, 5, *low).contiguous(memory_format=torch.channels_last)
    logits = TensorLogits(stored, (256, 192), (250, 180))
    expected = F.interpolate(stored, size=(256, 192), mode="bilinear")[0, :, :250, :180]
    assert torch.equal(logits.tensor(), expected)
    bands = list(logits.bands(Span(rows.start, min(rows.stop, 250))))
    assert torch.equal(torch.cat([values for _, values in bands], dim=1), expected[:, rows.start : rows.stop])
    assert [part.start for part, _ in bands] == [rows.start, *(part.stop for part, _ in bands[:-1])]


def test_logits_of_full_size_are_themselves() -> None:
    values = torch.randn(3, 200, 10)
    assert torch.equal(TensorLogits.of(values).tensor(), values)
    assert torch.equal(
        torch.cat([part for _, part in TensorLogits.of(values).bands(Span(5, 190))], dim=1), values[:, 5:190]
    )
