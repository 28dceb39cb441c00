"""Classes, bands and scaling of a segmentation task. Free of torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from rsseg.errors import DataError

IGNORE_INDEX = 255
"""Class index of unlabeled pixels. Class indices run 0..253, so no class can collide with it."""

NODATA = 255
"""Value of class rasters and of uint8 probabilities where the input has no data."""

Color = tuple[
    Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)]
]


class ClassInfo(BaseModel):
    """A class. Its index is its position in `Task.classes`; files store its `value`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    value: Annotated[int, Field(ge=0, le=254)]
    """Pixel value in predicted rasters; unique in a task. 255 is nodata."""
    color: Color


class Task(BaseModel):
    """Classes, bands and pixel scaling; stored in the index and in every checkpoint.

    Networks see `pixel * scale + offset` per band ("scaled units"), about 0..1. Backbones normalize further.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    classes: Annotated[tuple[ClassInfo, ...], Field(min_length=1, max_length=254)]
    bands: Annotated[tuple[str, ...], Field(min_length=1)]
    """Band names in network order, such as ("red", "green", "blue", "nir")."""
    dtype: str = "uint8"
    """NumPy name of the pixel type that `scale` was chosen for."""
    scale: tuple[float, ...]
    """Per band."""
    offset: tuple[float, ...]
    """Per band."""
    mean: tuple[float, ...] | None = None
    """Mean of the training images per band, scaled units; valid pixels only."""
    std: tuple[float, ...] | None = None
    """Standard deviation of the training images per band, scaled units; valid pixels only."""
    gsd_m: float | None = None
    """Ground sampling distance in metres."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for field in ("scale", "offset", "mean", "std"):
            values = getattr(self, field)
            if values is not None and len(values) != len(self.bands):
                raise ValueError(f"{field} has {len(values)} entries, bands has {len(self.bands)}")
        for what, values in (("name", [c.name for c in self.classes]), ("value", [c.value for c in self.classes])):
            if len(set(values)) != len(values):
                raise ValueError(f"two classes share a {what}: {values}")
        return self

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in index order."""
        return tuple(c.name for c in self.classes)

    def scaled(self, pixels: NDArray[Any], valid: NDArray[np.bool_], fill: Sequence[float]) -> NDArray[np.float32]:
        """Pixels `(h, w, bands)` of any type as float32 in scaled units, with `fill` per band where not valid."""
        rows = pixels.astype(np.float32, order="C").reshape(len(pixels), -1)
        # One factor per value of a row: NumPy is slow if the last axis is short.
        rows *= np.tile(np.array(self.scale, np.float32), valid.shape[1])
        rows += np.tile(np.array(self.offset, np.float32), valid.shape[1])
        image = rows.reshape(*valid.shape, -1)
        if not valid.all():
            image[~valid] = np.array(fill, np.float32)
        return image


@dataclass(frozen=True)
class TileHint:
    """Preferred tiling of a scene: side and overlap in pixels, and whether other sides work as well."""

    size: int
    """Of a convolutional network the largest side: tiles are fitted to the image."""
    overlap: int
    flexible: bool
    """True for convolutional networks, which benefit from larger tiles; False if bound to the training size."""


def task_with_bands(task: Task, bands: Sequence[str]) -> Task:
    """The task restricted to `bands`, in that order; raises `DataError` for a band it does not have."""
    missing = [band for band in bands if band not in task.bands]
    if missing:
        raise DataError(
            f"band {missing[0]!r} is not among the bands of {task.name}: {list(task.bands)}. Name the bands to use "
            "with `bands` (of the recipe's data, or of the stream or split)."
        )
    chosen = [task.bands.index(band) for band in bands]
    picked = {
        field: tuple(values[i] for i in chosen)
        for field in ("scale", "offset", "mean", "std")
        if (values := getattr(task, field)) is not None
    }
    return task.model_copy(update={"bands": tuple(bands), **picked})
