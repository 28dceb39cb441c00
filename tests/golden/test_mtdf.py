"""Every golden case of RS-MTDF."""

from pathlib import Path

from tests.golden import mtdf_data, mtdf_network, mtdf_training
from tests.golden.harness import parametrize_cases, run_case

HANDLERS = mtdf_data.HANDLERS | mtdf_network.HANDLERS | mtdf_training.HANDLERS


@parametrize_cases("mtdf")
def test_mtdf(path: Path) -> None:
    run_case(path, HANDLERS)
