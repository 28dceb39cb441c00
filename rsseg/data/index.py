"""The index of a prepared dataset: one readable JSON file with images, masks, splits and the meaning of labels."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rsseg.errors import DataError
from rsseg.task import Color, Task

INDEX_NAME = "rsseg-index.json"


class LabelMap(BaseModel):
    """What mask pixels mean. Every value or colour that is not listed is an error, never silently ignored.

    Exactly one of the two tables is used: `values` for single-band masks, `colors` for colour-coded ones.
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
    """What it was cut from, or is part of: images of one scene belong into one split. None: a scene of its own."""
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
    """Treat pixels that are 0 in every band as having no data."""
    nodata: float | None = None
    """Value that means no data in every band, where the files do not declare one."""
    split_rule: str = ""
    """Name of the rule that divided the images."""
    mixes_scenes: bool = False
    """The rule divides the tiles of a scene among splits, as it was published."""
    items: tuple[IndexItem, ...]
    root: Path = Field(default=Path(), exclude=True)
    """Folder of the index; set by `load`."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the index of a prepared folder (or the JSON file itself); raises `DataError` saying how to make one."""
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

    def save(self, folder: Path) -> Path:
        """Write the index into `folder` under a temporary name, then rename; returns the file."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / INDEX_NAME
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.model_dump(mode="json"), indent=1), encoding="utf-8")
        temporary.replace(file)
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


def digest_of(items: Iterable[IndexItem]) -> str:
    """SHA-256 over the image names of a split, for the manifest."""
    return hashlib.sha256("\n".join(item.image for item in items).encode()).hexdigest()
