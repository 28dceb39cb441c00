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
    device: str
    dtype: str
    buffer_bytes: int
    """Memory for rows of the scene; the network's own comes on top. Does not depend on the height of the scene."""
    warnings: tuple[str, ...]

    def text(self) -> str:
        """A few lines for people."""
        bands = ", ".join(wanted if wanted == found else f"{wanted} = {found}" for wanted, found in self.bands)
        lines = [
            f"{self.scene} -> {self.output}",
            f"  {self.width} x {self.height} pixels, bands {bands}",
            f"  {self.tiles} tiles of {self.tile}, overlap {self.overlap} ({self.redundancy:.2f}x the pixels), "
            f"merged by {self.blend}, {self.batch_size} at once, {self.dtype} on {self.device}, "
            f"{self.buffer_bytes / 2**20:.0f} MB of row buffers",
            *(f"  warning: {warning}" for warning in self.warnings),
        ]
        return "\n".join(lines)
