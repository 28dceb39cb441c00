"""Frozen teachers run once per image where crops repeat, and the losses do not change."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rsseg.data.assembly import SampleKeys
from rsseg.data.sources import Datasets
from rsseg.data.streams import Batch, StreamSpec, training_batches
from rsseg.errors import Interrupted
from rsseg.files import read_rows
from rsseg.layers import ema
from rsseg.layers.ema import Frozen
from rsseg.methods.base import Method
from rsseg.runs import RunFolder
from rsseg.training.progress import Progress
from rsseg.training.run import train
from tests.conftest import PlainRecipe, with_changes
from tests.training.recipes import tiny_recipe
from tests.training.test_run import SignalAt, assert_same_ends
from tests.unit.ktda_models import PLAIN, TASK
from tests.unit.ktda_models import batch_of as ktda_batch
from tests.unit.ktda_models import method_of as ktda_of
from tests.unit.mtdf_models import batch_of as mtdf_batch
from tests.unit.mtdf_models import method_of as mtdf_of
from tests.unit.test_ktda_stronger import SIDE, save_teacher, taught

LABELED = StreamSpec("labeled", "train", masks=True, fill=(0.4, 0.5, 0.6))


def passes_of(method: Method) -> list[int]:
    """The batch size of every pass of a frozen network's first backbone, as they come."""
    sizes: list[int] = []
    for frozen in method.frozen_teachers():
        body = next(m for m in frozen.module.modules() if hasattr(m, "body")).body
        if not body._forward_pre_hooks:
            body.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    return sizes


def losses_of(method: Method, batch: Batch) -> dict[str, float]:
    torch.manual_seed(3)
    return {name: loss.item() for name, loss in method(batch, 0).losses.items()}


def with_keys(batch: Batch, *names: str) -> Batch:
    count = len(batch["labeled"].images)
    keys = SampleKeys(tuple(range(count)), count)
    return batch | {name: replace(batch[name], keys=keys) for name in names}


def crops(recipe: PlainRecipe, count: int, **augment: Any) -> list[Batch]:
    """The first batches of two crops each."""
    fixed = {"preset": None, "scale_range": None, "photometric": "none"} | augment
    recipe = with_changes(recipe, data={"augment": recipe.data.augment.model_dump() | fixed})
    stream = training_batches(recipe, (LABELED,), Datasets(recipe.data).task, device="cpu", start_step=0)
    return list(islice(stream, count))


def test_equal_keys_mean_equal_images(plain_recipe: PlainRecipe) -> None:
    seen: dict[Any, torch.Tensor] = {}
    repeated = 0
    for batch in crops(plain_recipe, 40, crop_size=64, hflip=0.5, vflip=0.5, rot90=0.5):
        keys = batch["labeled"].keys
        assert keys is not None
        for key, image in zip(keys.keys, batch["labeled"].images, strict=True):
            repeated += key in seen
            assert torch.equal(seen.setdefault(key, image), image)
    assert repeated > 0
    assert len({image.numpy().tobytes() for image in seen.values()}) == len(seen)
    assert keys.possible == 8 * 5  # five images
    assert len(seen) <= keys.possible


@pytest.mark.parametrize(
    "augment",
    [{"crop_size": 16}, {"scale_range": (0.8, 1.25)}, {"photometric": "fast"}],
    ids=["smaller crops", "scales", "colours"],
)
def test_crops_that_do_not_repeat_have_no_keys(plain_recipe: PlainRecipe, augment: dict[str, Any]) -> None:
    (batch,) = crops(plain_recipe, 1, **{"crop_size": 64, **augment})
    assert batch["labeled"].keys is None


def test_teacher_of_features_runs_once_per_image() -> None:
    torch.manual_seed(0)
    method = ktda_of(SIDE).eval()
    plain, named = ktda_batch(), with_keys(ktda_batch(), "labeled")
    expected = losses_of(method, plain)
    sizes = passes_of(method)
    assert losses_of(method, named) == pytest.approx(expected, rel=1e-5)
    assert sizes == [1, 1]
    assert losses_of(method, named) == pytest.approx(expected, rel=1e-5)
    assert sizes == [1, 1]


def test_teacher_of_the_task_runs_once_per_image_with_the_features_that_it_shares(tmp_path: Path) -> None:
    file = save_teacher(tmp_path / "teacher.safetensors", TASK)
    method = taught(file, PLAIN | {"fam": {"path": "side"}}).eval()
    expected = losses_of(method, ktda_batch())
    sizes = passes_of(method)
    for _ in range(2):
        assert losses_of(method, with_keys(ktda_batch(), "labeled")) == pytest.approx(expected, rel=1e-5)
    assert sizes == [1, 1]


def test_several_teachers_run_once_per_labeled_image_and_always_on_strong_views() -> None:
    torch.manual_seed(0)
    method = mtdf_of().eval()
    batch = mtdf_batch()
    expected = losses_of(method, batch)
    sizes, labeled, views = passes_of(method), len(batch["labeled"].images), len(batch["unlabeled"].images)
    teachers = len(list(method.frozen_teachers()))
    named = with_keys(batch, "labeled")
    assert losses_of(method, named) == pytest.approx(expected, rel=1e-5)
    assert sizes == ([1] * labeled + [views]) * teachers
    sizes.clear()
    assert losses_of(method, named) == pytest.approx(expected, rel=1e-5)
    assert sizes == [views] * teachers


def test_outputs_are_kept_only_if_those_of_all_images_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen, images = Frozen(nn.Linear(4, 4)), torch.randn(3, 5, 4)
    monkeypatch.setattr(ema, "KEPT_BYTES", 10 * images[0].nbytes)
    sizes: list[int] = []

    def compute(x: torch.Tensor) -> list[torch.Tensor]:
        sizes.append(len(x))
        return [frozen(x)]

    first = frozen.outputs(compute, images, ("abc", 10))[0]
    assert torch.equal(first, torch.cat([frozen(image[None]) for image in images]))
    assert set(sizes) == {1}
    sizes.clear()
    assert torch.equal(frozen.outputs(compute, images.flip(0), ("cba", 10))[0], first.flip(0))
    assert sizes == []
    for keys in (("abc", 11), None):
        torch.testing.assert_close(frozen.outputs(compute, images, keys)[0], first)
    assert sizes == [1, 3, 3], "one to measure the outputs"
    frozen.to(torch.float64)  # what is kept has the type and the place of before
    assert frozen.outputs(compute, images.double(), ("abc", 10))[0].dtype == torch.float64


def test_stopped_and_resumed_run_that_keeps_outputs_ends_as_the_unbroken_one(
    rgb_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples: list[int] = []
    original = Frozen.outputs

    def counted(self: Frozen, compute: Any, images: torch.Tensor, keys: Any) -> Any:
        def counting(x: torch.Tensor) -> Any:
            samples.append(len(x))
            return compute(x)

        return original(self, counting, images, keys)

    monkeypatch.setattr(Frozen, "outputs", counted)
    recipe = tiny_recipe(rgb_dataset, data={"path": str(rgb_dataset), "augment": {"crop_size": 64, "hflip": 0.5}})
    kept = train(recipe, output=tmp_path / "kept", progress=Progress())
    assert len(samples) <= 10  # five images, mirrored or not
    with pytest.raises(Interrupted):
        train(recipe, output=tmp_path / "resumed", progress=SignalAt(2))
    (broken,) = (tmp_path / "resumed").glob("*_ktda_*")
    resumed = train(recipe, output=tmp_path / "resumed", resume=broken, progress=Progress())
    assert_same_ends(RunFolder(kept.run), RunFolder(resumed.run))
    monkeypatch.setattr(ema, "KEPT_BYTES", 0)
    samples.clear()
    none = train(recipe, output=tmp_path / "none", progress=Progress())
    assert samples == [1] + [2] * 12  # six steps of two micro-steps of two crops
    losses = [[float(row["loss"]) for row in read_rows(Path(r.run) / "steps.csv")] for r in (kept, none)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
