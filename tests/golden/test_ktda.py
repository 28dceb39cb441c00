"""Every golden case of KTDA."""

from pathlib import Path

from tests.golden import ktda_backbones, ktda_data, ktda_network, ktda_training, ktda_whole
from tests.golden.harness import parametrize_cases, run_case

HANDLERS = (
    ktda_backbones.HANDLERS | ktda_data.HANDLERS | ktda_network.HANDLERS | ktda_training.HANDLERS | ktda_whole.HANDLERS
)


@parametrize_cases("ktda")
def test_ktda(path: Path) -> None:
    run_case(path, HANDLERS)
