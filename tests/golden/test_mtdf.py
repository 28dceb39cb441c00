"""Every golden case of RS-MTDF."""

from pathlib import Path

from tests.golden import mtdf_data, mtdf_network, mtdf_training
from tests.golden.harness import parametrize_cases, run_case

DRIVERS = mtdf_data.DRIVERS | mtdf_network.DRIVERS | mtdf_training.DRIVERS


@parametrize_cases("mtdf")
def test_mtdf(path: Path) -> None:
    run_case(path, DRIVERS)
