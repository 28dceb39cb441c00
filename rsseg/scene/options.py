"""What a user can ask of a scene prediction, and what comes back."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Progress = Callable[[int, int], None]
"""Called with how many of how many tiles are done."""


class SceneOptions(BaseModel):
    """How a scene is predicted. None takes what suits the network and the machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tile: Annotated[int, Field(ge=1)] | None = None
    """Side in pixels."""
    overlap: Annotated[int, Field(ge=0)] | None = None
    """Pixels that neighbouring tiles share."""
    blend: Literal["crop", "hann", "mean"] = "crop"
    """`crop` decides each pixel in the tile whose border is farthest; `hann` and `mean` average logits."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Tiles at once."""
    bands: tuple[str, ...] | None = None
    """Names or 1-based numbers of the file's bands, in the model's order."""
    nodata: float | None = None
    """Value without data, if the file does not declare one."""
    zero_collar: bool = False
    """Pixels that are 0 in every band have no data."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` is bfloat16 where the device computes with it, and float32 elsewhere."""
    tta: Literal["none", "flip", "d4"] = "none"
    """Average each tile with its mirror image, or over the eight turns and mirrorings of a square."""
    aoi: Path | None = None
    """GeoJSON or GeoPackage of polygons in any coordinate system; outside of them there is no data."""
    confidence: bool = False
    """Also write the probability of the class to `STEM_confidence.tif`."""
    probabilities: Literal["none", "uint8", "float16"] = "none"
    """Also write the probability of each class to `STEM_probabilities.tif`."""
    max_memory: Annotated[int, Field(ge=1)] | None = None
    """Bytes beyond what the libraries take; batch, buffers and at last tiles are made smaller to fit."""
    resume: bool = False
    """Keep finished rows in `.NAME.resume` beside the output until it is complete, and go on from there."""
    format: Literal["cog", "gtiff"] = "cog"
    """Cloud-optimized GeoTIFF with overviews, or a plain tiled GeoTIFF."""
    overwrite: bool = False
    """Replace an existing output."""


class ClassArea(BaseModel):
    """How much of a scene is of one class."""

    model_config = ConfigDict(frozen=True)

    name: str
    value: int
    """Pixel value in the output."""
    pixels: int
    share: float
    """Of the pixels with data, 0..1."""
    square_meters: float | None
    """None unless the coordinate system is a projected one."""
    hectares: float | None


class SceneResult(BaseModel):
    """What was written."""

    model_config = ConfigDict(frozen=True)

    output: Path
    height: int
    width: int
    valid_share: float
    """Part of the pixels that have data, 0..1."""
    areas: tuple[ClassArea, ...]
    """In the order of the task's classes."""
    tiles: int
    seconds: float
    """From the first read to the finished file."""
    megapixels_per_second: float
    """Of the scene, without what overlaps."""
    device: str
    dtype: str
    resumed: float
    """Part of the rows that an earlier run had finished, 0..1."""
    extra_outputs: tuple[Path, ...]
    """Confidence and probabilities, as asked for."""
    warnings: tuple[str, ...]


class ScenePlan(BaseModel):
    """What a prediction would do."""

    model_config = ConfigDict(frozen=True)

    scene: str
    output: Path
    height: int
    width: int
    bands: tuple[tuple[str, str], ...]
    """The model's band and the file's band that it takes."""
    tile: int
    overlap: int
    tiles: int
    redundancy: float
    """Pixels computed per pixel of the scene."""
    blend: str
    batch_size: int
    lanes: int
    """Batches that a CPU computes at once."""
    device: str
    dtype: str
    views: int
    """Forwards per tile."""
    panels: int
    """Ranges of columns that are computed one after the other, so that wide scenes need no more memory."""
    memory_bytes: int
    """What the prediction takes beyond the libraries, an estimate: weights, a forward, and rows of the scene. Does not
    depend on the size of the scene."""
    seconds: float
    """A guess from one small tile."""
    warnings: tuple[str, ...]

    def text(self) -> str:
        """A few lines for people."""
        bands = ", ".join(wanted if wanted == found else f"{wanted} = {found}" for wanted, found in self.bands)
        lines = [
            f"{self.scene} -> {self.output}",
            f"  {self.width} x {self.height} pixels, bands {bands}",
            f"  {self.tiles} tiles of {self.tile}, overlap {self.overlap} ({self.redundancy:.2f}x the pixels), "
            f"merged by {self.blend}, {self.batch_size * self.lanes} at once"
            + (f", {self.views} views of each" if self.views > 1 else "")
            + (f", in {self.panels} panels" if self.panels > 1 else ""),
            f"  {self.dtype} on {self.device}, about {self.memory_bytes / 2**20:.0f} MB beside the libraries, "
            f"about {duration(self.seconds)}",
            *(f"  warning: {warning}" for warning in self.warnings),
        ]
        return "\n".join(lines)


def duration(seconds: float) -> str:
    """Such as "40 s", "12 min" or "3.5 h"."""
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
