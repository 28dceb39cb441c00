"""Settings that every method shares and that need a whole run: class weights by counts, batch-norm statistics."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rsseg.checkpoint import read_header
from rsseg.data.index import SegmentationIndex
from rsseg.errors import DataError, RecipeError
from rsseg.layers.blocks import measure_statistics, unrecorded_statistics
from rsseg.layers.losses import LabelLoss, class_weights_of
from rsseg.recipe import Recipe, recipe_from_dict
from rsseg.runs import RunFolder
from rsseg.training.progress import Progress
from rsseg.training.run import plan, train

QUIET = Progress()


def recipe_of(data: Path, **changes: Any) -> Recipe:
    values = {
        "method": "supervised",
        "name": "tiny",
        "data": {"path": str(data), "augment": {"crop_size": 32}, "cache": False},
        "backbone": {"name": "mobilenetv3_small_100", "weights": "random"},
        "decoder": {"channels": 8},
        "trainer": {"steps": 2, "batch_size": 2, "workers": 0, "eval_every": 2},
    }
    return recipe_from_dict(values | changes, "tiny")


def test_automatic_class_weights_follow_the_labeled_images(rgb_dataset: Path, tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []
    forward = LabelLoss.forward

    def spy(self: LabelLoss, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(self.class_weights)
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LabelLoss, "forward", spy)
        train(recipe_of(rgb_dataset, loss={"class_weights": "auto"}), output=tmp_path, progress=QUIET)
    items = [item for item in SegmentationIndex.load(rgb_dataset).items if item.split == "train"]
    expected = class_weights_of([sum(column) for column in zip(*(item.classes for item in items), strict=True)])
    assert len(set(expected.tolist())) > 1
    assert all(torch.equal(weights, expected) for weights in seen)


def test_class_weights_need_counts(rgb_dataset: Path) -> None:
    index = SegmentationIndex.load(rgb_dataset)
    items = tuple(item.model_copy(update={"classes": None}) for item in index.items)
    index.model_copy(update={"items": items}).save(rgb_dataset)
    with pytest.raises(DataError, match="class counts"):
        plan(recipe_of(rgb_dataset, loss={"class_weights": "auto"}))


def test_only_the_shipped_statistics_are_measured_anew(rgb_dataset: Path, tmp_path: Path) -> None:
    images = {"split": "train", "domain": "south"}
    recipe = recipe_of(rgb_dataset, norm_statistics={"images": images, "batches": 3})
    run = RunFolder(train(recipe, output=tmp_path, progress=QUIET).run)
    shipped, best = load_file(run.model), load_file(run.best)
    changed = {name.rpartition(".")[2] for name in best if not torch.equal(shipped[name], best[name])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}
    assert {int(v) for name, v in shipped.items() if name.endswith("num_batches_tracked")} == {3}
    assert read_header(run.model).training["norm_statistics"]["images"]["domain"] == "south"

    # Killed after the last step, before the model with the new statistics was written.
    run.model.unlink()  # `shipped` is a view of this file
    shutil.copy(run.best, run.model)
    run.update_manifest(state="running")
    train(recipe, output=tmp_path, resume=run.path, progress=QUIET)
    assert run.manifest().state == "finished"
    again = load_file(run.model)
    for name, tensor in shipped.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=0)


def test_measured_statistics_are_the_mean_over_batches_also_of_a_network_with_a_pass_that_is_not_recorded() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            with unrecorded_statistics(self):
                self.norm(3 * images)
            return self.norm(images)

    network, batches = Twice(), [torch.randn(4, 2, 5, 5) + i for i in range(3)]
    measure_statistics(network, batches)
    means = torch.stack([batch.mean(dim=(0, 2, 3)) for batch in batches])
    torch.testing.assert_close(network.norm.running_mean, means.mean(dim=0))
    assert network.norm.num_batches_tracked == len(batches)


def test_statistics_of_a_network_without_batch_norm_or_without_images_are_refused(rgb_dataset: Path) -> None:
    vit = {
        "backbone": {"name": "vit_mini_patch8", "weights": "random"},
        "decoder": {"type": "dpt", "channels": 8, "widths": [8, 8, 8, 8]},
    }
    with pytest.raises(RecipeError, match="has no batch norm"):
        plan(recipe_of(rgb_dataset, norm_statistics={"images": {"split": "train"}}, **vit))
    with pytest.raises(DataError, match="'unlabeled' is empty"):
        plan(recipe_of(rgb_dataset, norm_statistics={}))
