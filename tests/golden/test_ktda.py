"""Every golden case of KTDA."""

from pathlib import Path

from tests.golden import ktda_data, ktda_parts, ktda_real, ktda_whole
from tests.golden.harness import parametrize_cases, run_case

DRIVERS = {**ktda_data.DRIVERS, **ktda_parts.DRIVERS, **ktda_real.DRIVERS, **ktda_whole.DRIVERS}


@parametrize_cases("ktda")
def test_ktda(path: Path) -> None:
    run_case(path, DRIVERS)
