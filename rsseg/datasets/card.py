"""A dataset that rsseg knows by name: its description, and the download of its archives with consent of the user."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rsseg.data.index import IndexItem, LabelMap
from rsseg.datasets.layouts import Layout
from rsseg.datasets.prepare.archives import md5_of
from rsseg.datasets.splits import SplitRule
from rsseg.errors import DataError, MachineError, UsageError
from rsseg.task import IGNORE_INDEX, ClassInfo, Color, Task

RGB = ("red", "green", "blue")
IRRG = ("nir", "red", "green")

Keep = Callable[[Sequence[IndexItem], Mapping[str, Path]], Sequence[IndexItem]]
"""(items, files by name) -> items to use."""
Progress = Callable[[str, int, int], None]
_DISK_FULL = (28, 122)


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


def fetch(card: DatasetCard, folder: Path, *, download: bool, offline: bool, progress: Progress) -> Path:
    """The card's archive in the hub's cache, or the folder with its archives from the web; downloaded if missing.

    Args:
        card: a dataset with archives on the hub or the web.
        folder: archives from the web go to `NAME-download` below it.
        download: the user agreed to the download.
        offline: take it from the cache or fail.
        progress: called with name, size and licence before the download starts, then with megabytes.

    Raises:
        DataError: no consent, no network, or no such archive.
        MachineError: the disk is full.
    """
    if card.web:
        return fetch_web(card, folder / f"{card.name}-download", download=download, offline=offline, progress=progress)
    hub = card.hub
    if hub is None:
        raise UsageError(f"{card.name}: rsseg cannot download this dataset. Get it from its publisher and pass --src.")
    what = f"{hub.file} ({card.size}, licence {card.license}) from huggingface.co/datasets/{hub.repo}"
    by_hand = f"or get the file yourself and pass it with --src {hub.file}"
    if not download:
        raise DataError(f"{card.name}: not here yet. Pass --download to fetch {what}, {by_hand}.")

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    progress(f"fetch {what}", 0, 1)
    bar = _bar(f"fetch {hub.file} (MB)", progress)
    try:
        path = hf_hub_download(hub.repo, hub.file, repo_type="dataset", local_files_only=offline, tqdm_class=bar)
    except LocalEntryNotFoundError:
        reason = "rsseg is offline" if offline else "the hub cannot be reached"
        raise DataError(f"{card.name}: {reason}. Try again with a network, {by_hand}.") from None
    except _failures() as error:
        raise _failure(card, what, error, by_hand) from None
    return Path(path)


def fetch_web(card: DatasetCard, folder: Path, *, download: bool, offline: bool, progress: Progress) -> Path:
    """The folder with the card's archives; missing ones are downloaded, partial ones resumed.

    Raises:
        DataError: no consent, no network, or a file that does not have its publisher's checksum.
        MachineError: the disk is full.
    """
    missing = [web for web in card.web if not (folder / web.file).is_file()]
    if not missing:
        return folder
    names = ", ".join(web.file for web in card.web)
    what = f"{names} (licence {card.license}) from {card.download_url()}"
    by_hand = "or get the files yourself and pass their folder with --src"
    if not download:
        raise DataError(f"{card.name}: not here yet. Pass --download to fetch {what}, {by_hand}.")
    if offline:
        raise DataError(f"{card.name}: rsseg is offline. Try again with a network, {by_hand}.")
    progress(f"fetch {what}", 0, 1)
    for web in missing:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _fetch_file(web, folder, progress)
        except _failures() as error:
            raise _failure(card, web.file, error, by_hand) from None
    return folder


def _fetch_file(web: WebSource, folder: Path, progress: Progress) -> None:
    """Download a file under a temporary name, check it, rename it; a partial file is resumed, never deleted."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get

    partial = folder / f"{web.file}.partial"
    bar = _bar(f"fetch {web.file} (MB)", progress)
    with partial.open("ab") as file:
        try:
            http_get(web.url, file, resume_size=file.tell(), displayed_filename=web.file, tqdm_class=bar)
        except HfHubHTTPError as error:
            # The file is complete: an earlier call was stopped before the check.
            if error.response.status_code != 416:
                raise
    found = md5_of(partial)
    if found != web.md5:
        partial.unlink()
        raise DataError(f"{web.url}: the file has the MD5 {found}, its publisher states {web.md5}. Try again.")
    partial.replace(folder / web.file)


def _failures() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import HfHubHTTPError

    # its first base is the HTTP client's own error, which is raised where no answer came
    return HfHubHTTPError.__mro__[1], OSError


def _failure(card: DatasetCard, what: str, error: Exception, by_hand: str) -> DataError | MachineError:
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return MachineError(f"{card.name}: the disk is full. Free some space and repeat the command to resume.")
    return DataError(f"{card.name}: fetching {what} failed: {error}. Repeat the command to resume, {by_hand}.")


def _bar(title: str, progress: Progress) -> type[tqdm]:  # type: ignore[type-arg]
    """A tqdm class that prints nothing and reports megabytes to `progress`."""

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *_: Any, total: float | None = None, initial: float = 0, **__: Any) -> None:
            super().__init__(disable=True)
            self.total, self.n = total, initial

        def update(self, n: float | None = 1) -> bool | None:
            self.n += n or 0
            progress(title, int(self.n) >> 20, int(self.total or 0) >> 20)
            return None

    return Bar
