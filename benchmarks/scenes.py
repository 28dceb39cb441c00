"""What the benchmarks of prediction share: a small network with random weights, and scenes of any size."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import rasterio
import torch
from rasterio.transform import from_origin
from torch import Tensor

from rsseg.checkpoint import Calibration, write_model
from rsseg.methods.base import Segmenter, TileHint
from rsseg.task import ClassInfo, Task

RECIPE = """
name: bench
method: ktda
data: {path: none}
student: {name: tf_efficientnet_lite0, weights: random}
decoder: {type: segformer, channels: 64}
"""


def processor() -> str:
    """Name of the processor and whether it computes in bfloat16 natively."""
    from rsseg.inference.machine import has_native_bfloat16

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor"
    )
    return f"{name} ({'with' if has_native_bfloat16() else 'without'} bfloat16)"


def make_segmenter(classes: int = 6) -> Segmenter:
    """A convolutional student; what it predicts does not matter here."""
    from rsseg.methods.registry import segmenter_for
    from rsseg.recipe import RecipeSource, parse_recipe

    return segmenter_for(parse_recipe(RecipeSource("bench", RECIPE)), make_task(classes))


def write_random_model(file: Path, recipe: str, task: Task, calibration: Calibration | None = None) -> Segmenter:
    """Write a model file of a recipe's network with seeded random weights.

    Random classes are nearly equal everywhere: those of the classifier are spread, or rounding decides.
    """
    from rsseg.methods.registry import segmenter_for
    from rsseg.recipe import RecipeSource, parse_recipe
    from rsseg.training.checkpoints import model_header

    parsed = parse_recipe(RecipeSource("random", recipe))
    torch.manual_seed(0)
    network = segmenter_for(parsed, task)
    for parameter in network.decoder.classifier.parameters():
        torch.nn.init.normal_(parameter)
    training = {} if calibration is None else {"calibration": asdict(calibration)}
    write_model(file, network.state_dict(), model_header(parsed, network, training))
    return network


def make_task(classes: int = 6) -> Task:
    """RGB in 8 bits."""
    return Task(
        name="bench",
        classes=tuple(ClassInfo(name=f"class {i}", value=i, color=(40 * i % 256, 90, 20)) for i in range(classes)),
        bands=("red", "green", "blue"),
        scale=(1 / 255,) * 3,
        offset=(0.0,) * 3,
    )


class StubSegmenter(Segmenter):
    """Takes no time and no memory to speak of: what is left is the pipeline."""

    def __init__(self, task: Task) -> None:
        super().__init__(task, input_multiple=32, fill=[0.0] * 3, tile=TileHint(1024, 128, flexible=True))

    def forward(self, images: Tensor) -> Tensor:
        return images[:, torch.arange(self.task.num_classes) % 3]


def write_scene(path: Path, side: int, *, texture: int = 16, compress: str = "deflate") -> Path:
    """An RGB scene in tiles of 512 px with texture (0: none, written faster), written in rows of blocks."""
    rng = np.random.default_rng(0)
    profile = {
        "driver": "GTiff",
        "height": side,
        "width": side,
        "count": 3,
        "dtype": "uint8",
        "crs": "EPSG:32631",
        "transform": from_origin(5e5, 4e6, 0.5, 0.5),
        "tiled": True,
        "blockxsize": 512,
        "blockysize": 512,
        "photometric": "rgb",
    }
    if compress != "none":
        profile |= {"compress": compress, "predictor": 2}
    with rasterio.open(path, "w", **profile) as dataset:
        for top in range(0, side, 512):
            height = min(512, side - top)
            coarse = rng.integers(40, 200, (3, -(-height // 32), -(-side // 32)), np.uint8)
            rows = coarse.repeat(32, 1).repeat(32, 2)[:, :height, :side]
            if texture:
                rows = rows + rng.integers(0, texture, rows.shape, np.uint8)
            dataset.write(rows, window=((top, top + height), (0, side)))
    return path
