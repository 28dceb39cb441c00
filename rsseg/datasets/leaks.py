"""Finds what two splits of a dataset share."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from rsseg.data.index import IndexItem, SegmentationIndex


class Problem(BaseModel):
    """One defect of a prepared dataset."""

    model_config = ConfigDict(frozen=True)

    file: str
    """Relative to the dataset's folder."""
    split: str
    reason: str


def find_leaks(index: SegmentationIndex) -> tuple[Problem, ...]:
    """Images, copies of images and scenes that are in more than one split; one problem for each.

    Scenes are not looked at where the split rule divides their tiles on purpose, as some published ones do.
    """
    return (*_images(index), *_copies(index), *(() if index.mixes_scenes else _scenes(index)))


def _images(index: SegmentationIndex) -> Iterator[Problem]:
    seen: dict[str, str] = {}
    for item in index.items:
        other = seen.setdefault(item.image, item.split)
        if other != item.split:
            yield _problem(item, f"the image is in {other} and in {item.split}; splits must not share images.")


def _copies(index: SegmentationIndex) -> Iterator[Problem]:
    """Files with the same content under other names; only those of equal size are read."""
    by_size: dict[int, list[tuple[IndexItem, Path]]] = defaultdict(list)
    for item in index.items:
        first = index.image_files(item)[0]
        if first.is_file():
            by_size[first.stat().st_size].append((item, first))
    for alike in by_size.values():
        if len({item.split for item, _ in alike}) < 2:
            continue
        seen: dict[bytes, IndexItem] = {}
        for item, file in alike:
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").digest()
            other = seen.setdefault(digest, item)
            if other.split != item.split and other.image != item.image:
                yield _problem(item, f"the image is the same as {other.image} in {other.split}; leave one of them out.")


def _scenes(index: SegmentationIndex) -> Iterator[Problem]:
    seen: dict[tuple[str | None, str], IndexItem] = {}
    told = set()
    for item in index.items:
        if item.scene is None:
            continue
        key = item.domain, item.scene
        other = seen.setdefault(key, item)
        if other.split != item.split and other.image != item.image and (*key, item.split) not in told:
            told.add((*key, item.split))
            yield _problem(
                item,
                f"the scene {item.scene} is in {other.split} ({other.image}) and in {item.split}; neighbouring tiles "
                "make a score too good. Divide by scene: `rsseg dataset split`.",
            )


def _problem(item: IndexItem, reason: str) -> Problem:
    return Problem(file=item.image, split=item.split, reason=reason)
