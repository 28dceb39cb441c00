"""The model and state files of a run."""

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import rsseg
from rsseg.checkpoint import ModelHeader, write_model, write_tensors
from rsseg.config import BaseRecipe
from rsseg.data.streams import Batch
from rsseg.files import publish
from rsseg.methods.base import Segmenter, backbone_infos
from rsseg.runs import RunFolder
from rsseg.training.state import Counters, Identity, Parts, save_state


class Checkpoints:
    """Writes `best`, `last`, older checkpoints, the resume state and the model to ship."""

    def __init__(
        self, folder: RunFolder, recipe: BaseRecipe, identity: Identity, *, used: Mapping[str, str], writes: bool
    ) -> None:
        """Prepare for saving.

        Args:
            folder: of the run.
            recipe: written into every model file; `trainer` sets what is kept.
            identity: written into the resume state.
            used: split hash -> `training` or `selection`, written into every model file.
            writes: False on all ranks but the main one.
        """
        self._folder = folder
        self._recipe = recipe
        self._config = recipe.trainer
        self._identity = identity
        self._used = dict(used)
        self._writes = writes

    def save_best(self, segmenter: Segmenter, counters: Counters) -> None:
        """Save the network as the best, which ships unless the recipe ships the last."""
        if not self._writes or self._config.monitor == "last":
            return
        self._write(self._folder.best, segmenter, counters)
        publish(self._folder.best, self._folder.model)

    def save_last(self, segmenter: Segmenter, parts: Parts, counters: Counters) -> None:
        """Save the network as the last, and the state to resume from."""
        if not self._writes:
            return
        last = self._folder.last
        self._write(last, segmenter, counters)
        if self._config.keep_checkpoints > 1:
            publish(last, last.with_name(f"step-{counters.step:08d}.safetensors"))
            for old in sorted(last.parent.glob("step-*.safetensors"))[: -self._config.keep_checkpoints]:
                old.unlink()
        if self._config.monitor == "last" or counters.best_step is None:
            publish(last, self._folder.model)
        save_state(self._folder.state, parts, counters, self._identity)
        self._folder.update_manifest(steps=counters.step, best_score=counters.best_score, best_step=counters.best_step)

    def save_batch(self, batch: Batch, rank: int) -> Path:
        """Save a batch for inspection: the tensors of each stream as `stream/images` and so on."""
        path = self._folder.path / f"diverged-batch-{rank}.safetensors"
        values = {f"{name}/{key}": value for name, samples in batch.items() for key, value in vars(samples).items()}
        write_tensors(path, {name: value for name, value in values.items() if value is not None}, {})
        return path

    def last_good(self) -> str:
        """Sentence for error messages that names the last checkpoint."""
        kept = self._folder.last
        return f"The last good checkpoint is {kept}." if kept.exists() else "No checkpoint was saved."

    def _write(self, path: Path, segmenter: Segmenter, counters: Counters) -> None:
        training = {
            "step": counters.step,
            "used": self._used,
            "monitor": self._config.monitor,
            "score": counters.best_score if counters.best_step == counters.step else None,
        }
        write_model(path, segmenter.state_dict(), model_header(self._recipe, segmenter, training))


def model_header(recipe: BaseRecipe, segmenter: Segmenter, training: dict[str, Any]) -> ModelHeader:
    """The metadata of a saved network."""
    return ModelHeader(
        recipe=recipe.model_dump(mode="json"),
        task=segmenter.task,
        backbones=backbone_infos(segmenter),
        training={"weights": recipe.ship, **training},
        made_with=versions(),
    )


def versions() -> dict[str, str]:
    """Versions of everything that can change results."""
    found = {"rsseg": rsseg.__version__, "python": platform.python_version()}
    for package in ("torch", "timm", "numpy", "opencv-python-headless", "rasterio"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
