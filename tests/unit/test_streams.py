"""Training streams: order, augmentation, padding, streams without masks, loader processes and ranks."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rsseg.config import BaseRecipe
from rsseg.data.dataset import CACHE_NAME
from rsseg.data.index import IndexItem, LabelMap, SegmentationIndex
from rsseg.data.sources import Datasets
from rsseg.data.streams import Batch, StreamSpec, _on_device, training_batches
from rsseg.errors import DataError, MachineError, RecipeError
from rsseg.evaluation.model import read_samples
from rsseg.task import ClassInfo
from tests.conftest import PlainRecipe, rgb_task, with_changes, write_png

FILL = (0.4, 0.5, 0.6)
LABELED = StreamSpec("labeled", "train", masks=True, fill=FILL)
UNLABELED = StreamSpec("unlabeled", "train", masks=False, fill=FILL, strong_views=2)


def batches(recipe: BaseRecipe, count: int, *specs: StreamSpec, start_step: int = 0, **ranks: int) -> list[Batch]:
    task = Datasets(recipe.data).task
    stream: Iterator[Batch] = training_batches(
        recipe, specs or (LABELED,), task, device="cpu", start_step=start_step, **ranks
    )
    return list(islice(stream, count))


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            for field in ("images", "valid", "masks", "strong", "mix"):
                x, y = getattr(a[name], field), getattr(b[name], field)
                assert (x is None) == (y is None)
                assert x is None or torch.equal(x, y), f"{name}.{field}"


@pytest.fixture
def busy_recipe(plain_recipe: PlainRecipe) -> Any:
    """Every augmentation on."""
    augment = {"scale_range": (0.5, 2.0), "crop_max_class_ratio": 0.75, "vflip": 0.5, "rot90": 0.5}
    data = plain_recipe.data.augment.model_dump() | augment | {"photometric": "mmseg"}
    return with_changes(plain_recipe, data={"augment": data}, trainer={"grad_accum_steps": 2})


def test_samples_have_the_documented_shapes_and_types(plain_recipe: PlainRecipe) -> None:
    (batch,) = batches(plain_recipe, 1, LABELED, UNLABELED)
    labeled, unlabeled = batch["labeled"], batch["unlabeled"]
    assert labeled.images.shape == (2, 3, 32, 32)
    assert labeled.images.dtype == torch.float32
    assert 0 < labeled.images.min() < labeled.images.max() <= 1
    assert labeled.masks is not None
    assert (labeled.masks.shape, labeled.masks.dtype) == ((2, 32, 32), torch.int64)
    assert labeled.strong is None
    assert unlabeled.masks is None
    assert unlabeled.strong is not None
    assert unlabeled.mix is not None
    assert unlabeled.strong.shape == (2, 2, 3, 32, 32)
    assert (unlabeled.mix.shape, unlabeled.mix.dtype) == ((2, 2, 32, 32), torch.bool)
    assert unlabeled.valid.all()


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_processes_change_nothing(busy_recipe: BaseRecipe, workers: int) -> None:
    alone = batches(busy_recipe, 5, LABELED, UNLABELED)
    shutil.rmtree(busy_recipe.data.path / CACHE_NAME)  # now several processes convert the images at once
    assert_same(alone, batches(with_changes(busy_recipe, trainer={"workers": workers}), 5, LABELED, UNLABELED))


def test_a_run_can_start_at_any_step(busy_recipe: BaseRecipe) -> None:
    whole = batches(busy_recipe, 10, LABELED, UNLABELED)
    assert_same(whole[6:], batches(busy_recipe, 4, LABELED, UNLABELED, start_step=3))


def test_cache_changes_nothing(busy_recipe: BaseRecipe) -> None:
    cached = batches(busy_recipe, 4)
    assert_same(cached, batches(with_changes(busy_recipe, data={"cache": False}), 4))


def test_other_seeds_and_streams_draw_differently(plain_recipe: PlainRecipe) -> None:
    other = plain_recipe.model_copy(update={"seed": 4})
    assert not torch.equal(*(batches(r, 1)[0]["labeled"].images for r in (plain_recipe, other)))
    again = StreamSpec("unlabeled", "train", masks=True, fill=FILL)
    (batch,) = batches(plain_recipe, 1, LABELED, again)
    assert not torch.equal(batch["labeled"].images, batch["unlabeled"].images)


def test_ranks_share_out_the_batch_of_one_process(plain_recipe: PlainRecipe) -> None:
    together = batches(with_changes(plain_recipe, trainer={"batch_size": 4}), 3)
    for rank in (0, 1):
        part = batches(plain_recipe, 3, rank=rank, world_size=2)
        for whole, share in zip(together, part, strict=True):
            assert torch.equal(whole["labeled"].images[rank::2], share["labeled"].images)


def test_every_image_comes_once_per_epoch_even_in_one_large_batch(plain_recipe: PlainRecipe) -> None:
    augment = {"crop_size": 61, "hflip": 0.0}
    recipe = with_changes(plain_recipe, data={"augment": augment}, trainer={"batch_size": 10})
    (batch,) = batches(recipe, 1)
    sizes = [tuple(int(n) for n in (v.any(1).sum(), v.any(0).sum())) for v in batch["labeled"].valid]
    expected = sorted((40 + 3 * i, min(61, 64 - 5 * i)) for i in range(5))
    assert sorted(sizes[:5]) == sorted(sizes[5:]) == expected
    assert sizes[:5] != sizes[5:]


def test_one_image_is_enough(plain_recipe: PlainRecipe) -> None:
    recipe = with_changes(plain_recipe, data={"streams": {"labeled": {"count": 1}}})
    assert all(batch["labeled"].images.shape[0] == 2 for batch in batches(recipe, 3))


def test_padding_holds_the_fill_and_is_ignored(plain_recipe: PlainRecipe) -> None:
    (batch,) = batches(with_changes(plain_recipe, data={"augment": {"crop_size": 80}}), 1)
    samples = batch["labeled"]
    assert samples.masks is not None
    assert not samples.valid[:, -1].any()
    assert (samples.masks[~samples.valid] == 255).all()
    assert (samples.masks[samples.valid] < 3).all()
    fill = torch.tensor(FILL)[:, None].expand(-1, int((~samples.valid[0]).sum()))
    assert torch.equal(samples.images[0][:, ~samples.valid[0]], fill)


def test_pixels_without_data_hold_the_fill(uint16_dataset: Path, plain_recipe: PlainRecipe) -> None:
    augment = {"crop_size": 40, "hflip": 0.0, "photometric": "fast"}
    recipe = with_changes(plain_recipe, data={"path": uint16_dataset, "bands": ("nir", "red"), "augment": augment})
    spec = StreamSpec("labeled", "train", masks=True, fill=(0.1, 0.2), strong_views=1)
    for batch in batches(recipe, 6, spec):
        samples = batch["labeled"]
        assert samples.masks is not None
        assert samples.strong is not None
        assert torch.equal(samples.valid, samples.masks != 255)
        for pixels in (samples.images, samples.strong[:, 0]):
            assert torch.equal(pixels[:, 0][~samples.valid], torch.full((int((~samples.valid).sum()),), 0.1))
        assert 0.02 < samples.images[:, 1][samples.valid].mean() < 1


def test_masks_of_a_stream_without_masks_are_never_opened(plain_recipe: PlainRecipe) -> None:
    root = plain_recipe.data.path
    expected = batches(plain_recipe, 4, UNLABELED)
    shutil.rmtree(root / CACHE_NAME)
    for file in (root / "masks").iterdir():
        file.write_bytes(b"poison")
    assert_same(expected, batches(plain_recipe, 4, UNLABELED))
    with pytest.raises(DataError, match="not an image"):
        batches(plain_recipe, 1, LABELED)


@pytest.mark.parametrize("workers", [0, 1])
def test_error_of_a_loader_process_arrives_as_it_is(plain_recipe: PlainRecipe, workers: int) -> None:
    root = plain_recipe.data.path
    for file in (root / "images").iterdir():
        file.write_bytes(b"garbage")
    with pytest.raises(DataError) as caught:
        batches(with_changes(plain_recipe, trainer={"workers": workers}), 1)
    assert "Traceback" not in str(caught.value)
    assert str(caught.value).startswith(str(root / "images"))


def test_streams_may_have_their_own_dataset_size_batch_and_augmentation(
    plain_recipe: PlainRecipe, color_mask_dataset: Path
) -> None:
    stream = {"path": color_mask_dataset, "split": "val", "augment": {"crop_size": 16, "fit": "squeeze", "hflip": 0.0}}
    recipe = with_changes(
        plain_recipe, data={"streams": {"unlabeled": stream}}, trainer={"stream_batch_sizes": {"unlabeled": 3}}
    )
    (batch,) = batches(recipe, 1, LABELED, UNLABELED)
    assert batch["labeled"].images.shape == (2, 3, 32, 32)
    assert batch["unlabeled"].images.shape == (3, 3, 16, 16)
    assert batch["unlabeled"].valid.all()


def test_datasets_with_other_classes_bands_or_without_masks_are_refused(
    plain_recipe: PlainRecipe, uint16_dataset: Path, color_mask_dataset: Path
) -> None:
    index = SegmentationIndex.load(color_mask_dataset)
    renamed = tuple(c.model_copy(update={"name": c.name.upper()}) for c in index.task.classes)
    index.model_copy(update={"task": index.task.model_copy(update={"classes": renamed})}).save(color_mask_dataset)
    other = with_changes(plain_recipe, data={"streams": {"labeled": {"path": color_mask_dataset}}})
    with pytest.raises(DataError, match=r"lacks field, .*also has FIELD"):
        batches(other, 1)
    fewer = with_changes(
        plain_recipe, data={"path": uint16_dataset, "streams": {"labeled": {"path": plain_recipe.data.path}}}
    )
    with pytest.raises(DataError, match="band 'nir'"):
        batches(fewer, 1)
    index = SegmentationIndex.load(plain_recipe.data.path)
    index.model_copy(update={"items": tuple(i.model_copy(update={"mask": None}) for i in index.items)}).save(index.root)
    with pytest.raises(DataError, match=r"5 of the 5 selected images have no mask, the first is images/00\.png"):
        batches(plain_recipe, 1)


def test_published_distortion_is_refused_for_other_images(plain_recipe: PlainRecipe, uint16_dataset: Path) -> None:
    augment = {"crop_size": 32, "photometric": "mmseg"}
    with pytest.raises(RecipeError, match="photometric: fast"):
        batches(with_changes(plain_recipe, data={"path": uint16_dataset, "augment": augment}), 1)


def test_global_random_state_is_left_alone(plain_recipe: PlainRecipe) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    batches(plain_recipe, 2)
    assert torch.equal(torch.rand(1), expected)


def test_evaluation_gives_whole_scaled_images_shared_out_by_rank(
    uint16_dataset: Path, plain_recipe: PlainRecipe
) -> None:
    recipe = with_changes(plain_recipe, data={"path": uint16_dataset})
    task = Datasets(recipe.data).task
    fill = (0.25, 0.5, 0.75, 1.0)
    source = Datasets(recipe.data).open(recipe.data.val, "val", task, masks=True)
    samples = list(read_samples(source, fill))
    assert len(samples) == 2
    names = [sample.name for sample in samples]
    assert names == ["images/05.tif", "images/06.tif"]
    sample = samples[0]
    assert sample.image.shape == (4, 55, 39)
    assert sample.image.dtype == torch.float32
    assert (sample.image[:, ~torch.tensor(sample.valid)] == torch.tensor(fill)[:, None]).all()
    assert 0.1 < sample.image[:, torch.tensor(sample.valid)].mean() < 0.9
    assert sample.mask is not None
    assert (sample.mask[~sample.valid] == 255).all()
    shares = [read_samples(source, fill, rank=r, world_size=2) for r in (0, 1)]
    assert [s.name for share in shares for s in share] == names
    (uint16_dataset / "masks" / "05.tif").unlink()
    bare = next(read_samples(source, fill, masks=False))
    assert bare.mask is None


def test_crops_of_scaled_images_are_redrawn_while_one_class_fills_them(plain_recipe: PlainRecipe) -> None:
    root = plain_recipe.data.path
    halves = np.repeat(np.array([0, 1], np.uint8), 32)[None].repeat(64, 0)
    for file in (root / "images").iterdir():
        write_png(file, np.zeros((64, 64, 3), np.uint8))
        write_png(root / "masks" / file.name, halves)
    augment = {"crop_size": 32, "resampling": "pillow", "crop_max_class_ratio": 0.75}
    for batch in batches(with_changes(plain_recipe, data={"augment": augment}), 10, LABELED):
        assert batch["labeled"].masks is not None
        for mask in batch["labeled"].masks:
            assert mask.flatten().bincount().max() <= 0.75 * 32 * 32


def test_squeezed_target_shows_the_whole_image(plain_recipe: PlainRecipe) -> None:
    root = plain_recipe.data.path
    for file in (root / "images").iterdir():
        ramp: NDArray[np.uint8] = np.linspace(0, 255, 50).astype(np.uint8)
        write_png(file, np.broadcast_to(ramp[None, :, None], (30, 50, 3)).copy())
    recipe = with_changes(plain_recipe, data={"augment": {"crop_size": 16, "fit": "squeeze", "hflip": 0.0}})
    (batch,) = batches(recipe, 1, UNLABELED)
    row = batch["unlabeled"].images[0, 0, 0]
    assert row[0] < 0.05
    assert row[-1] > 0.95


def test_real_landsat_patches_with_eight_bands_are_scaled(shared_data: Path, tmp_path: Path) -> None:
    files = sorted((shared_data / "l8biome_cloud" / "train" / "images").glob("*.tif"))[:3]
    bands = tuple(f"b{i}" for i in range(1, 9))
    task = rgb_task().model_copy(
        update={"bands": bands, "dtype": "float32", "scale": (1.0,) * 7 + (1e-4,), "offset": (0.0,) * 8}
    )
    classes = tuple(ClassInfo(name=f"c{i}", value=i, color=(i, 0, 0)) for i in range(4))
    items = tuple(
        IndexItem(image=str(f), mask=str(f.parents[1] / "masks" / f"{f.stem}.png"), split="train") for f in files
    )
    task = task.model_copy(update={"classes": classes})
    SegmentationIndex(task=task, label_map=LabelMap(values={i: i for i in range(4)}), items=items).save(tmp_path)
    recipe = PlainRecipe.model_validate(
        {
            "name": "landsat",
            "data": {"path": tmp_path, "augment": {"crop_size": 200, "scale_range": (0.5, 2.0), "photometric": "fast"}},
            "trainer": {"batch_size": 2, "workers": 0},
        }
    )
    spec = StreamSpec("labeled", "train", masks=True, fill=(0.0,) * 8, strong_views=1)
    samples = batches(recipe, 1, spec)[0]["labeled"]
    assert samples.images.shape == (2, 8, 200, 200)
    assert samples.strong is not None
    assert samples.images.isfinite().all()
    assert samples.images.abs().max() < 5


def test_loader_processes_do_not_import_networks() -> None:
    code = "import sys, rsseg.data.streams; sys.exit(', '.join({'timm', 'torchvision'} & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_signal_of_a_lost_loader_process_arrives_before_its_error() -> None:
    """The connection breaks first; the handler of the signal would interrupt whoever reports the error."""

    def handler(*_: Any) -> None:
        raise RuntimeError("DataLoader worker is killed")

    def loader() -> Iterator[Any]:
        nonlocal worker
        worker = subprocess.Popen(["sleep", "0.2"])
        raise ConnectionResetError(104, "Connection reset by peer")
        yield

    worker: Any = None
    before = signal.signal(signal.SIGCHLD, handler)
    try:
        with pytest.raises(MachineError, match="choose fewer loader workers"):
            list(_on_device(loader(), {}))  # type: ignore[arg-type]
        time.sleep(0.5)
    finally:
        signal.signal(signal.SIGCHLD, before)
        worker.wait()
