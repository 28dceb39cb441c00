"""Rank correlations, deciles and the page of the economy benchmark."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import economy, economy_page
from rsseg.data.index import SegmentationIndex


def test_rank_correlation_counts_ties_by_their_mean_rank() -> None:
    assert economy_page.spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert economy_page.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # By hand: ranks 0, 1.5, 1.5, 3 and 0, 1, 2, 3.
    assert economy_page.spearman([1, 2, 2, 4], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def test_deciles_run_from_the_most_to_the_least_applicable_pixels() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 255, 20_000).astype(np.uint8)
    wrong = rng.random(20_000) < 1 - values / 255
    deciles = economy.error_deciles(values, wrong)
    errors = [error for _, error in deciles]
    assert errors == sorted(errors)
    assert errors[0] < 0.1 < 0.9 < errors[-1]
    assert deciles[0][0] > 0.9
    flat = [error for _, error in economy.error_deciles(np.zeros(20_000, np.uint8), wrong)]
    assert max(flat) - min(flat) < 0.1, "ties have no order"


def test_each_domain_becomes_a_dataset_with_test_images(
    rgb_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(economy, "DATASETS", ("mine", "absent"))
    index = SegmentationIndex.load(rgb_dataset)
    labeled = [item for item in index.items if item.mask is not None]
    items = tuple(item.model_copy(update={"domain": "ab"[n % 2]}) for n, item in enumerate(labeled))
    rgb_dataset.rename(tmp_path / "mine")
    index.model_copy(update={"items": items}).save(tmp_path / "mine")
    found = economy.domains(tmp_path, tmp_path / "work")
    assert list(found) == [("mine", "a"), ("mine", "b")]
    for folder in found.values():
        own = SegmentationIndex.load(folder)
        assert all((own.root / item.image).is_file() and (own.root / str(item.mask)).is_file() for item in own.items)
        assert {item.split for item in own.items[:3]} == {"train", "test"}


def test_the_page_states_what_was_not_reached(tmp_path: Path) -> None:
    pairs = [("a", "b", 0.1), ("a", "c", 0.2), ("b", "c", 0.3), ("c", "d", 0.4)]
    gap = [
        {"data": "x", "first": f, "second": s, "scores": [[0.8, 0.8 - d], [0.7 - d, 0.7]], "distance": d}
        | {"images": [9, 9], "same": 0.05}
        for f, s, d in pairs
    ]
    rising = [[1 - n / 10, n / 20] for n in range(10)]
    trust = [{"data": "x", "source": "a", "target": "b", "deciles": {"target": rising, "both": rising[::-1]}}]
    trust[0]["deciles"] |= {"confidence": rising}
    speed = [{"name": "suggest", "side": 100, "ratios": [1.1, 1.3, 1.2], "seconds": 1.0}]
    errors = ((0.1, 0.03, 0.8), (0.1, 0.05, 0.9))
    calibration = [
        {"setting": "x", "arm": "a", "title": "A", "seed": n, "before": b, "after": a, "temperature": t}
        for n, (b, a, t) in enumerate(errors)
    ]
    kept = {"gap": gap[:3], "trust": trust, "calibration": calibration, "speed": speed}
    text = economy_page.page(kept, tmp_path / "page.md", network="net", steps=3)
    assert "| x | A | 2 | 0.85 | 0.100 | 0.040 | 0.40 (0.30, 0.50) |" in text
    assert "rises with every tenth in 1 of 1 rows" in text.replace("\n", " ")
    assert "a to b, by confidence |" in text
    assert "| x | b, c | 9, 9 | 0.300 | 0.050 | +0.300 |" in text
    assert "Spearman" in text
    assert "3 pairs are few" in text
    assert "is reached in 1 of 2 rows" in text
    assert "In 1 rows errors fall instead" in text.replace("\n", " ")
    assert "- suggest, 100 x 100 pixels: 1.20 times" in text
    assert (tmp_path / "results" / "trust-gap.svg").is_file()
    empty = economy_page.page({kind: [] for kind in kept}, tmp_path / "none.md", network="net", steps=3)
    assert empty.count("Not measured.") == 4
