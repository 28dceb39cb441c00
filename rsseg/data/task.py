"""The task of a recipe's data."""

from rsseg.config import DataConfig
from rsseg.data.index import SegmentationIndex
from rsseg.task import Task, task_with_bands


def open_task(data: DataConfig) -> Task:
    """Task of the prepared dataset `data.path`, restricted to `data.bands`; raises `DataError`."""
    task = SegmentationIndex.load(data.path).task
    return task if data.bands is None else task_with_bands(task, data.bands)
