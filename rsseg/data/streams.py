"""Training streams: what a method asks for, what it gets, and in which order, as a pure function of seed and step."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """One stream's share of a batch, all on the training device.

    images  float32 (B, C, H, W), scaled by Task.scale/offset, NOT normalized: each backbone normalizes for itself
    masks   int64 (B, H, W), class index or IGNORE_INDEX; None for an unlabeled stream
    valid   bool (B, H, W), False where the crop was padded or the source has no data; images hold StreamSpec.fill there
    strong  float32 (B, V, C, H, W), V strong views of the same crops; None if the stream asks for none
    mix     bool (B, V, H, W), True where CutMix takes the pixel from the partner sample; None without strong views
    """

    images: Tensor
    valid: Tensor
    masks: Tensor | None = None
    strong: Tensor | None = None
    mix: Tensor | None = None


Batch = Mapping[str, Samples]
"""Keyed by stream name."""


@dataclass(frozen=True)
class StreamSpec:
    """What a method asks of one stream.

    name          "labeled", "unlabeled", "source", "target"
    split         index split that feeds it unless the recipe says otherwise
    masks         True: a missing mask is an error; False: masks are never opened
    fill          per band, scaled units: value of pixels without data
    strong_views  number of strong views
    """

    name: str
    split: str
    masks: bool
    fill: tuple[float, ...]
    strong_views: int = 0
