"""Small recipes of every method, and a dataset that holds what their streams ask for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import yaml
from timm.layers import DropPath
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from rsseg.config import SelectConfig
from rsseg.data.index import IndexItem, LabelMap, SegmentationIndex
from rsseg.data.streams import training_batches
from rsseg.methods.base import Method
from rsseg.methods.registry import method_for
from rsseg.recipe import Recipe, packaged_recipes, recipe_from_dict
from rsseg.task import Task
from rsseg.training.checkpoints import Parts
from rsseg.training.device import Hardware
from rsseg.training.graphs import Recorder, make_step
from rsseg.training.plan import backbone_configs
from rsseg.training.step import build_optimizers, set_rate
from tests.conftest import rgb_task, write_png

CROP = 64
LARGER_CROPS = {"demo-dasegnet": 192}
"""By recipe: its discriminators need six positions at a stride of 32."""
CLASSES = 3
TRAINER = {
    "steps": 3,
    "batch_size": 2,
    "stream_batch_sizes": {},
    "workers": 0,
    "eval_every": 3,
    "checkpoint_every": 3,
    "log_every": 1,
    "amp_dtype": "none",
    "device": "cpu",
}


def recipe_files() -> list[Path]:
    """Demo recipes that need no weights, and those of this folder."""
    demos = [path for name, path in packaged_recipes().items() if name.startswith("demo-")]
    own = sorted((Path(__file__).parent / "recipes").glob("*.yaml"))
    return [path for path in [*demos, *own] if all(b.weights == "random" for _, b in backbone_configs(_read(path)))]


def _read(file: Path) -> Recipe:
    return recipe_from_dict(yaml.safe_load(file.read_text()), file.name)


def methods_covered() -> set[str]:
    return {_read(file).method for file in recipe_files()}


@dataclass(frozen=True)
class Case:
    """A reduced recipe on a dataset of its own."""

    recipe: Recipe
    task: Task
    root: Path

    def method(self) -> Method:
        return method_for(self.recipe, self.task)


def make_case(file: Path, root: Path) -> Case:
    """The recipe with small crops and few steps; each of its streams and splits gets four images."""
    values = yaml.safe_load(file.read_text())
    data = values["data"] | {"path": str(root), "cache": False, "bands": None, "val": {"split": "val"}}
    crop = LARGER_CROPS.get(file.stem, CROP)
    data["augment"] = data.get("augment", {}) | {"crop_size": min(crop, data.get("augment", {}).get("crop_size", crop))}
    data["streams"] = {
        name: {key: value for key, value in select.items() if key in ("split", "domain")}
        for name, select in data.get("streams", {}).items()
    }
    trainer = values.get("trainer", {}) | TRAINER
    evaluation = values.get("eval", {}) | {"tile": CROP, "overlap": 0, "ignore_classes": []}
    recipe = recipe_from_dict(values | {"data": data, "trainer": trainer, "eval": evaluation}, file.name)
    task = rgb_task().model_copy(update={"mean": (0.5,) * 3, "std": (0.2,) * 3})
    method = method_for(recipe, task)
    selects = {spec.name: recipe.data.streams.get(spec.name, SelectConfig()) for spec in method.streams}
    wanted = {
        (selects[spec.name].split or spec.split, selects[spec.name].domain): spec.masks for spec in method.streams
    }
    _write_dataset(root, task, {("val", None): True} | wanted)
    return Case(recipe, task, root)


def _write_dataset(root: Path, task: Task, wanted: Mapping[tuple[str, str | None], bool]) -> None:
    rng = np.random.default_rng(11)
    items = []
    for (split, domain), labeled in wanted.items():
        for number in range(4):
            name = f"{split}_{domain}_{number}.png"
            mask = rng.integers(0, CLASSES, (9, 10)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
            pixels = (60 * mask[..., None] + rng.integers(0, 90, (*mask.shape, 3))).astype(np.uint8)
            write_png(root / "images" / name, pixels)
            if labeled:
                write_png(root / "masks" / name, mask)
            items.append(
                IndexItem(image=f"images/{name}", mask=f"masks/{name}" if labeled else None, split=split, domain=domain)
            )
    label_map = LabelMap(values={index: index for index in range(CLASSES)})
    SegmentationIndex(task=task, label_map=label_map, items=tuple(items)).save(root)


def without_dropout(method: Method) -> Method:
    """The method, of which nothing is dropped at random: the draws differ between devices and ranks."""
    for module in method.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    return method


def trained(
    case: Case,
    steps: int,
    *,
    graphs: Literal["on", "off"] = "on",
    recorder: Recorder | None = None,
    device: str = "cpu",
) -> tuple[dict[str, Tensor], list[list[float]]]:
    """Weights and losses after some steps in float32; `recorder` as for `make_step`."""
    torch.manual_seed(0)
    trainer = case.recipe.trainer.model_copy(update={"graphs": graphs, "clip_grad": 1.0})
    recipe = case.recipe.model_copy(update={"trainer": trainer})
    hardware = Hardware(torch.device(device))
    method = method_for(recipe, case.task).to(hardware.device).train()
    parts = Parts(method, None, build_optimizers(method, recipe.optimizers), GradScaler(device, enabled=False))
    step = make_step(parts, recipe, hardware, pytest.fail, recorder)
    losses = []
    batches = training_batches(recipe, method.streams, case.task, device=device, start_step=0)
    for number in range(steps):
        for optimizer in parts.optimizers.values():
            for group in optimizer.param_groups:
                set_rate(group, 2.0 ** -(9 + min(number, 9)))  # exact in float32
        micro = step.gradients(next(batches), number, 0)
        losses.append([float(value) for value in micro.output.losses.values()])
        step.update()
        method.after_optimizer_step(number)
    batches.close()
    return method.state_dict(), losses
