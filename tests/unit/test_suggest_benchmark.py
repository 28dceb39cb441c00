"""The replay of `rsseg suggest` on a labeled dataset."""

from pathlib import Path

import pytest

from benchmarks import suggest


def test_replay_trains_each_cell_once_and_every_rule_from_the_same_start(
    rgb_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, written = tmp_path / "cells.jsonl", tmp_path / "page.md"
    call = ["--data", str(rgb_dataset), "--start", "2", "--add", "1", "--crop", "32", "--batch", "2", "--quick"]
    suggest.main([*call, "--out", str(out), "--page", str(written)])
    cells = list(suggest.read(out).values())
    assert [(c.rule, c.round, len(c.labeled)) for c in cells] == [
        ("random", 0, 2), *((rule, 1, 3) for rule in suggest.RULES),
    ]  # fmt: skip
    assert all(set(cells[0].labeled) < set(c.labeled) for c in cells[1:])
    rows = [line for line in written.read_text().splitlines() if line.startswith("| 3 |")]
    assert rows == [f"| 3 | {' | '.join(f'{c.miou:.3f}' for c in cells[1:])} |"]

    def fail(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(suggest, "trained", fail)
    suggest.main([*call, "--out", str(out)])


def test_images_needed_are_the_fewest_that_reach_the_score() -> None:
    curve = {9: 0.6, 3: 0.2, 6: 0.5}
    assert [suggest.needed(curve, target) for target in (0.1, 0.5, 0.55, 0.7)] == [3, 6, 9, None]
