"""Batches of scenes: find them, choose their outputs, predict them here or elsewhere, keep records."""

import glob
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from rsseg.checkpoint import read_header
from rsseg.errors import RssegError, UsageError
from rsseg.files import PRODUCT_ENDING, append_line, check_outputs, is_file, is_folder, write_text
from rsseg.inference.ensemble import check_tasks
from rsseg.scene.catalog import check_catalog, check_mosaic, is_catalog, write_catalog, write_mosaic
from rsseg.scene.memory import PreparedNetwork, join_networks, prepare_model
from rsseg.scene.options import ClassArea, Outcome, Progress, SceneOptions, ScenePlan
from rsseg.scene.plan import PreparedScene, is_extension, list_outputs, prepare_scene
from rsseg.scene.predict import make_extras, predict_prepared
from rsseg.scene.share import ALONE, Share
from rsseg.scene.source import is_local, local_file, made_from, source_files
from rsseg.task import Task
from rsseg.text import read_lines

SUFFIXES = (".tif", ".tiff", ".vrt", ".jp2", ".png", ".jpg", ".jpeg", ".img")
JOURNAL = "rsseg_journal.jsonl"
"""One line per scene that was tried, beside the outputs."""
QUARANTINE = "rsseg_quarantine.txt"
"""List of the scenes that failed, each below its reason; can be given to `rsseg predict`."""


class Target(NamedTuple):
    """A scene and its class raster."""

    scene: str
    output: Path


def prepare_for(models: Sequence[Path], options: SceneOptions) -> PreparedNetwork:
    """The network of a model file, or the ensemble of several, for all outputs of the options.

    torch is imported only if the engine or an output needs it.

    Raises:
        UsageError: see `join_networks`; applicability of several models.
        RssegError: see `prepare_model` and `add_judge`.
    """
    if options.applicability and len(models) > 1:
        raise UsageError("--applicability is nearness in the features of one network. Give one --model.")
    if options.quantize != "none" and len(models) > 1:
        raise UsageError("--quantize is for one model, calibrated with its own dataset. Give one --model.")
    check_tasks([(str(model), read_header(model).task) for model in models])  # before any of them is loaded
    prepared = join_networks([(str(model), prepare_model(model, options)) for model in models], options)
    if not options.applicability:
        return prepared
    from rsseg.scene.blocks import add_judge

    return add_judge(models[0], prepared, options)


def find_scenes(names: Sequence[str]) -> list[str]:
    """Expand folders, `*` patterns and text files with a scene per line; other files and URLs are unchanged.

    Names in a text file are relative to its folder. Outputs of earlier predictions are left out.

    Raises:
        UsageError: a folder, a pattern or a list without a scene; nothing but outputs of predictions.
        DataError: a list that is not UTF-8.
    """
    found: list[str] = []
    for name in names:
        path = Path(name)
        if not is_local(name):
            inside, what = [name], ""
        elif is_folder(path):
            files = [p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != "."]
            # A broken link is reported later; a pipe or a folder is not a scene.
            inside = sorted(str(p) for p in files if p.is_file() or (p.is_symlink() and not p.exists()))
            what = f"no raster in this folder (looked for {', '.join(SUFFIXES)})"
        elif path.suffix.lower() == ".txt" and is_file(path):
            inside = [line if not is_local(line) else str(path.parent / line) for line in read_lines(path)]
            what = "no scene in this list"
        elif any(c in name for c in "*?[") and not is_file(path):
            inside = sorted(glob.glob(_pattern(path), recursive=True))  # noqa: PTH207 - patterns may be absolute
            what = "no file matches"
        else:
            inside, what = [name], ""
        if not inside:
            raise UsageError(f"{name}: {what}.")
        found += inside
    scenes = [scene for scene in dict.fromkeys(found) if not _is_output(scene)]
    if not scenes:
        raise UsageError(f"{found[0]}: an output of an earlier prediction, not a scene. Give other files.")
    return scenes


def choose_targets(
    scenes: Sequence[str],
    output: Path | None,
    part: tuple[int, int] = (1, 1),
    ids: Mapping[str, str] = MappingProxyType({}),
) -> list[Target]:
    """Outputs of scenes: `output` itself for one scene, `STEM_rsseg.tif` in the folder `output` for several.

    Args:
        scenes: as `find_scenes` returns them.
        output: file or folder; None is the current folder.
        part: number of this part, from 1, and of parts: every n-th scene, so that machines can share the work.
        ids: names of scenes that stand for their stems.

    Raises:
        UsageError: two scenes would write one file, or no such part.
    """
    number, parts = part
    if not 1 <= number <= parts:
        raise UsageError(f"--part {number}/{parts}: there is no such part. Write 1/4 for the first of four.")
    names = [f"{ids.get(scene) or Path(scene).stem}{PRODUCT_ENDING}.tif" for scene in scenes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"two scenes would be written to {twice[0]}; predict them into different folders.")
    into_folder = output is not None and (len(scenes) > 1 or is_folder(output) or output.suffix == "")
    if output is not None and not into_folder:
        return [Target(scenes[0], output)][number - 1 :]
    targets = [Target(scene, (output or Path()) / name) for scene, name in zip(scenes, names, strict=True)]
    return targets[number - 1 :: parts]


def check_targets(task: Task, targets: Sequence[Target], options: SceneOptions, inputs: Iterable[Path | str]) -> None:
    """Raise if outputs of a batch would replace one another or an input of any scene.

    Raises:
        UsageError: see above; one file is asked for that several scenes would write; a class raster is named like
            another format.
    """
    for option, name in (("--polygons", options.polygons), ("--preview", options.preview)):
        if len(targets) > 1 and name is not None and not is_extension(name):
            raise UsageError(f"{option} {name}: for several scenes give the extension only, such as {name.suffix}.")
    outputs = [pair for t in targets for pair in list_outputs(task, t.output, options)]
    read = source_files([str(name) for name in inputs] + [target.scene for target in targets])
    check_outputs(outputs, [file for name in read if (file := local_file(name))], overwrite=True)
    if wrong := [t.output for t in targets if t.output.suffix.lower() not in (".tif", ".tiff")]:
        raise UsageError(f"{wrong[0]}: --output writes a GeoTIFF. Give a name that ends in .tif, or a folder.")


class BatchFiles(NamedTuple):
    """Files about a whole batch: one map, a list of the outputs, the polygons of the map."""

    mosaic: Path | None
    catalog: Path | None
    polygons: Path | None = None
    """Only with a mosaic."""
    min_area: float = 0.0
    simplify: float = 0.0
    """See `rsseg.vector.write.write_polygons`."""

    def check(self, targets: Sequence[Target], inputs: Sequence[str], *, overwrite: bool, again: bool) -> None:
        """Raise if they cannot be written; those of an earlier call may be replaced by a later one (`again`)."""
        if self.mosaic is not None:
            check_mosaic(self.mosaic, [target.scene for target in targets])
        if self.catalog is not None:
            check_catalog(self.catalog)
        read: list[Path | str] = [*(name for name in inputs if is_local(name)), *(target.output for target in targets)]
        files = [("--mosaic", self.mosaic, made_from), ("--catalog", self.catalog, is_catalog)]
        if self.polygons is not None:
            from rsseg.vector.write import are_own, polygon_files  # vector libraries only where they are needed

            files += [("--polygons", file, are_own) for file in polygon_files(self.polygons)]
        for option, path, is_own in files:
            if path is not None:
                own = again and path.is_file() and bool(is_own(path))
                check_outputs([(option, path)], read, overwrite=overwrite or own)

    def write(self, task: Task, finished: Sequence[Outcome]) -> tuple[tuple[ClassArea, ...], list[str]]:
        """Write them from what is finished; returns the areas of the mosaic, and notes about the other files."""
        notes = []
        if self.catalog is not None:
            write_catalog(finished, self.catalog)
            notes.append(f"{self.catalog}")
        rasters = [outcome.output for outcome in finished if outcome.status != "failed"]
        if self.mosaic is None or not rasters:
            return (), notes
        areas = write_mosaic(rasters, task, self.mosaic)
        if self.polygons is not None:
            from rsseg.vector.write import write_polygons

            count = write_polygons(
                self.mosaic, task, self.polygons, min_area=self.min_area, simplify=self.simplify, overwrite=True
            )
            notes += [f"{count} polygons", f"{self.polygons}"]
        return areas, notes


class SceneJob(NamedTuple):
    """What to do with each scene of a batch.

    options: of all scenes
    inputs: further files that no output may replace: the model, scenes of other parts
    skip_existing: leave out scenes whose outputs exist and were made from the same scene, model and options
    """

    options: SceneOptions
    inputs: tuple[Path | str, ...] = ()
    skip_existing: bool = False


Execute = Callable[[Sequence[Target]], Iterator[Outcome]]
"""Predict scenes, in any order; yield the outcome of each."""


def predict_scenes(
    prepared: PreparedNetwork,
    targets: Sequence[Target],
    options: SceneOptions,
    *,
    inputs: Sequence[Path | str] = (),
    skip_existing: bool = False,
    on_plan: Callable[[ScenePlan], None] | None = None,
    progress: Callable[[Target], Progress] | None = None,
    share: Share = ALONE,
) -> Iterator[Outcome]:
    """Predict one scene after the other in this process; see `run_batch`.

    Args:
        prepared: the network.
        targets: scenes and outputs.
        options: of all scenes.
        inputs: see `SceneJob`.
        skip_existing: see `SceneJob`.
        on_plan: called before each scene.
        progress: returns the `Progress` of a scene.
        share: this process's part of every scene; only the main one has results.
    """
    job = SceneJob(options, tuple(inputs), skip_existing)

    def execute(waiting: Sequence[Target]) -> Iterator[Outcome]:
        for target in waiting:
            yield predict_target(prepared, target, job, on_plan=on_plan, progress=progress, share=share)

    return run_batch(prepared.network.task, targets, job, execute, records=share.is_main)


def run_batch(
    task: Task, targets: Sequence[Target], job: SceneJob, execute: Execute, *, records: bool = True
) -> Iterator[Outcome]:
    """Predict scenes; one that fails does not stop the rest.

    Of several scenes, the outcomes are appended to `JOURNAL` beside the outputs, and those that failed are listed in
    `QUARANTINE`, which is removed if all succeed; it keeps those of other parts of the batch.

    Args:
        task: of the model.
        targets: scenes and outputs.
        job: what to do with each.
        execute: where to do it.
        records: write journal and quarantine list.

    Raises:
        UsageError: see `check_targets`.
    """
    check_targets(task, targets, job.options, job.inputs)
    failed: dict[Target, str] = {}
    for outcome in execute(targets):
        if outcome.error is not None:
            failed[Target(outcome.scene, outcome.output)] = outcome.error
        if len(targets) > 1 and records:
            _append_to_journal(outcome)
        yield outcome
    if len(targets) > 1 and records:
        _write_quarantine(targets, failed, job.inputs)


def predict_target(
    prepared: PreparedNetwork,
    target: Target,
    job: SceneJob,
    *,
    keep_finished: bool = False,
    on_plan: Callable[[ScenePlan], None] | None = None,
    progress: Callable[[Target], Progress] | None = None,
    share: Share = ALONE,
) -> Outcome:
    """Predict one scene of a batch; no exception but those that end the process.

    Args:
        prepared: the network.
        target: scene and output.
        job: what to do.
        keep_finished: skip what is done even if the job does not ask for it.
        on_plan: called before the prediction.
        progress: returns the `Progress` of the scene.
        share: this process's part.
    """
    start = time.monotonic()
    options, skip = job.options, job.skip_existing or keep_finished
    result, skipped = None, False
    failure: Exception | None = None
    try:
        with share.of_scene(target.output, resume=options.resume):
            # An existing output is compared before it is refused.
            tolerant = options.model_copy(update={"overwrite": options.overwrite or skip})
            scene = prepare_scene(prepared, target.scene, target.output, tolerant, job.inputs)
            skipped = skip and _is_done(scene, options)
            if skipped:
                if share.is_main:
                    make_extras(scene, only_missing=True)
            else:
                if on_plan is not None:
                    on_plan(scene.describe())
                of_scene = None if progress is None else progress(target)
                result = predict_prepared(scene, progress=of_scene, share=share)
    except Exception as error:  # one bad file must not end a long batch
        failure = error
    message = None
    if failure is not None:
        message = str(failure) if isinstance(failure, RssegError) else f"{target.scene}: unexpected {failure!r}"
    return Outcome(
        scene=target.scene,
        output=target.output,
        status="skipped" if skipped and not failure else "failed" if failure else "done",
        seconds=time.monotonic() - start,
        error=message,
        result=result,
        exception=failure,
    )


def _is_done(scene: PreparedScene, options: SceneOptions) -> bool:
    """Whether all rasters exist and equal those that the prediction would write.

    Raises:
        UsageError: another file has the name of an output, and may not be replaced.
    """
    identity = scene.identity()
    same = {name for name, _ in scene.products if name.exists() and made_from(name) == identity}
    if len(same) == len(scene.products):
        return True
    if scene.output.exists() and not options.overwrite:
        raise UsageError(
            f"{scene.output}: exists already and was made from another scene, model or options, or by another program. "
            "Replace it with --overwrite."
        )
    # Rasters of a prediction that was killed before the class raster, the last one, may be replaced.
    others = [pair for pair in list_outputs(scene.network.task, scene.output, options) if pair[1] not in same]
    check_outputs(others, (), overwrite=options.overwrite)
    return False


def _is_output(name: str) -> bool:
    return is_local(name) and is_file(name) and made_from(name) is not None


def _pattern(path: Path) -> str:
    """The pattern with its literal part escaped: folders may have brackets in their names."""
    literal = Path()
    for number, part in enumerate(path.parts):
        if not (is_folder(literal / part) or is_file(literal / part)):
            return str(Path(glob.escape(str(literal)), *path.parts[number:]))
        literal /= part
    return str(path)


def _append_to_journal(outcome: Outcome) -> None:
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")} | outcome.model_dump(mode="json", exclude={"result"})
    path = outcome.output.parent / JOURNAL
    path.parent.mkdir(parents=True, exist_ok=True)
    append_line(path, json.dumps(line))


def _write_quarantine(targets: Sequence[Target], failed: Mapping[Target, str], inputs: Iterable[Path | str]) -> None:
    """Replace the list; failed scenes of other parts of the batch, which are among the inputs, stay in it."""
    path = targets[0].output.parent / QUARANTINE
    others = {_listed(name) for name in inputs} - {_listed(target.scene) for target in targets}
    before = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    lines = [line for reason, scene in pairwise(before) if scene in others for line in (reason, scene)]
    for target in targets:
        if target in failed:
            reason = " ".join(failed[target].split())
            lines += [f"# {reason}", _listed(target.scene)]
    if lines:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "\n".join(lines) + "\n")
    else:
        path.unlink(missing_ok=True)


def _listed(scene: Path | str) -> str:
    """A scene in the list, where names are relative to its folder."""
    return str(Path(scene).absolute()) if is_local(scene) else str(scene)
