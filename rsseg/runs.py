"""Run folders: their files, their manifests, and how to find one."""

import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from rsseg.checkpoint import MODEL_NAME, find_model
from rsseg.errors import MachineError, UsageError, WeightsError
from rsseg.fields import Result
from rsseg.files import is_running, read_rows, replaced, write_json, write_text, writing

ExitState = Literal["running", "finished", "stopped", "failed", "interrupted"]
"""`stopped`: at `trainer.max_hours`, before the last step."""
ENDED: tuple[ExitState, ...] = ("finished", "stopped")
"""States of a run that ended as its recipe says."""

MANIFEST = "manifest.json"
LATEST = "latest"


class Manifest(Result):
    """Inputs and outcome of a run."""

    name: str
    method: str
    recipe: str
    created: str
    """Local time, ISO 8601."""
    finished: str | None = None
    state: ExitState = "running"
    reason: str = ""
    host: str
    pid: int
    command: tuple[str, ...]
    versions: Mapping[str, str]
    commit: str | None
    """Of the repository in the working folder, with `+` if it has changes; None outside a repository."""
    device: str
    seed: int
    steps: int = 0
    """Optimizer steps done at the last save."""
    monitor: str
    selection: str = ""
    """Selection of the weights to ship, in words: the score, and the images it is computed on."""
    best_score: float | None = None
    best_step: int | None = None
    plan: dict[str, Any]
    """Resolved sizes, splits with their hashes, and weight hashes."""
    used: Mapping[str, str]
    """Split hash -> `training` or `selection`: scores on these images are not independent."""
    frozen: Mapping[str, str] = {}
    """Teacher module -> SHA-256 of its weights."""
    resumed: tuple[str, ...] = ()
    """Time and step of every resume."""
    metric: str = "one integer confusion matrix over the whole split; absent classes are left out of means"


class RunSummary(BaseModel):
    """One row of `rsseg runs ls`."""

    name: str
    path: Path
    method: str | None = None
    recipe: str | None = None
    state: str = "unreadable"
    """An exit state; `killed`: still marked as running, but the process is gone; `unreadable`: no valid manifest."""
    step: int | None = None
    best: float | None = None
    monitor: str | None = None
    created: str | None = None


class RunDetails(BaseModel):
    """Content of `rsseg runs show`; metrics.csv has all columns."""

    facts: dict[str, Any]
    metric_columns: tuple[str, ...]
    """`step`, the main means, and `iou_<class>`."""
    metric_rows: tuple[tuple[str, ...], ...]
    """One per evaluation; "-" for an absent class."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of the files of a run."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe, which `--resume` reads."""
        return self.path / "config.resolved.yaml"

    @property
    def model(self) -> Path:
        """The model to ship."""
        return self.path / MODEL_NAME

    @property
    def best(self) -> Path:
        """Model with the best validation score."""
        return self.path / "checkpoints" / "best.safetensors"

    @property
    def last(self) -> Path:
        """Model at the last save."""
        return self.path / "checkpoints" / "last.safetensors"

    @property
    def state(self) -> Path:
        """State to resume from."""
        return self.path / "checkpoints" / "last.state" / "state.safetensors"

    def evaluation(self, name: str) -> Path:
        """Detailed evaluation of the model on a split, JSON; the folder of this name without `.json` has pictures."""
        return self.path / "evaluations" / f"{name}.json"

    def manifest(self) -> Manifest:
        """Read the manifest; raise `UsageError` if it is missing or damaged."""
        try:
            return Manifest.model_validate_json((self.path / MANIFEST).read_bytes())
        except (OSError, ValidationError) as error:
            raise UsageError(f"{self.path}: not a readable run folder: {error}. See `rsseg runs ls`.") from None

    def write_manifest(self, manifest: Manifest) -> None:
        """Replace the manifest."""
        write_json(self.path / MANIFEST, manifest.model_dump(mode="json"))

    def update_manifest(self, **changes: Any) -> None:
        """Change some values of the manifest."""
        self.write_manifest(self.manifest().model_copy(update=changes))

    def summary(self) -> RunSummary:
        """The row of `rsseg runs ls`."""
        try:
            manifest = self.manifest()
        except UsageError:
            return RunSummary(name=self.path.name, path=self.path)
        return RunSummary(
            name=self.path.name,
            path=self.path,
            method=manifest.method,
            recipe=manifest.recipe,
            state="killed" if _is_dead(manifest) else manifest.state,
            step=manifest.steps,
            best=manifest.best_score,
            monitor=manifest.monitor,
            created=manifest.created,
        )

    def details(self) -> RunDetails:
        """Main facts of the manifest, and the evaluations."""
        summary, manifest = self.summary(), self.manifest()
        rows = read_rows(self.path / "metrics.csv")
        columns = (
            tuple(c for c in rows[0] if c in ("step", "miou", "mf1", "oa") or c.startswith("iou_")) if rows else ()
        )
        facts = {
            "run": str(self.path),
            **summary.model_dump(include={"method", "recipe", "state", "created"}),
            "reason": manifest.reason,
            "steps": manifest.steps,
            f"best {manifest.monitor}": manifest.best_score,
            "best step": manifest.best_step,
            "selection": manifest.selection,
            "seed": manifest.seed,
            "device": manifest.device,
            "commit": manifest.commit,
            "command": " ".join(manifest.command),
            "model": str(self.model) if self.model.exists() else None,
        }
        cells = tuple(tuple(_short(row[column]) for column in columns) for row in rows)
        return RunDetails(facts=facts, metric_columns=columns, metric_rows=cells)


def create_run(output: Path, *, method: str, name: str) -> RunFolder:
    """Make a folder `<date>_<method>_<name>_NNN` with the first free number.

    Raises:
        MachineError: `output` cannot be written.
    """
    safe = "".join(c if c.isalnum() or c in "-." else "-" for c in name)
    prefix = f"{datetime.now().astimezone():%Y-%m-%d}_{method}_{safe}_"
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        for number in count(1):
            path = output / f"{prefix}{number:03d}"
            with suppress(FileExistsError):
                path.mkdir()
                break
        for part in ("checkpoints", "confusion"):
            (path / part).mkdir()
    _point_latest(output, path.name)
    return RunFolder(path)


def list_runs(root: Path) -> list[RunFolder]:
    """Every run below `root`, oldest first; runs with an unreadable manifest before all others."""
    runs = [RunFolder(file.parent) for file in root.glob(f"*/{MANIFEST}") if not file.parent.is_symlink()]
    return sorted(runs, key=lambda run: (_created(run), run.path.name))


def readable_runs(root: Path) -> list[RunFolder]:
    """Like `list_runs`, without unreadable runs."""
    return [run for run in list_runs(root) if _created(run) > 0]


def _created(run: RunFolder) -> float:
    """Time of the manifest in seconds, whatever its UTC offset; 0 if it cannot be read."""
    try:
        return datetime.fromisoformat(run.manifest().created).timestamp()
    except (UsageError, ValueError, OverflowError):
        return 0.0


def newest_finished(root: Path) -> RunFolder:
    """The newest run that ended as its recipe says, with a model; raise `WeightsError` if there is none."""
    finished = [run for run in readable_runs(root) if run.manifest().state in ENDED and run.model.exists()]
    if not finished:
        raise WeightsError(
            f"{root}: no finished run. Train one with `rsseg train --recipe NAME`, or give --model FILE."
        )
    return finished[-1]


def find_run(path: Path | None, root: Path) -> RunFolder:
    """A run by its folder, by its name below `root`, or the newest one.

    Raises:
        UsageError: there is none.
    """
    if path is None:
        runs = readable_runs(root)
        if not runs:
            raise UsageError(f"{root}: no runs here. `rsseg train --recipe NAME` makes one.")
        return runs[-1]
    for candidate in (path, root / path):
        # Without symbolic links, `latest` is a text file with the name.
        if candidate.is_file() and candidate.name == LATEST:
            candidate = candidate.with_name(candidate.read_text(encoding="utf-8").strip())
        if (candidate / MANIFEST).is_file():
            return RunFolder(candidate.with_name(candidate.readlink().name) if candidate.is_symlink() else candidate)
    raise UsageError(f"{path}: not a run folder. `rsseg runs ls` lists the runs.")


def run_of(model: Path) -> RunFolder | None:
    """The run that a model file is the model of, if it lies in a run folder."""
    folder = model.resolve().parent
    return RunFolder(folder) if model.name == MODEL_NAME and (folder / MANIFEST).is_file() else None


def choose_model(model: Path | None, root: Path) -> Path:
    """The model file of a run or file, or of the newest finished run.

    Raises:
        WeightsError: there is none.
    """
    return newest_finished(root).model if model is None else find_model(model)


def choose_models(models: Sequence[Path] | None, root: Path) -> list[Path]:
    """`choose_model` of each of several models, or of the newest run."""
    return [choose_model(model, root) for model in models or (None,)]


def _short(cell: str) -> str:
    """Format with four decimals."""
    if not cell:
        return "-"
    return f"{float(cell):.4f}" if "." in cell else cell


def _point_latest(output: Path, name: str) -> None:
    link = output / LATEST
    try:
        with replaced(link) as temporary:
            temporary.symlink_to(name, target_is_directory=True)
    except MachineError:
        write_text(link, name + "\n")


def _is_dead(manifest: Manifest) -> bool:
    return manifest.state == "running" and manifest.host == socket.gethostname() and not is_running(manifest.pid)
