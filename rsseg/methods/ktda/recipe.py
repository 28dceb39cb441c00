"""Recipe of KTDA (arXiv 2412.06664)."""

from typing import Literal

from rsseg.config import BackboneConfig, BaseRecipe


class KTDARecipe(BaseRecipe):
    """A student taught by a frozen foundation model."""

    method: Literal["ktda"]
    student: BackboneConfig
    teacher: BackboneConfig | None = None

    def stream_names(self) -> tuple[str, ...]:
        """KTDA trains on labeled images only."""
        return ("labeled",)
