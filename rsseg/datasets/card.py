"""Description of a dataset that rsseg knows by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsseg.data.index import IndexItem, LabelMap
from rsseg.datasets.layouts import Layout
from rsseg.datasets.splits import SplitRule
from rsseg.errors import UsageError
from rsseg.task import IGNORE_INDEX, ClassInfo, Color, Task

RGB = ("red", "green", "blue")
IRRG = ("nir", "red", "green")

Keep = Callable[[Sequence[IndexItem], Mapping[str, Path]], Sequence[IndexItem]]
"""(items, files by name) -> items to use."""


@dataclass(frozen=True)
class HubSource:
    """An archive in a dataset repository of the Hugging Face hub."""

    repo: str
    file: str


@dataclass(frozen=True)
class WebSource:
    """A file on the web, with its publisher's checksum."""

    url: str
    file: str
    md5: str


@dataclass(frozen=True)
class Labels:
    """One choice of label files and their meaning."""

    name: str
    title: str
    classes: tuple[ClassInfo, ...]
    label_map: LabelMap

    def without(self, names: Sequence[str]) -> "Labels":
        """The labels with some classes ignored; raises `UsageError` for an unknown class."""
        known = [info.name for info in self.classes]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise UsageError(f"--ignore-class {unknown[0]}: there is no such class; there are {', '.join(known)}.")
        kept = [i for i, info in enumerate(self.classes) if info.name not in names]
        if not kept:
            raise UsageError("--ignore-class leaves no class.")
        index = {old: new for new, old in enumerate(kept)}
        return Labels(
            self.name,
            self.title,
            tuple(self.classes[i].model_copy(update={"value": new}) for new, i in enumerate(kept)),
            LabelMap(
                values={value: index.get(i, IGNORE_INDEX) for value, i in self.label_map.values.items()},
                colors=tuple((color, index.get(i, IGNORE_INDEX)) for color, i in self.label_map.colors),
            ),
        )


@dataclass(frozen=True)
class Variant:
    """One layout in which a dataset is distributed."""

    layout: Layout
    bands: tuple[str, ...]
    """Band names in file order."""
    labels: str | None = None
    """Name of the labels in its masks; None: of any choice."""


@dataclass(frozen=True)
class DatasetCard:
    """One dataset. `folder` and `vectors` stand for your own images, and have no variants."""

    name: str
    title: str
    size: str
    license: str
    labels: tuple[Labels, ...] = ()
    """The first is the default."""
    variants: tuple[Variant, ...] = ()
    """In order of preference."""
    rules: tuple[SplitRule, ...] = ()
    """The first is the default."""
    gsd_m: float | None = None
    ignore_zero_collar: bool = False
    color_threshold: int | None = None
    """Mask colours are rounded to 0 or 255 at this value, as the publisher requires."""
    first_mask_band: bool = False
    """Only the first band of a mask holds classes."""
    keep: Keep | None = None
    notes: str = ""
    citation: str = ""
    hub: HubSource | None = None
    web: tuple[WebSource, ...] = field(default=())

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """Classes of the default labels."""
        return self.labels[0].classes if self.labels else ()

    @property
    def bands(self) -> tuple[str, ...]:
        """Bands of the preferred layout."""
        return self.variants[0].bands if self.variants else ()

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits of the default rule."""
        return self.rules[0].splits if self.rules else ()

    def choose_labels(self, name: str | None) -> Labels:
        """Labels by name, by default the first; raises `UsageError`."""
        for labels in self.labels:
            if name in (None, labels.name):
                return labels
        raise UsageError(f"--labels {name}: {self.name} has {', '.join(labels.name for labels in self.labels)}.")

    def choose_rule(self, name: str | None) -> SplitRule:
        """Split rule by name, by default the first; raises `UsageError`."""
        for rule in self.rules:
            if name in (None, rule.name):
                return rule
        raise UsageError(f"--split {name}: {self.name} has {', '.join(rule.name for rule in self.rules)}.")

    def download_url(self) -> str | None:
        """Source of `--download`; None if there is none."""
        if self.web:
            return self.web[0].url.rpartition("/")[0]
        return None if self.hub is None else f"https://huggingface.co/datasets/{self.hub.repo}"

    def summary(self) -> dict[str, Any]:
        """Facts for JSON output."""
        return {
            "name": self.name,
            "title": self.title,
            "task": "semantic segmentation",
            "classes": [info.name for info in self.classes],
            "bands": list(self.bands),
            "splits": list(self.splits),
            "split_rules": {rule.name: rule.title for rule in self.rules},
            "labels": {labels.name: labels.title for labels in self.labels},
            "gsd_m": self.gsd_m,
            "size": self.size,
            "license": self.license,
            "download": self.download_url(),
            "citation": self.citation,
            "notes": self.notes,
        }

    def task(self) -> Task:
        """The task of the publisher's 8-bit images, without statistics; raises `UsageError` without classes."""
        if not self.classes:
            raise UsageError(f"the card {self.name!r} has no classes of its own; give a prepared dataset with --data.")
        bands = len(self.bands)
        return Task(
            name=self.name,
            classes=self.classes,
            bands=self.bands,
            scale=(1 / 255,) * bands,
            offset=(0.0,) * bands,
            gsd_m=self.gsd_m,
        )

    def row(self) -> tuple[str, ...]:
        """Name, title, classes, size, licence and source: a row of a table."""
        how = {"demo": "generated", "folder": "yours", "vectors": "yours"}.get(
            self.name, "--download" if self.download_url() else "--src only"
        )
        return (self.name, self.title, str(len(self.classes) or "any"), self.size, self.license, how)


def classes_of(*entries: tuple[str, Color]) -> tuple[ClassInfo, ...]:
    """Classes whose stored values are their indices."""
    return tuple(ClassInfo(name=name, value=i, color=color) for i, (name, color) in enumerate(entries))


def color_labels(
    name: str,
    title: str,
    entries: Sequence[tuple[str, Color]],
    *,
    ignored: Sequence[Color] = (),
    stored: Mapping[str, Color] | None = None,
) -> Labels:
    """Labels of colour-coded masks.

    Args:
        name: name of the choice.
        title: description.
        entries: classes in order, with their display colours.
        ignored: colours without a class.
        stored: mask colours that differ from the display colours.
    """
    colors = [((stored or {}).get(class_name, color), i) for i, (class_name, color) in enumerate(entries)]
    colors += [(color, IGNORE_INDEX) for color in ignored]
    return Labels(name, title, classes_of(*entries), LabelMap(colors=tuple(colors)))
