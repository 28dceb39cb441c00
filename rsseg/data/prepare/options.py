"""What `rsseg dataset prepare` can be told."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rsseg.errors import UsageError

Count = Annotated[int, Field(ge=1)]


class FolderOptions(BaseModel):
    """How to read anyone's own folder; see `rsseg.data.layouts` for patterns."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    classes: Path
    """Class file (YAML)."""
    images: str
    """Pattern of the images, or one per band joined by `|`, such as `{split}/images/*.jpg`."""
    masks: str | None = None
    """Pattern of the masks, such as `{split}/masks/*.png`."""
    unlabeled: tuple[str, ...] = ()
    """Splits whose masks are never opened."""
    split_as: Mapping[str, str] = {}
    """What `{split}` matched -> `SPLIT` or `SPLIT:DOMAIN`."""
    split_lists: Mapping[str, Path] = {}
    """`SPLIT` or `SPLIT:DOMAIN` -> text file with one image per line, as a path below the source or a name."""
    split_ratio: Mapping[str, float] = {}
    """Split -> share of the images."""
    seed: int = 0
    """Of the drawn splits."""


class PrepareOptions(BaseModel):
    """Where from, where to, and what to do on the way."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    out: Path | None = None
    """Folder to make; `data/NAME` by default."""
    src: Path | None = None
    """Folder, zip or tar with the dataset as its publisher ships it."""
    download: bool = False
    """Agree to fetch the archive from the hub."""
    offline: bool = False
    """Never use the network."""
    overwrite: bool = False
    """Replace `out`."""
    tile: Count | None = None
    """Cut images into squares of this many pixels; None keeps them whole."""
    stride: Count | None = None
    """Distance of the squares; None takes `tile`, so that they do not overlap."""
    jobs: Count = Field(default_factory=lambda: os.cpu_count() or 1)
    """Threads; by default as many as processors. The result does not depend on it."""
    bands: tuple[str, ...] | None = None
    """Names of the bands in file order, instead of what the card, the class file or the images say."""
    scale: Literal["auto"] | tuple[float, float] = "auto"
    """Stored values that become 0 and 1: 0 and 255 for uint8, else percentiles 1 and 99 of the training images per
    band, or a fixed pair for all bands."""
    folder: FolderOptions | None = None
    """For the card `folder` only."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stride is not None and (self.tile is None or self.stride > self.tile):
            raise ValueError("stride needs tile, and must not be larger than it: pixels would be lost")
        if self.scale != "auto" and not self.scale[0] < self.scale[1]:
            raise ValueError(f"the low end of the scale must be below the high end, not {self.scale}")
        return self


def parse_scale(text: str) -> Literal["auto"] | tuple[float, float]:
    """`auto` or `fixed:LOW,HIGH`; raises `UsageError`."""
    if text == "auto":
        return "auto"
    low, comma, high = text.removeprefix("fixed:").partition(",")
    try:
        if not text.startswith("fixed:") or not comma:
            raise ValueError(text)
        return float(low), float(high)
    except ValueError:
        raise UsageError(f"--scale {text}: expected auto or fixed:LOW,HIGH, such as fixed:0,10000.") from None


def parse_pairs(option: str, texts: tuple[str, ...] | list[str]) -> dict[str, str]:
    """`["a=b", "c=d"]` -> `{"a": "b", "c": "d"}`; a comma also separates pairs. Raises `UsageError`."""
    pairs = {}
    for text in (part for whole in texts for part in whole.split(",")):
        key, equals, value = text.partition("=")
        if not (key.strip() and equals and value.strip()):
            raise UsageError(f"{option} {text}: expected NAME=VALUE.")
        if key.strip() in pairs:
            raise UsageError(f"{option}: {key.strip()!r} is given twice.")
        pairs[key.strip()] = value.strip()
    return pairs
