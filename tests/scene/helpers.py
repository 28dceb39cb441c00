"""What the tests of scenes share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch

from rsseg.checkpoint import ModelHeader, write_model
from rsseg.config import EvalConfig
from rsseg.inference.image import predict_image
from rsseg.methods.base import Segmenter
from rsseg.methods.registry import segmenter_for
from rsseg.recipe import RecipeSource, parse_recipe
from rsseg.scene.memory import prepare_network
from rsseg.scene.options import SceneOptions, ScenePlan
from rsseg.scene.plan import prepare_scene
from tests.toys import ConvSegmenter, make_task

RECIPE = """
name: tiny
method: ktda
data: {path: none}
student: {name: convnext_mini, weights: random}
decoder: {type: segformer, channels: 16}
"""
EXACT = {"tile": 64, "overlap": 8, "dtype": "float32", "device": "cpu"}


def options(**changes: Any) -> SceneOptions:
    return SceneOptions.model_validate({**EXACT, **changes})


def plan_scene(segmenter: Segmenter, scene: Path | str, output: Path, options: SceneOptions) -> ScenePlan:
    """What `predict_scene` would do, without reading a pixel."""
    return prepare_scene(prepare_network(segmenter, options), scene, output, options).describe()


def random_pixels(height: int, width: int, bands: int = 3) -> np.ndarray:
    return np.random.default_rng(2).integers(1, 256, (bands, height, width)).astype(np.uint8)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read_classes(path: Path) -> np.ndarray:
    with rasterio.open(path) as dataset:
        return dataset.read(1)


def expected_values(segmenter: Segmenter, pixels: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """What the predictor of images gives, as pixel values."""
    task = segmenter.task
    scale, offset = (np.array(v, np.float32)[:, None, None] for v in (task.scale, task.offset))
    config = EvalConfig(tile=EXACT["tile"], overlap=EXACT["overlap"])
    classes = predict_image(segmenter, pixels.astype(np.float32) * scale + offset, valid, config, device="cpu")
    values = np.array([c.value for c in task.classes], np.uint8)[classes]
    return values if valid is None else np.where(valid, values, np.uint8(255))


class StoppingSegmenter(ConvSegmenter):
    """Computes what its parent does, and stops like a user who presses Ctrl-C after `last` tiles of 64 pixels.

    The exception carries the names that lie in `folder` then.
    """

    def __init__(self, last: int, folder: Path | None = None) -> None:
        super().__init__(make_task())
        self.last, self.calls, self.folder = last, 0, folder

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += images.shape[-1] == 64
        if self.calls > self.last:
            raise KeyboardInterrupt(*(files_in(self.folder) if self.folder else ()))
        return super().forward(images)


def write_tiny_model(folder: Path) -> Path:
    """A model file with random weights."""
    task, recipe = make_task(), parse_recipe(RecipeSource("tiny", RECIPE))
    torch.manual_seed(0)
    header = ModelHeader(recipe=recipe.model_dump(mode="json"), task=task, backbones={}, training={}, made_with={})
    write_model(folder / "model.safetensors", segmenter_for(recipe, task).state_dict(), header)
    return folder / "model.safetensors"


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Set the number of torch threads: those of all parallel batches together."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
