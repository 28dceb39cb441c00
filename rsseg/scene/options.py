"""Options, plan and result of a scene prediction."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rsseg.errors import UsageError
from rsseg.fields import Result
from rsseg.inference.engines import Quantization
from rsseg.task import NODATA, Task
from rsseg.text import duration

Progress = Callable[[int, int], None]
"""Called with the number of finished tiles and of all tiles."""


def _known_device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", name):
        raise ValueError("choose auto, cpu, cuda or cuda:N")
    return name


class SceneOptions(BaseModel):
    """Options of a scene prediction. None chooses a value for the network and the machine."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    tile: Annotated[int, Field(ge=16, le=32768)] | None = None
    """Side in pixels."""
    overlap: Annotated[int, Field(ge=0)] | None = None
    """Pixels that neighbouring tiles share."""
    blend: Literal["crop", "hann", "mean"] = "crop"
    """`crop` decides each pixel in the tile whose border is farthest; `hann` and `mean` average logits."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Tiles per forward pass."""
    bands: tuple[Annotated[str, BeforeValidator(str.strip)], ...] | None = None
    """Names or 1-based numbers of the file's bands, in the model's order."""
    nodata: float | None = None
    """Nodata value, instead of what the file declares."""
    gsd: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Resample the scene to pixels of this many metres on the ground, window by window; None keeps its pixels."""
    zero_collar: bool = False
    """Treat pixels that are 0 in every band as nodata."""
    device: Annotated[str, AfterValidator(_known_device)] = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` is bfloat16 where the hardware supports it, and float32 elsewhere."""
    engine: Literal["torch", "onnx", "openvino", "auto"] = "torch"
    """Program that runs the network. `auto` takes openvino or onnx on a CPU if installed and able, else torch."""
    quantize: Literal["none", "int8"] = "none"
    """`int8` computes with 8-bit weights and activations; needs `calibrate` and the engine onnx or openvino."""
    calibrate: Path | None = None
    """Prepared dataset whose images show the ranges of the activations; its labels, if any, measure the loss."""
    tta: Literal["none", "flip", "d4"] = "none"
    """Test-time augmentation: average each tile with its mirror image, or over the eight symmetries of a square."""
    aoi: Path | None = None
    """Vector file with polygons in any coordinate system; outside of them the output has no data."""
    confidence: bool = False
    """Also write the probability of the class to `STEM_confidence.tif`."""
    probabilities: Literal["none", "uint8", "float16"] = "none"
    """Also write the probability of each class to `STEM_probabilities.tif`."""
    min_confidence: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    """Pixels whose class has a lower probability get `unsure_class`."""
    unsure_class: str | None = None
    """A class of the model; None: no data."""
    applicability: bool = False
    """Also write how near the features are to those of the training data to `STEM_applicability.tif`: 0..1, 0.5 at the
    distance that 95 % of the held-out windows do not exceed."""
    disagreement: bool = False
    """Also write how much several models disagree to `STEM_disagreement.tif`, 0..1: the mutual information between
    class and model over its largest value, see `rsseg.inference.ensemble.disagreement`."""
    polygons: Path | None = None
    """Also write polygons of the classes to this file; an extension, such as `.gpkg`, names it after the output."""
    min_area: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Smaller polygons are left out; square metres, or pixels where the scene has no coordinates."""
    simplify: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Tolerance of the simplification in pixels; neighbouring polygons keep their common border."""
    preview: Path | None = None
    """Also draw scene, classes and legend to this PNG file; an extension as for `polygons`."""
    max_memory: Annotated[int, Field(ge=1)] | None = None
    """Memory limit in bytes, libraries excluded; parallel batches, then the batch, then the tile are reduced to fit.
    None: parallel batches take a quarter of the free memory, at most 4 GB."""
    resume: bool = False
    """Keep finished rows in `.NAME.resume` beside the output until it is complete, and continue from there."""
    format: Literal["cog", "gtiff"] = "cog"
    """Cloud-optimized GeoTIFF with overviews, or a plain tiled GeoTIFF."""
    overwrite: bool = False
    """Replace existing outputs."""

    @property
    def measures_probabilities(self) -> bool:
        """Whether an output depends on the probabilities of the classes."""
        return self.confidence or self.probabilities != "none" or self.min_confidence > 0


def parse_options(**values: Any) -> SceneOptions:
    """Options of a command; raises `UsageError` that names the option."""
    try:
        return SceneOptions.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = "--" + {"resume": "resume-scene"}.get(str(first["loc"][0]), str(first["loc"][0]).replace("_", "-"))
        message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        raise UsageError(f"{name} {first['input']}: {message}.") from None


class ClassArea(Result):
    """Area of one class in a scene."""

    name: str
    value: int
    """Pixel value in the output."""
    pixels: int
    share: float
    """Share of the pixels with data, 0..1."""
    square_meters: float | None
    """On the ellipsoid; None without known coordinates."""
    hectares: float | None

    @classmethod
    def table(
        cls, task: Task, counts: NDArray[np.int64], square_meters: NDArray[np.float64] | None
    ) -> "tuple[ClassArea, ...]":
        """Area of each class in the order of the task, from the pixels and square metres of each value, (256,)."""
        total = max(int(counts[:NODATA].sum()), 1)
        areas = [None if square_meters is None else float(square_meters[c.value]) for c in task.classes]
        return tuple(
            cls(
                name=c.name,
                value=c.value,
                pixels=int(counts[c.value]),
                share=int(counts[c.value]) / total,
                square_meters=area,
                hectares=None if area is None else area / 1e4,
            )
            for c, area in zip(task.classes, areas, strict=True)
        )


class SceneResult(Result):
    """The outputs of a prediction and their statistics."""

    output: Path
    height: int
    width: int
    valid_share: float
    """Share of the pixels that have a class, 0..1."""
    areas: tuple[ClassArea, ...]
    """In the order of the task's classes."""
    tiles: int
    seconds: float
    """From the first read to the finished files."""
    megapixels_per_second: float
    """Pixels of the scene, overlap not counted."""
    device: str
    dtype: str
    engine: str
    quantization: Quantization | None
    """Of a network in int8 arithmetic, with its loss of mIoU."""
    resumed: float
    """Share of the rows that an earlier run had finished, 0..1."""
    polygons: int | None
    """Number of polygons, if they were asked for."""
    extra_outputs: tuple[Path, ...]
    """Confidence and other layers, polygons and preview, as asked for."""
    warnings: tuple[str, ...]


class ScenePlan(Result):
    """Inputs, outputs, tiling and cost of a prediction."""

    scene: str
    output: Path
    height: int
    width: int
    bands: tuple[tuple[str, str], ...]
    """Each band of the model and the band of the file for it."""
    tile: tuple[int, int]
    """Height and width."""
    overlap: int
    tiles: int
    redundancy: float
    """Pixels computed per pixel of the scene."""
    blend: str
    batch_size: int
    parallel_batches: int
    """Batches that a CPU computes in parallel."""
    device: str
    dtype: str
    engine: str
    quantization: Quantization | None
    """Of a network in int8 arithmetic, with its loss of mIoU."""
    views: int
    """Forward passes per tile."""
    panels: int
    """Ranges of columns that are computed one after the other, so that wide scenes need no more memory."""
    memory_bytes: int
    """Estimate of the memory, libraries excluded: weights, a forward pass, and rows of the scene. Independent of the
    size of the scene."""
    seconds: float
    """Estimate from one small tile."""
    warnings: tuple[str, ...]

    def text(self) -> str:
        """Summary in a few lines."""
        bands = ", ".join(wanted if wanted == found else f"{wanted} = {found}" for wanted, found in self.bands)
        tile = " x ".join(str(side) for side in dict.fromkeys(reversed(self.tile)))
        lines = [
            f"{self.scene} -> {self.output}",
            f"  {self.width} x {self.height} pixels, bands {bands}",
            f"  {self.tiles} {'tile' if self.tiles == 1 else 'tiles'} of {tile}, overlap {self.overlap} "
            f"({self.redundancy:.2f}x the pixels), blend {self.blend}, batches of {self.batch_size}"
            + (f", {self.parallel_batches} in parallel" if self.parallel_batches > 1 else "")
            + (f", {self.views} views of each" if self.views > 1 else "")
            + (f", in {self.panels} panels" if self.panels > 1 else ""),
            f"  {self.dtype} on {self.device} with {self.engine}, about {self.memory_bytes / 2**20:.0f} MB "
            f"besides the libraries, "
            f"about {duration(self.seconds)}",
            *([] if self.quantization is None else [f"  {self.quantization.text()}"]),
            *(f"  warning: {warning}" for warning in self.warnings),
        ]
        return "\n".join(lines)


class Outcome(BaseModel):
    """How the prediction of a scene ended."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    scene: str
    output: Path
    status: Literal["done", "skipped", "failed"]
    """`skipped`: the output exists, made from the same scene, model and options."""
    seconds: float
    error: str | None = None
    result: SceneResult | None = None
    exception: Annotated[Exception | None, Field(exclude=True)] = None
    """Of a failed scene."""
