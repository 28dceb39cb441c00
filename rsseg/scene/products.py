"""What the rasters of a prediction hold: classes, confidence, probabilities."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from rsseg.inference.blend import FULL
from rsseg.task import NODATA, Task


@dataclass(frozen=True)
class Product:
    """The bands of one output file.

    dtype: NumPy name of the pixels that are written
    resampling: how overviews are made
    band_names: one per band
    half: stored as 16-bit floating point, which has no type of its own in GDAL before 3.11
    scale: real value of a stored 1
    colors: red, green, blue of pixel values; None for measured values
    value_names: names of pixel values
    """

    dtype: Literal["uint8", "float32"]
    nodata: float
    resampling: Literal["mode", "average"]
    band_names: tuple[str, ...]
    half: bool = False
    scale: float = 1.0
    colors: Mapping[int, tuple[int, int, int]] | None = None
    value_names: Mapping[int, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of bands."""
        return len(self.band_names)

    @property
    def pixel_bytes(self) -> int:
        """Bytes of a pixel over all bands, in memory."""
        return self.count * (1 if self.dtype == "uint8" else 4)


def class_product(task: Task) -> Product:
    """One band with the `value` of each class."""
    return Product(
        dtype="uint8",
        nodata=NODATA,
        resampling="mode",
        band_names=("class",),
        colors={c.value: c.color for c in task.classes},
        value_names={c.value: c.name for c in task.classes},
    )


def confidence_product() -> Product:
    """One band with the probability of the class."""
    return Product("uint8", NODATA, "average", ("confidence",), scale=1 / FULL)


def probability_product(task: Task, kind: Literal["uint8", "float16"]) -> Product:
    """A band per class with its probability."""
    if kind == "uint8":
        return Product("uint8", NODATA, "average", task.class_names, scale=1 / FULL)
    return Product("float32", -1.0, "average", task.class_names, half=True)
