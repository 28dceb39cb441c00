"""Tasks that differ in nothing but their bands."""

from rsseg.task import ClassInfo, Task


def task_of(*bands: str, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None) -> Task:
    return Task(
        name="bands",
        classes=(ClassInfo(name="any", value=0, color=(0, 0, 0)),),
        bands=bands,
        scale=(1 / 255,) * len(bands),
        offset=(0.0,) * len(bands),
        mean=mean,
        std=std,
    )
