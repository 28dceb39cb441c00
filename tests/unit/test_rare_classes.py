"""Drawing images by how rare their classes are."""

from collections import Counter
from pathlib import Path

import pytest

from rsseg.data.assembly import RareClassOrder
from rsseg.data.index import SegmentationIndex
from rsseg.data.streams import StreamSpec, training_batches
from rsseg.errors import DataError
from tests.conftest import PlainRecipe, rgb_task

PIXELS = [(90, 10, 0), (100, 0, 0), (100, 0, 0), (95, 0, 5)]


def test_images_with_rare_classes_come_more_often_the_lower_the_temperature() -> None:
    def share(temperature: float) -> float:
        order = RareClassOrder(0, "source", PIXELS, temperature=temperature)
        drawn = Counter(order[k] for k in range(2000))
        return (drawn[0] + drawn[3]) / 2000

    assert share(100.0) == pytest.approx(0.83, abs=0.05)  # two of three classes, and half of the common one's images
    assert share(0.01) > 0.99


def test_order_is_a_function_of_seed_stream_and_position() -> None:
    first, second = (RareClassOrder(3, "source", PIXELS, temperature=0.5) for _ in range(2))
    assert [first[k] for k in range(50)] == [second[k] for k in reversed(range(50))][::-1]
    assert [first[k] for k in range(50)] != [RareClassOrder(4, "source", PIXELS, temperature=0.5)[k] for k in range(50)]


def test_index_without_class_counts_is_refused(rgb_dataset: Path) -> None:
    index = SegmentationIndex.load(rgb_dataset)
    items = tuple(item.model_copy(update={"classes": None}) for item in index.items)
    index.model_copy(update={"items": items}).save(rgb_dataset)
    recipe = PlainRecipe.model_validate({"name": "x", "data": {"path": rgb_dataset}})
    spec = StreamSpec("labeled", split="train", masks=True, fill=(0.0,) * 3, rare_classes=0.01)
    with pytest.raises(DataError, match="needs the class counts of the masks"):
        training_batches(recipe, [spec], rgb_task(), device="cpu", start_step=0)
