"""Drawing images by how rare their classes are."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rsseg.data.assembly import RareClassOrder
from rsseg.data.index import IndexItem, LabelMap, SegmentationIndex
from rsseg.data.streams import StreamSpec, training_batches
from rsseg.errors import DataError
from tests.conftest import PlainRecipe, rgb_task, write_png

PIXELS = [(90, 10, 0), (100, 0, 0), (100, 0, 0), (95, 0, 5)]


def test_images_with_rare_classes_come_more_often_the_lower_the_temperature() -> None:
    def share(temperature: float) -> float:
        order = RareClassOrder(0, "source", PIXELS, temperature=temperature)
        drawn = Counter(order.draw(k)[0] for k in range(2000))
        return (drawn[0] + drawn[3]) / 2000

    assert share(100.0) == pytest.approx(0.83, abs=0.05)  # two of three classes, and half of the common one's images
    assert share(0.01) > 0.99


def test_order_is_a_function_of_seed_stream_and_position() -> None:
    first, second = (RareClassOrder(3, "source", PIXELS, temperature=0.5) for _ in range(2))
    assert [first.draw(k)[0] for k in range(50)] == [second.draw(k)[0] for k in reversed(range(50))][::-1]
    assert [first.draw(k)[0] for k in range(50)] != [
        RareClassOrder(4, "source", PIXELS, temperature=0.5).draw(k)[0] for k in range(50)
    ]


def test_index_without_class_counts_is_refused(rgb_dataset: Path) -> None:
    index = SegmentationIndex.load(rgb_dataset)
    items = tuple(item.model_copy(update={"classes": None}) for item in index.items)
    index.model_copy(update={"items": items}).save(rgb_dataset)
    recipe = PlainRecipe.model_validate({"name": "x", "data": {"path": rgb_dataset, "rare_class_sampling": 0.01}})
    spec = StreamSpec("labeled", split="train", masks=True, fill=(0.0,) * 3)
    with pytest.raises(DataError, match="needs the class counts of the masks"):
        training_batches(recipe, [spec], rgb_task(), device="cpu", start_step=0)


def test_labeled_streams_of_every_method_can_draw_images_and_crops_that_show_rare_classes(tmp_path: Path) -> None:
    items = []
    for number in range(4):  # one of four images shows the rare class, in a corner
        mask = np.zeros((64, 64), np.uint8)
        mask[:12, :12] = 2 * (number == 3)
        write_png(tmp_path / f"{number}.png", mask)
        write_png(tmp_path / f"image{number}.png", np.full((64, 64, 3), 100, np.uint8))
        counts = tuple(np.bincount(mask.ravel(), minlength=3).tolist())
        items.append(IndexItem(image=f"image{number}.png", mask=f"{number}.png", split="train", classes=counts))
    label_map = LabelMap(values={0: 0, 1: 1, 2: 2})
    SegmentationIndex(task=rgb_task(), label_map=label_map, items=tuple(items)).save(tmp_path)

    def crops_with_the_rare_class(temperature: float | None) -> int:
        data = {"path": tmp_path, "augment": {"crop_size": 16}, "rare_class_sampling": temperature, "cache": False}
        recipe = PlainRecipe.model_validate({"name": "x", "data": data, "trainer": {"batch_size": 40, "workers": 0}})
        spec = StreamSpec("labeled", "train", masks=True, fill=(0.0,) * 3)
        masks = next(training_batches(recipe, [spec], rgb_task(), device="cpu", start_step=0))["labeled"].masks
        return int((masks == 2).flatten(1).any(1).sum())

    assert crops_with_the_rare_class(None) <= 3
    assert crops_with_the_rare_class(0.01) >= 10


def test_class_that_an_image_was_drawn_for_is_in_it() -> None:
    order = RareClassOrder(0, "source", PIXELS, temperature=0.5)
    drawn = [order.draw(k) for k in range(50)]
    assert [item for item, _ in drawn] == [order.draw(k)[0] for k in range(50)]
    assert all(PIXELS[item][k] > 0 for item, k in drawn)
