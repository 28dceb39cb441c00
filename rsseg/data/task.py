"""The task of a recipe's data."""

from rsseg.config import DataConfig
from rsseg.data.classes import merge_classes
from rsseg.data.index import SegmentationIndex
from rsseg.task import Task, task_with_bands


def open_task(data: DataConfig) -> Task:
    """Task of the prepared dataset `data.path` with `data.classes` merged, restricted to `data.bands`.

    Raises `DataError`.
    """
    index = SegmentationIndex.load(data.path)
    task = (index if data.classes is None else merge_classes(index, data.classes)).task
    return task if data.bands is None else task_with_bands(task, data.bands)
