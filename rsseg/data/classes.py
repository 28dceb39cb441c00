"""Brings the classes of a dataset into those of a task, by name."""

from collections.abc import Sequence

from rsseg.config import MergeConfig
from rsseg.data.index import LabelMap, SegmentationIndex
from rsseg.errors import DataError
from rsseg.task import IGNORE_INDEX, ClassInfo


def merge_classes(index: SegmentationIndex, merge: MergeConfig) -> SegmentationIndex:
    """The dataset with merged classes, in the order of `merge.into`; colours and values are those of the first member.

    Raises:
        DataError: a class of the dataset is not mentioned, or one is that it does not have; the message lists them.
    """
    by_name = {info.name: info for info in index.task.classes}
    new_name = {name: new for new, names in merge.into.items() for name in names}
    unknown = [name for name in (*new_name, *merge.ignore) if name not in by_name]
    forgotten = [name for name in by_name if name not in new_name and name not in merge.ignore]
    if unknown or forgotten:
        parts = [f"it has no {', '.join(unknown)}"] if unknown else []
        parts += [f"nothing is said of {', '.join(forgotten)}"] if forgotten else []
        raise DataError(
            f"classes of {index.root}: {' and '.join(parts)}. Name each of {', '.join(by_name)} once, "
            "in `classes.into` or in `classes.ignore`."
        )
    classes = tuple(by_name[names[0]].model_copy(update={"name": new}) for new, names in merge.into.items())
    position = {info.name: i for i, info in enumerate(classes)}
    indices = [position[new_name[name]] if name in new_name else IGNORE_INDEX for name in by_name]
    return _renumbered(index, classes, indices)


def match_classes(index: SegmentationIndex, classes: Sequence[ClassInfo], *, what: str) -> SegmentationIndex:
    """The dataset with its classes numbered as `classes` are, matched by name.

    Raises:
        DataError: either side has a class that the other lacks; the message lists them.
    """
    wanted, own = [info.name for info in classes], list(index.task.class_names)
    if wanted == own:
        return index
    lacking, extra = [name for name in wanted if name not in own], [name for name in own if name not in wanted]
    if lacking or extra:
        parts = [f"lacks {', '.join(lacking)}"] if lacking else []
        parts += [f"also has {', '.join(extra)}"] if extra else []
        raise DataError(
            f"{what}: its classes do not match the expected {', '.join(wanted)}: it {' and '.join(parts)}. "
            "Say in the recipe which become which (`classes: {into: {...}, ignore: [...]}`), or prepare it again."
        )
    return _renumbered(index, tuple(classes), [wanted.index(name) for name in own])


def _renumbered(index: SegmentationIndex, classes: tuple[ClassInfo, ...], indices: Sequence[int]) -> SegmentationIndex:
    """`indices`: new class index of each old one."""
    new = [*indices, *[IGNORE_INDEX] * (IGNORE_INDEX + 1 - len(indices))]
    label_map = LabelMap(
        values={value: new[i] for value, i in index.label_map.values.items()},
        colors=tuple((color, new[i]) for color, i in index.label_map.colors),
    )
    items = tuple(
        item
        if item.classes is None
        else item.model_copy(update={"classes": _summed(item.classes, indices, len(classes))})
        for item in index.items
    )
    task = index.task.model_copy(update={"classes": classes})
    return index.model_copy(update={"task": task, "label_map": label_map, "items": items})


def _summed(counts: Sequence[int], indices: Sequence[int], length: int) -> tuple[int, ...]:
    sums = [0] * (IGNORE_INDEX + 1)
    for count, new in zip(counts, indices, strict=True):
        sums[new] += count
    return tuple(sums[:length])
