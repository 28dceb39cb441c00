"""Whole runs of RS-MTDF: resume, files that must stay closed, what ships, and what is said before the first step."""

import copy
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rsseg.data.dataset import CACHE_NAME
from rsseg.data.index import SegmentationIndex
from rsseg.data.sources import select_items
from rsseg.errors import DataError, Interrupted, WeightsError
from rsseg.inference.network import load_segmenter
from rsseg.recipe import Recipe, RecipeSource, parse_recipe
from rsseg.runs import RunFolder
from rsseg.training.progress import Progress
from rsseg.training.run import plan, train
from tests.training.test_run import SignalAt, assert_same_ends, assert_same_tensors
from tests.unit.mtdf_models import TAUGHT

VALUES: dict[str, Any] = TAUGHT | {
    "optimizers": {"main": {"lr": 1e-3}},
    "head_lr_scale": 2.0,
    "trainer": {"steps": 4, "batch_size": 2, "workers": 0, "eval_every": 4, "checkpoint_every": 2, "log_every": 1},
}


class Messages(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def on_message(self, text: str) -> None:
        self.messages.append(text)


def recipe_for(data: Path, *, count: int = 2, **changes: Any) -> Recipe:
    """Crops of 32 pixels, `count` of the five training images labeled, the others not."""
    values = copy.deepcopy(VALUES) | changes
    labeled = {"split": "train", "count": count}
    values["data"] = {
        "path": str(data),
        "augment": {"crop_size": 32, "scale_range": [0.5, 2.0], "resampling": "pillow", "pad_first": True},
        "streams": {"labeled": labeled, "unlabeled": labeled | {"complement": True}},
    }
    return parse_recipe(RecipeSource("tiny", yaml.safe_dump(values)))


def test_stopped_and_resumed_run_ends_as_the_unbroken_one(rgb_dataset: Path, tmp_path: Path) -> None:
    recipe = recipe_for(rgb_dataset)
    whole = train(recipe, output=tmp_path / "a", progress=Progress())
    with pytest.raises(Interrupted):
        train(recipe, output=tmp_path / "b", progress=SignalAt(2))
    (broken,) = (tmp_path / "b").glob("*_mtdf_*")
    resumed = train(recipe, output=tmp_path / "b", resume=broken, progress=Progress())
    assert_same_ends(RunFolder(whole.run), RunFolder(resumed.run))


def test_masks_beside_unlabeled_images_are_never_opened(rgb_dataset: Path, tmp_path: Path) -> None:
    recipe = recipe_for(rgb_dataset)
    clean = train(recipe, output=tmp_path / "clean", progress=Progress())
    shutil.rmtree(rgb_dataset / CACHE_NAME)
    index = SegmentationIndex.load(rgb_dataset)
    unlabeled = select_items(index, recipe.data.streams["unlabeled"], split="train", seed=recipe.seed)
    assert len(unlabeled) == 3
    for item in unlabeled:
        file = index.mask_file(item)
        assert file is not None
        file.write_bytes(b"poison")
    poisoned = train(recipe, output=tmp_path / "poisoned", progress=Progress())
    assert_same_tensors(clean.model, poisoned.model)


def test_shipped_model_predicts_without_teachers(
    rgb_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = train(recipe_for(rgb_dataset, ship="average"), output=tmp_path, progress=Progress())
    assert not any("teacher" in name or "average" in name for name in load_file(result.model))
    monkeypatch.setattr(socket, "socket", None)  # no network
    segmenter = load_segmenter(result.model)
    assert segmenter.predict_logits(torch.rand(1, 3, 50, 41)).shape == (1, 3, 50, 41)


def test_absent_class_is_named_before_training(rgb_dataset: Path, tmp_path: Path) -> None:
    index = SegmentationIndex.load(rgb_dataset)
    items = tuple(item.model_copy(update={"classes": (5, 0, 5)}) for item in index.items)
    index.model_copy(update={"items": items}).save(rgb_dataset)
    heard = Messages()
    train(recipe_for(rgb_dataset), output=tmp_path, progress=heard)
    assert len(heard.messages) == 1
    assert "none of its 2 images contains road" in heard.messages[0]


def test_no_unlabeled_images_is_an_error(rgb_dataset: Path) -> None:
    with pytest.raises(DataError, match="complement leaves no image"):
        plan(recipe_for(rgb_dataset, count=5))


def test_missing_teacher_weights_are_reported_before_any_image_is_read(rgb_dataset: Path) -> None:
    shutil.rmtree(rgb_dataset / "images")
    teacher = {"name": "dino", "backbone": {"name": "vit_base_patch14_dinov2", "weights": "absent.safetensors"}}
    with pytest.raises(WeightsError, match=r"absent\.safetensors"):
        plan(recipe_for(rgb_dataset, teachers=[teacher]))


def test_two_processes_end_as_one_that_accumulates(rgb_dataset: Path, tmp_path: Path) -> None:
    """Also if they share the parameters, and if one process resumes them. One sample per micro-step, so that CutMix has
    the same partner either way.
    """
    recipe = recipe_for(
        rgb_dataset,
        optimizers={"main": {"name": "sgd", "lr": 0.05, "schedule": {"decay": "constant"}}},
        trainer=VALUES["trainer"] | {"batch_size": 1, "monitor": "last"},
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    models = {}

    def train(name: str, *options: str) -> str:
        command = [sys.executable, "-m", "rsseg", "train", "--output", str(tmp_path / name.partition(" ")[0]), "--json"]
        done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        result = json.loads(done.stdout)
        models[name] = result["steps"], load_file(result["model"])
        assert "resumed" not in name or "the global batch is the same" in done.stderr
        return str(result["run"])

    start = ("--recipe", str(file), "--steps")
    train("one", *start, "4", "--grad-accum-steps", "2")
    train("two", *start, "4", "--gpus", "2")
    shared = train("shared", *start, "2", "--gpus", "2", "--set", "trainer.sharding=full")
    train("shared resumed", "--resume", shared, "--steps", "4")
    assert [steps for steps, _ in models.values()] == [4, 4, 2, 4]
    _, expected = models["one"]
    for way in ("two", "shared resumed"):
        _, found = models[way]
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
