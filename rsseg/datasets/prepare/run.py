"""`prepare`: from a publisher's archive, or a folder of your own, to a checked dataset with an index.

The result does not depend on its source: files are hard-linked where the disk allows it, else copied. It gets its final
name when it is complete; repeating an interrupted call resumes it.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import rsseg
from rsseg.data.index import INDEX_NAME, IndexItem, SegmentationIndex
from rsseg.data.labels import LabelTable
from rsseg.datasets.card import fetch
from rsseg.datasets.layouts import Layout, list_files
from rsseg.datasets.prepare.archives import gather, is_archive
from rsseg.datasets.prepare.finish import finish_index
from rsseg.datasets.prepare.options import PrepareOptions
from rsseg.datasets.prepare.plan import Plan, make_plan
from rsseg.datasets.prepare.tiles import Grid
from rsseg.datasets.prepare.transfer import JOURNAL, Transfer, transfer
from rsseg.datasets.prepare.vectors import (
    Drawing,
    assign_splits,
    draw_scenes,
    report_issues,
    require_scenes,
    scene_files,
    vector_inputs,
    without_labels,
    write_classes,
)
from rsseg.datasets.splits import labeled_lists
from rsseg.errors import DataError, UsageError
from rsseg.files import output_errors, require_free_disk

Progress = Callable[[str, int, int], None]
"""Called with the stage, and the numbers of finished and of all steps (0 while unknown)."""
UNPACKED = ".unpacked"
"""Below the stage: content of archives."""
REQUEST_NAME = "prepared.json"
"""File next to the index with the request, so that a repeated request is skipped."""
LISTS = "lists"
"""Below the result: lists of images."""


def prepare(name: str, options: PrepareOptions, progress: Progress) -> Path:
    """Make a prepared dataset.

    Args:
        name: name of a card, see `rsseg dataset list`.
        options: source, output and conversions.
        progress: called on this thread.

    Returns:
        The folder. Nothing is done if the same request has made it already.

    Raises:
        UsageError: unknown card, or options that contradict each other.
        DataError: the source is missing, damaged or inconsistent, or `out` exists.
        MachineError: not enough disk space.
    """
    plan = make_plan(name, options)
    out = _output_folder(plan, options)
    with output_errors(out):
        return _prepare(plan, options, out, progress)


def _prepare(plan: Plan, options: PrepareOptions, out: Path, progress: Progress) -> Path:
    source = None if plan.card.name == "demo" else _find_source(plan, options, out, progress)
    _check_apart(options, source, out)
    request = _request(plan, options, source)
    if not options.overwrite and (out / INDEX_NAME).is_file() and holds_request(out, request):
        progress(f"{out} is prepared already", 1, 1)
        return out
    with staged_folder(out, request, overwrite=options.overwrite) as stage, _errors_name(source or out, stage):
        how: Transfer | None = None
        if source is None:
            items = _generate(stage, options, progress)
        elif plan.drawing is not None:
            how, items = _draw(plan, plan.drawing, source, stage, out, options, progress)
        else:
            how, items = _collect(plan, source, stage, options, progress)
        index = finish_index(stage, plan, how, items, scale=options.scale, jobs=options.jobs, progress=progress)
        if plan.rule is not None:
            update = {"split_rule": plan.rule.name, "mixes_scenes": plan.rule.tiles}
            index = index.model_copy(update=update)
            _write_lists(stage, index, plan.rule.label_shares, options.seed)
        shutil.rmtree(stage / UNPACKED, ignore_errors=True)
        index.save(stage)
        shutil.rmtree(stage / JOURNAL, ignore_errors=True)
    return out


def unfinished(name: str, options: PrepareOptions) -> Path | None:
    """Folder in which an interrupted call of `prepare` resumes, if there is one."""
    place = partial_folder(_output_folder(make_plan(name, options), options))
    return place if place.is_dir() else None


def _output_folder(plan: Plan, options: PrepareOptions) -> Path:
    return options.out or Path("data") / plan.name


@contextmanager
def _errors_name(source: Path, stage: Path) -> Iterator[None]:
    """Name files of the source in errors, because the stage is deleted before the user reads them."""
    try:
        yield
    except DataError as error:
        raise DataError(
            str(error).replace(str(stage / UNPACKED), str(source)).replace(str(stage), str(source))
        ) from None


def _find_source(plan: Plan, options: PrepareOptions, out: Path, progress: Progress) -> Path:
    if options.src is None:
        return fetch(plan.card, out.parent, download=options.download, offline=options.offline, progress=progress)
    try:
        options.src.stat()
    except OSError as error:
        raise DataError(f"--src {options.src}: {error.strerror}.") from None
    if plan.drawing is not None and options.src.is_file() and not is_archive(options.src):
        return options.src
    if not options.src.is_dir() and not is_archive(options.src):
        raise DataError(f"--src {options.src}: neither a folder nor a zip or tar archive (or it is damaged).")
    return options.src


def _check_apart(options: PrepareOptions, source: Path | None, out: Path) -> None:
    """Raise `UsageError` if replacing `out` could delete an input, or `out` would become part of its own source."""
    inputs = [*([source] if source else []), *_own_inputs(options)]
    for place in (out.resolve(), partial_folder(out).resolve()):
        for path in inputs:
            if path.resolve() == place or place in path.resolve().parents:
                raise UsageError(f"{path} lies in --out {out}, which would be replaced. Pass another --out.")
        if source is not None and source.resolve() in place.parents:
            raise UsageError(f"--out {out} lies in --src {source}. Pass another --out.")


def _request(plan: Plan, options: PrepareOptions, source: Path | None) -> dict[str, Any]:
    """All inputs that determine the result: options, and the source's files by name, size and time."""
    asked = options.model_dump(mode="json", exclude={"out", "overwrite", "jobs", "download", "offline", "src"})
    files = [] if source is None else [source] if source.is_file() else [source / name for name in list_files(source)]
    files += _own_inputs(options)
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()]
    digest = hashlib.sha256(repr(states).encode()).hexdigest()
    request = {"dataset": plan.card.name, "options": asked, "source": source and str(source.resolve()), "files": digest}
    return request | {"made_with": rsseg.__version__}


def _own_inputs(options: PrepareOptions) -> list[Path]:
    """Files besides the source that a request names."""
    if options.vectors is not None:
        return vector_inputs(options.vectors)
    own = options.folder
    return [] if own is None else [own.classes, *own.split_lists.values()]


def _generate(stage: Path, options: PrepareOptions, progress: Progress) -> Sequence[IndexItem]:
    from rsseg.datasets.demo.dataset import write_demo

    require_free_disk(stage, 60_000_000)
    # generation takes seconds, so an interrupted call is not resumed
    for left in (path for path in stage.iterdir() if path.is_dir()):
        shutil.rmtree(left)
    return write_demo(stage, options.jobs, partial(progress, "generate tiles"))


def _collect(
    plan: Plan, source: Path, stage: Path, options: PrepareOptions, progress: Progress
) -> tuple[Transfer, Sequence[IndexItem]]:
    layouts: list[Layout] = [variant.layout for variant in plan.variants]
    found = gather(source, stage / UNPACKED, layouts, {web.file: web.md5 for web in plan.card.web}, progress)
    variant, prefix = plan.find(found, source)
    files = {name.removeprefix(prefix): path for name, path in found.items() if name.startswith(prefix)}
    items: Sequence[IndexItem] = variant.layout.items_of(files)
    if plan.card.keep is not None:
        items = plan.card.keep(items, files)
    rule = plan.rule
    if rule is not None and not rule.tiles:
        items = rule.assign(items, options.seed)
        _check_splits(plan, items)
    how = Transfer(plan, variant)
    _check_disk_space(files, items, stage, plan.grid)
    what = "cut tiles" if plan.grid is not None else "copy files"
    copied: Sequence[IndexItem] = transfer(items, files, stage, how, options.jobs, partial(progress, what))
    if rule is not None and rule.tiles:
        copied = rule.assign(copied, options.seed)
        _check_splits(plan, copied)
    return how, copied


def _draw(
    plan: Plan, drawing: Drawing, source: Path, stage: Path, out: Path, options: PrepareOptions, progress: Progress
) -> tuple[Transfer, Sequence[IndexItem]]:
    """Draw masks for all scenes, then copy or cut them as those of a folder."""
    (variant,) = plan.variants
    if source.is_file() and not is_archive(source):
        found = {source.name: source}
    else:
        found = gather(source, stage / UNPACKED, [variant.layout], {}, progress)
    assert options.vectors is not None
    files = scene_files(found, options.vectors)
    if not files:
        raise DataError(f"{source}: no raster is in this folder. Give the folder of the scenes as --src.")
    how, bands, by_tile = Transfer(plan, variant), variant.bands or None, plan.grid is not None
    items: Sequence[IndexItem] = variant.layout.items_of(files)
    items, splits = draw_scenes(drawing, items, files, stage / UNPACKED, options, bands, plan.grid, progress)
    report_issues(drawing, stage, out, strict=options.vectors.strict, progress=progress)
    rule = plan.rule
    if rule is not None and rule.name == "ratio":
        require_scenes(items, rule.splits)
        items = rule.assign(items, options.seed)
    elif rule is not None and not by_tile:
        items = assign_splits(items, options, stage, bands, splits, progress)
    _check_disk_space(files, items, stage, plan.grid)
    copied: Sequence[IndexItem] = transfer(
        items, files, stage, how, options.jobs, partial(progress, "cut tiles" if by_tile else "copy files")
    )
    if by_tile:
        table = LabelTable(how.label_map, len(plan.labels.classes))
        copied = without_labels(copied, stage, table, len(plan.labels.classes), options.jobs, progress)
        if rule is not None and rule.name != "ratio":
            copied = assign_splits(copied, options, stage, bands, splits, progress)
    if unlabeled := sum(item.mask is None for item in copied):
        progress(
            f"{unlabeled} image(s) have no labeled pixel: split 'unlabeled', or 'unused' in a scene for scoring", 1, 1
        )
    write_classes(drawing, stage, out, progress)
    return how, copied


def _check_splits(plan: Plan, items: Sequence[IndexItem]) -> None:
    if plan.rule is None:
        return
    missing = [split for split in plan.rule.splits if not any(item.split == split for item in items)]
    if missing and (not plan.subset or not items):
        raise DataError(
            f"{plan.card.name}: the split {missing[0]!r} has no images by the rule {plan.rule.name!r} "
            f"({plan.rule.title}). Get the rest of the source, pass --subset to prepare what is there, or choose "
            "another --split or --split-ratio."
        )


def _check_disk_space(files: Mapping[str, Path], items: Sequence[IndexItem], stage: Path, grid: Grid | None) -> None:
    """Raise `MachineError` if the disk is too small; tiles need about the size of their source, overlaps more."""
    names = {name for item in items for name in (*item.image.split("|"), item.mask) if name}
    repeats = 1.0 if grid is None else (grid.tile / (grid.step or grid.stride)) ** 2
    require_free_disk(stage, round(repeats * sum(files[name].stat().st_size for name in names)))


def _write_lists(stage: Path, index: SegmentationIndex, shares: Sequence[float], seed: int) -> None:
    """Write lists of labeled training images, for `items` in a recipe."""
    for share, names in labeled_lists(index.items, shares, seed).items():
        file = stage / LISTS / f"labeled-{share * 100:g}pct.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


@contextmanager
def staged_folder(out: Path, request: Mapping[str, Any], *, overwrite: bool) -> Iterator[Path]:
    """Folder `NAME.partial` beside `out`, renamed to `out` when the block ends.

    The folder stays if the block is interrupted or the process killed, and the same request resumes in it. It is
    removed by a different request, and if the block fails because of the data.

    Raises:
        DataError: `out` is not empty and `overwrite` is False, or it is not a prepared dataset.
        MachineError: `out` cannot be written, or the disk is full.
    """
    stage = partial_folder(out)
    with output_errors(out):
        _check_free(out, overwrite=overwrite)
        out.parent.mkdir(parents=True, exist_ok=True)
        if not (_is_unfinished(stage) and holds_request(stage, request)):
            _clear(stage)
            stage.mkdir()
            (stage / REQUEST_NAME).write_text(json.dumps(request, indent=1), encoding="utf-8")
        try:
            yield stage
        except DataError:
            shutil.rmtree(stage, ignore_errors=True)
            raise
        _replace(out, stage)


def _clear(stage: Path) -> None:
    """Remove the stage of another request; raises `DataError` for a folder that `prepare` did not make."""
    if not stage.exists() and not stage.is_symlink():
        return
    if stage.is_symlink() or not stage.is_dir() or (any(stage.iterdir()) and not _is_unfinished(stage)):
        raise DataError(
            f"{stage}: needed as the working folder, but it exists already. Move it, or pass another --out."
        )
    shutil.rmtree(stage)


def _is_unfinished(stage: Path) -> bool:
    """Whether the folder is the stage of an interrupted call; a finished dataset may have such a name too."""
    return (stage / REQUEST_NAME).is_file() and ((stage / JOURNAL).is_dir() or not (stage / INDEX_NAME).exists())


def partial_folder(out: Path) -> Path:
    """Folder of an unfinished dataset."""
    return out.parent / f"{out.name}.partial"


def holds_request(folder: Path, request: Mapping[str, Any]) -> bool:
    """Whether a folder was made, or started, for a request."""
    try:
        return bool(json.loads((folder / REQUEST_NAME).read_text(encoding="utf-8")) == request)
    except (OSError, ValueError):
        return False


def _check_free(out: Path, *, overwrite: bool) -> None:
    if out.is_symlink():
        raise DataError(f"{out} is a link. Pass the folder that it points to, or another --out.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise DataError(f"{out} exists already. Pass --overwrite to replace it, or another --out.")
    # --overwrite deletes the folder, which must not be some other folder given by mistake
    if not (out / INDEX_NAME).is_file():
        raise DataError(f"{out} is not a prepared dataset, so it is not replaced. Pass another --out.")


def _replace(out: Path, stage: Path) -> None:
    """Rename `stage` to `out`; an old `out` is deleted only after that."""
    if not out.exists():
        stage.rename(out)
        return
    old = stage.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    stage.rename(out)
    shutil.rmtree(old)
