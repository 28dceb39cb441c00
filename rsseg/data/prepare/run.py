"""`prepare`: from a publisher's archive, or anyone's folder, to a checked dataset with an index.

The result stands on its own: files are hard-linked from the source where the disk allows it and copied where not, never
referenced. It appears under its name only when it is complete.
"""

import difflib
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rsseg.data.cards import CARDS, DatasetCard
from rsseg.data.index import INDEX_NAME, IndexItem
from rsseg.data.layouts import Layout, find_root
from rsseg.data.measure import in_order
from rsseg.data.prepare.archives import is_archive, unpack
from rsseg.data.prepare.classes import ClassFile, load_classes
from rsseg.data.prepare.finish import Subject, finish_index
from rsseg.data.prepare.options import FolderOptions, PrepareOptions
from rsseg.data.prepare.place import cut_item, place_item
from rsseg.data.prepare.stage import require_free_disk, staged_folder
from rsseg.errors import DataError, UsageError

Progress = Callable[[str, int, int], None]
"""What is done, how many of how many; 0 of the latter while it is not known."""
REQUEST_NAME = "prepared.json"
"""Beside the index: what was asked for, so that asking again costs nothing."""
UNPACKED = ".unpacked"
"""Below the stage: what came out of an archive."""


def prepare(name: str, options: PrepareOptions, progress: Progress) -> Path:
    """Make a prepared dataset.

    Args:
        name: of a card, see `rsseg dataset list`.
        options: where from, where to, how.
        progress: called on this thread.

    Returns:
        The folder. If it holds already what the same request would make, nothing is done.

    Raises:
        UsageError: unknown card, or options that do not fit together.
        DataError: the source is missing, damaged or contradicts itself, or `out` exists.
        MachineError: the disk is too small.
    """
    card = find_card(name)
    classes = _check_usage(card, options)
    out = options.out or Path("data") / (classes.name if classes else card.name)
    source = None if card.name == "demo" else _find_source(card, options, progress)
    _check_apart(source, out)
    request = _request(card, options, source)
    if not options.overwrite and _is_done(out, request):
        progress(f"{out} is prepared already", 1, 1)
        return out
    with staged_folder(out, overwrite=options.overwrite) as stage, _errors_name(source or out, stage):
        subject, items = (
            _generate(card, stage, options, progress)
            if source is None
            else _collect(card, classes, source, stage, options, progress)
        )
        index = finish_index(stage, subject, items, scale=options.scale, jobs=options.jobs, progress=progress)
        index.save(stage)
        (stage / REQUEST_NAME).write_text(json.dumps(request, indent=1), encoding="utf-8")
    return out


@contextmanager
def _errors_name(source: Path, stage: Path) -> Iterator[None]:
    """Let errors name files where they come from: the stage is gone when the user reads the message."""
    try:
        yield
    except DataError as error:
        raise DataError(
            str(error).replace(str(stage / UNPACKED), str(source)).replace(str(stage), str(source))
        ) from None


def find_card(name: str) -> DatasetCard:
    """The card of a name; raises `UsageError` with the nearest one."""
    if name not in CARDS:
        nearest = difflib.get_close_matches(name, CARDS, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(CARDS)}."
        raise UsageError(f"there is no dataset {name!r}; {hint} Your own images go by the name `folder`.")
    return CARDS[name]


def _check_usage(card: DatasetCard, options: PrepareOptions) -> ClassFile | None:
    """The class file of `folder`."""
    if card.name == "folder":
        if options.folder is None or options.src is None:
            raise UsageError("`folder` needs --src DIR, --classes FILE and --images PATTERN.")
        return load_classes(options.folder.classes)
    if options.folder is not None:
        raise UsageError(f"--classes, --images, --masks and --split... are for `folder`; {card.name} knows its own.")
    if card.name == "demo" and (options.src is not None or options.tile is not None):
        raise UsageError("`demo` is generated; it takes neither --src nor --tile.")
    return None


def _find_source(card: DatasetCard, options: PrepareOptions, progress: Progress) -> Path:
    """The folder that the card's layout fits, or an archive."""
    if options.src is None:
        from rsseg.data.prepare.hub import fetch

        return fetch(card, download=options.download, offline=options.offline, progress=progress)
    if not options.src.exists():
        raise DataError(f"--src {options.src}: there is no such file or folder.")
    if not options.src.is_dir() and not is_archive(options.src):
        raise DataError(f"--src {options.src}: neither a folder nor a zip or tar archive (or it is damaged).")
    return find_root(options.src, card.layout) if card.layout and options.src.is_dir() else options.src


def _check_apart(source: Path | None, out: Path) -> None:
    """Replacing `out` must not delete the source, nor may a prepared dataset become part of its own source."""
    if source is None:
        return
    inside, outside = source.resolve(), out.resolve()
    if inside == outside or outside in inside.parents or inside in outside.parents:
        raise UsageError(f"--out {out} and --src {source} lie in one another. Pass an --out elsewhere.")


def _request(card: DatasetCard, options: PrepareOptions, source: Path | None) -> dict[str, Any]:
    """All that decides the result: options, and the source's files by name, size and time."""
    asked = options.model_dump(mode="json", exclude={"out", "overwrite", "jobs", "download", "offline", "src"})
    files = [] if source is None else [source] if source.is_file() else sorted(source.rglob("*"))
    if options.folder is not None:
        files += [options.folder.classes, *options.folder.split_lists.values()]
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()]
    digest = hashlib.sha256(repr(states).encode()).hexdigest()
    made_with = importlib.metadata.version("rsseg")
    request = {"dataset": card.name, "options": asked, "source": source and str(source.resolve()), "files": digest}
    return request | {"made_with": made_with}


def _is_done(out: Path, request: dict[str, Any]) -> bool:
    file = out / REQUEST_NAME
    try:
        return (out / INDEX_NAME).is_file() and json.loads(file.read_text(encoding="utf-8")) == request
    except (OSError, ValueError):
        return False


def _generate(
    card: DatasetCard, stage: Path, options: PrepareOptions, progress: Progress
) -> tuple[Subject, Sequence[IndexItem]]:
    from rsseg.data.prepare.demo import write_demo

    require_free_disk(stage, 60_000_000)
    return _subject(card, None, options), write_demo(stage, options.jobs, partial(progress, "generate tiles"))


def _collect(
    card: DatasetCard,
    classes: ClassFile | None,
    source: Path,
    stage: Path,
    options: PrepareOptions,
    progress: Progress,
) -> tuple[Subject, Sequence[IndexItem]]:
    """Bring the files into `stage`."""
    root, unpacked = source, stage / UNPACKED
    layout = card.layout or _layout(_required(options.folder))
    if source.is_file():
        unpacked.mkdir()
        unpack(source, unpacked, partial(progress, f"unpack {source.name}"))
        root = find_root(unpacked, layout)
    items = layout.items(root)
    _check_splits(card, items)
    _check_room(root, items, stage, options)

    def bring(item: IndexItem) -> list[IndexItem]:
        if options.tile is None:
            return place_item(item, root, stage)
        return cut_item(item, root, stage, tile=options.tile, stride=options.stride or options.tile)

    what = "copy files" if options.tile is None else "cut tiles"
    brought = list(in_order(bring, items, options.jobs, partial(progress, what)))
    shutil.rmtree(unpacked, ignore_errors=True)
    return _subject(card, classes, options), [item for several in brought for item in several]


def _required(folder: FolderOptions | None) -> FolderOptions:
    if folder is None:
        raise UsageError("`folder` needs --src DIR, --classes FILE and --images PATTERN.")
    return folder


def _layout(options: FolderOptions) -> Layout:
    return Layout(
        images=options.images,
        masks=options.masks,
        unlabeled=options.unlabeled,
        split_as=options.split_as,
        split_lists={target: _lines(path) for target, path in options.split_lists.items()},
        split_ratio=options.split_ratio,
        seed=options.seed,
    )


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"split list {path}: cannot be read ({error}).") from None
    if not any(lines):
        raise DataError(f"split list {path}: the list is empty.")
    return [line for line in lines if line and not line.startswith("#")]


def _check_splits(card: DatasetCard, items: Sequence[IndexItem]) -> None:
    missing = [split for split in card.splits if not any(item.split == split for item in items)]
    if missing:
        raise DataError(
            f"{card.name}: the split {missing[0]!r} has no images. The archive is not complete; get it again."
        )


def _check_room(root: Path, items: Sequence[IndexItem], stage: Path, options: PrepareOptions) -> None:
    """Compressed tiles take about as much as their compressed source, more where they overlap."""
    names = {name for item in items for name in (*item.image.split("|"), item.mask) if name}
    repeats = 1.0 if options.tile is None else (options.tile / (options.stride or options.tile)) ** 2
    require_free_disk(stage, round(repeats * sum((root / name).stat().st_size for name in names)))


def _subject(card: DatasetCard, classes: ClassFile | None, options: PrepareOptions) -> Subject:
    if classes is not None:
        return Subject(
            name=classes.name,
            classes=classes.class_infos(),
            label_map=classes.label_map(),
            bands=options.bands or classes.bands,
            gsd_m=classes.gsd_m,
            nodata=classes.nodata,
            ignore_zero_collar=classes.ignore_zero_collar,
        )
    if card.label_map is None:
        raise UsageError(f"{card.name} has no classes of its own.")
    return Subject(card.name, card.classes, card.label_map, options.bands or card.bands, gsd_m=card.gsd_m)
