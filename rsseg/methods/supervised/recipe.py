"""Recipe of plain supervised training, the baseline of the other methods: one backbone, one decoder, labeled images."""

from typing import Literal, Self

from pydantic import model_validator

from rsseg.config import BaseRecipe, TrainedBackbone
from rsseg.methods.plain_recipe import PlainConfig


class SupervisedRecipe(BaseRecipe, PlainConfig):
    """Cross-entropy on labeled images only."""

    method: Literal["supervised"]
    backbone: TrainedBackbone

    def stream_names(self) -> tuple[str, ...]:
        """Labeled images only."""
        return ("labeled",)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        self.decoder.check_batch(self.trainer.batch_of("labeled"))
        return self
