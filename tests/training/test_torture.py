"""The short form of `python -m tests.training.torture`."""

import signal
from pathlib import Path

import pytest

from tests.conformance.cases import make_case, recipe_files
from tests.training.torture import FULL_DISK, KINDS, RECIPES, torture

FILES = {path.stem: path for path in recipe_files()}


@pytest.mark.parametrize(("ranks", "kinds"), [(1, (signal.SIGKILL, FULL_DISK)), (2, (signal.SIGTERM, FULL_DISK))])
def test_training_that_is_killed_ends_bit_identically(tmp_path: Path, ranks: int, kinds: tuple[int, ...]) -> None:
    case = make_case(FILES["demo-supervised"], tmp_path / "data")
    assert torture(case, tmp_path / "runs", len(kinds), ranks, kinds=kinds) == []


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", RECIPES)
def test_every_method_survives_every_kind_of_kill(name: str, ranks: int, tmp_path: Path) -> None:
    case = make_case(FILES[name], tmp_path / "data")
    assert torture(case, tmp_path / "runs", len(KINDS), ranks) == []
