"""Every golden case of ST-DASegNet."""

from pathlib import Path

from tests.golden import dasegnet_data, dasegnet_parts, dasegnet_whole
from tests.golden.harness import parametrize_cases, run_case

HANDLERS = dasegnet_data.HANDLERS | dasegnet_parts.HANDLERS | dasegnet_whole.HANDLERS


@parametrize_cases("dasegnet")
def test_dasegnet(path: Path) -> None:
    run_case(path, HANDLERS)
