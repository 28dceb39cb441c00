"""The index of a prepared dataset: a JSON file that lists images, masks and splits and defines the labels."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rsseg.config import MergeConfig
from rsseg.errors import DataError
from rsseg.files import write_json
from rsseg.task import IGNORE_INDEX, ClassInfo, Color, Task

INDEX_NAME = "rsseg-index.json"


class LabelMap(BaseModel):
    """Meaning of mask pixels. A value or colour that is not listed is an error, never silently ignored.

    Exactly one of the two tables is filled: `values` for single-band masks, `colors` for colour-coded ones.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    values: Mapping[int, Annotated[int, Field(ge=0, le=255)]] = {}
    """Raw pixel value -> class index, or 255 to ignore."""
    colors: tuple[tuple[Color, Annotated[int, Field(ge=0, le=255)]], ...] = ()
    """(red, green, blue) -> class index, or 255 to ignore."""


class IndexItem(BaseModel):
    """One image of a dataset; paths are relative to the index's folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str
    """A file, or several single-band files joined by `|` in band order."""
    mask: str | None = None
    split: str
    domain: str | None = None
    scene: str | None = None
    """The scene that it is part of: images of one scene belong in one split. None: a scene of its own."""
    origin: tuple[int, int] | None = None
    """Row and column in that scene, if it was cut from it."""
    classes: tuple[int, ...] | None = None
    """Pixels per class index in the mask, counted when the dataset was prepared; None if there is no mask."""


class SegmentationIndex(BaseModel):
    """A prepared dataset. The task's bands are the bands of the files, in file order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Annotated[int, Field(ge=1, le=1)] = 1
    task: Task
    label_map: LabelMap
    ignore_zero_collar: bool = False
    """Pixels that are 0 in every band have no data."""
    nodata: float | None = None
    """Value without data in every band, instead of what the files declare; NaN is added to it."""
    split_rule: str = ""
    """Name of the rule that assigned the splits."""
    mixes_scenes: bool = False
    """The published rule distributes the tiles of a scene over several splits."""
    source_features: Mapping[str, int] = {}
    """Class -> features of the vector file that the masks were drawn from; empty for other datasets."""
    items: tuple[IndexItem, ...]
    root: Path = Field(default=Path(), exclude=True)
    """Folder of the index; set by `load`."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the index of a prepared folder, or the JSON file itself. Raises `DataError`."""
        file = path / INDEX_NAME if path.is_dir() else path
        if not file.is_file():
            raise DataError(
                f"{path}: no prepared dataset here (no {INDEX_NAME}). Make one with "
                f"`rsseg dataset prepare NAME --out {path}`; `rsseg dataset list` shows the names."
            )
        try:
            index = cls.model_validate_json(file.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise DataError(f"{file}: {where}: {first['msg']}. Prepare the dataset again.") from None
        return index.model_copy(update={"root": file.parent})

    def save(self, path: Path) -> Path:
        """Write the index into a folder, or a JSON file, replacing an old one; returns it. Raises `MachineError`."""
        file = path if path.is_file() else path / INDEX_NAME
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, self.model_dump(mode="json"))
        return file

    def image_files(self, item: IndexItem) -> tuple[Path, ...]:
        """Absolute path of the image, or one per band."""
        return tuple(self.root / part for part in item.image.split("|"))

    def mask_file(self, item: IndexItem) -> Path | None:
        """Absolute path of the mask."""
        return None if item.mask is None else self.root / item.mask

    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in order of appearance."""
        return tuple(dict.fromkeys(item.split for item in self.items))


def is_dataset(path: Path) -> bool:
    """Whether a path is a prepared dataset, or a JSON file that would have to be the index of one."""
    return path.suffix == ".json" or (path / INDEX_NAME).is_file()


def digest_of(items: Iterable[IndexItem]) -> str:
    """SHA-256 over the image names of a split, for the manifest."""
    return hashlib.sha256("\n".join(item.image for item in items).encode()).hexdigest()


def merge_classes(index: SegmentationIndex, merge: MergeConfig) -> SegmentationIndex:
    """Merge classes, in the order of `merge.into`; each takes colour and value of its first member.

    Raises:
        DataError: `merge` leaves out a class of the dataset, or names one that it does not have.
    """
    by_name = {info.name: info for info in index.task.classes}
    new_name = {name: new for new, names in merge.into.items() for name in names}
    unknown = [name for name in (*new_name, *merge.ignore) if name not in by_name]
    forgotten = [name for name in by_name if name not in new_name and name not in merge.ignore]
    if unknown or forgotten:
        parts = [f"it has no {', '.join(unknown)}"] if unknown else []
        parts += [f"the merge leaves out {', '.join(forgotten)}"] if forgotten else []
        raise DataError(
            f"classes of {index.root}: {' and '.join(parts)}. Name each of {', '.join(by_name)} once, "
            "in `classes.into` or in `classes.ignore`."
        )
    classes = tuple(by_name[names[0]].model_copy(update={"name": new}) for new, names in merge.into.items())
    position = {info.name: i for i, info in enumerate(classes)}
    indices = [position[new_name[name]] if name in new_name else IGNORE_INDEX for name in by_name]
    return _renumbered(index, classes, indices)


def match_classes(index: SegmentationIndex, classes: Sequence[ClassInfo], *, what: str) -> SegmentationIndex:
    """Renumber the classes in the order of `classes`, matched by name.

    Raises:
        DataError: either side has a class that the other lacks.
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
            "Map them in the recipe (`classes: {into: {...}, ignore: [...]}`), or prepare the dataset again."
        )
    return _renumbered(index, tuple(classes), [wanted.index(name) for name in own])


def _renumbered(index: SegmentationIndex, classes: tuple[ClassInfo, ...], indices: Sequence[int]) -> SegmentationIndex:
    """Apply `indices`, the new class index of each old one."""
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
