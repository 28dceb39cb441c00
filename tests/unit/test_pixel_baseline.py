"""The per-pixel classifier that `make demo` compares with."""

import sys
from pathlib import Path

import pytest

from benchmarks import pixel_baseline


def test_colors_that_tell_classes_are_learnt_and_the_command_prints_one_line(
    rgb_dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = pixel_baseline.baseline(rgb_dataset, split="test", domain=None, samples=4000, seed=0)
    assert found.oa is not None
    assert found.oa > 0.9
    monkeypatch.setattr(sys, "argv", ["pixel_baseline", "--data", str(rgb_dataset), "--samples", "4000"])
    pixel_baseline.main()
    assert capsys.readouterr().out.startswith("per-pixel logistic regression, test split: mIoU ")
