"""Many scenes: which ones, where their outputs go, what is done already, and what became of each."""

import glob
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import rasterio
from pydantic import BaseModel, ConfigDict
from rasterio.errors import RasterioError

from rsseg.errors import RssegError, UsageError
from rsseg.scene.identity import TAG
from rsseg.scene.options import Progress, SceneOptions, ScenePlan, SceneResult
from rsseg.scene.plan import Ready, Setup, settle
from rsseg.scene.predict import identity_of, run
from rsseg.scene.share import ALONE, Share

SUFFIXES = (".tif", ".tiff", ".vrt", ".jp2", ".png", ".jpg", ".jpeg", ".img")
JOURNAL = "rsseg_journal.jsonl"
"""One line per scene that was tried, beside the outputs."""


class Target(NamedTuple):
    """A scene and the class raster to make from it."""

    scene: str
    output: Path


class Outcome(BaseModel):
    """What became of a scene."""

    model_config = ConfigDict(frozen=True)

    scene: str
    output: Path
    status: Literal["done", "skipped", "failed"]
    """`skipped`: the output was there, made from the same scene, model and options."""
    seconds: float
    error: str | None = None
    result: SceneResult | None = None

    @classmethod
    def of(cls, target: Target, result: SceneResult) -> "Outcome":
        """Of a scene that is done."""
        return cls(scene=target.scene, output=target.output, status="done", seconds=result.seconds, result=result)


def find_scenes(names: Sequence[str]) -> list[str]:
    """Files and URLs as they are, folders as the rasters in them, `*` patterns, and text files with a scene per line.

    Names in a text file count from its folder.

    Raises:
        UsageError: a folder, a pattern or a list without a scene.
    """
    found: list[str] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = sorted(str(p) for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != ".")
            what = f"no raster in this folder (looked for {', '.join(SUFFIXES)})"
        elif path.suffix.lower() == ".txt" and path.is_file():
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
            inside = [_from(path.parent, line) for line in lines if line and not line.startswith("#")]
            what = "no scene in this list"
        elif any(c in name for c in "*?[") and "://" not in name and not path.exists():
            inside = sorted(glob.glob(name, recursive=True))  # noqa: PTH207 - patterns may be absolute
            what = "no file has such a name"
        else:
            inside, what = [name], ""
        if not inside:
            raise UsageError(f"{name}: {what}.")
        found += inside
    return list(dict.fromkeys(found))


def choose_targets(scenes: Sequence[str], output: Path | None, part: tuple[int, int] = (1, 1)) -> list[Target]:
    """Where each output goes: `output` itself for one scene, `STEM_rsseg.tif` in the folder `output` for several.

    Args:
        scenes: as `find_scenes` gives them.
        output: file or folder; None is the current folder.
        part: number of this part, from 1, and of how many: every n-th scene belongs to it, so that machines can share.

    Raises:
        UsageError: two scenes would write one file, or no such part.
    """
    number, parts = part
    if not 1 <= number <= parts:
        raise UsageError(f"--part {number}/{parts}: write 1/{parts} to {parts}/{parts}.")
    names = [f"{Path(scene).stem}_rsseg.tif" for scene in scenes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"two scenes would be written to {twice[0]}; predict them into different folders.")
    is_folder = output is not None and (len(scenes) > 1 or output.is_dir() or output.suffix == "")
    if output is not None and not is_folder:
        return [Target(scenes[0], output)][number - 1 :]
    targets = [Target(scene, (output or Path()) / name) for scene, name in zip(scenes, names, strict=True)]
    return targets[number - 1 :: parts]


def predict_scenes(
    ready: Ready,
    targets: Sequence[Target],
    options: SceneOptions,
    *,
    skip_existing: bool = False,
    journal: bool = False,
    on_plan: Callable[[ScenePlan], None] | None = None,
    progress: Callable[[Target], Progress] | None = None,
    share: Share = ALONE,
) -> Iterator[Outcome]:
    """Predict one scene after the other; one that fails does not stop the rest.

    Args:
        ready: the network.
        targets: scenes and outputs.
        options: of all scenes.
        skip_existing: leave out scenes whose outputs are there and were made from the same scene, model and options.
        journal: append what became of each scene to `JOURNAL` beside its output.
        on_plan: told before each scene.
        progress: asked for a `Progress` before each scene.
        share: this process's part of every scene; only the main one has results.
    """
    for target in targets:
        start = time.monotonic()
        status: Literal["done", "skipped", "failed"] = "done"
        result, message = None, None
        try:
            with share.of_scene(target.output, resume=options.resume):
                setup = settle(ready, target.scene, target.output, _tolerant(options, skip_existing))
                if skip_existing and target.output.exists() and _is_done(setup, overwrite=options.overwrite):
                    status = "skipped"
                else:
                    if on_plan is not None:
                        on_plan(setup.describe())
                    told = None if progress is None else progress(target)
                    result = run(setup, progress=told, share=share)
        except RssegError as error:
            status, message = "failed", str(error)
        except Exception as error:  # a night's work must not end with one odd file
            status, message = "failed", f"{target.scene}: unexpected {type(error).__name__}: {error}"
        seconds = time.monotonic() - start
        outcome = Outcome(
            scene=target.scene, output=target.output, status=status, seconds=seconds, error=message, result=result
        )
        if journal and share.is_main:
            _note(outcome)
        yield outcome


def _from(folder: Path, name: str) -> str:
    return name if "://" in name or name.startswith("/vsi") else str(folder / name)


def _tolerant(options: SceneOptions, skip_existing: bool) -> SceneOptions:
    """An output that is there is looked at before it is refused."""
    return options.model_copy(update={"overwrite": True}) if skip_existing else options


def _is_done(setup: Setup, *, overwrite: bool) -> bool:
    with setup.open() as raster:
        identity = identity_of(setup, raster)
    if all(_made_from(name) == identity for name, _ in setup.products):
        return True
    if overwrite:
        return False
    raise UsageError(
        f"{setup.output}: exists already and was made from another scene, model or options, or by something else. "
        "Replace it with --overwrite."
    )


def _made_from(path: Path) -> str | None:
    try:
        with rasterio.open(path) as file:
            return str(file.tags().get(TAG))
    except RasterioError:
        return None


def _note(outcome: Outcome) -> None:
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")} | outcome.model_dump(mode="json", exclude={"result"})
    path = outcome.output.parent / JOURNAL
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
