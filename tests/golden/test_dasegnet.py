"""Every golden case of ST-DASegNet."""

from pathlib import Path

from tests.golden import dasegnet_data, dasegnet_inference, dasegnet_parts, dasegnet_training
from tests.golden.harness import parametrize_cases, run_case

DRIVERS = {
    **dasegnet_data.DRIVERS,
    **dasegnet_inference.DRIVERS,
    **dasegnet_parts.DRIVERS,
    **dasegnet_training.DRIVERS,
}


@parametrize_cases("dasegnet")
def test_dasegnet(path: Path) -> None:
    run_case(path, DRIVERS)
