"""Which model and state files a run keeps."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rsseg.checkpoint import ModelHeader, write_model
from rsseg.config import TrainerConfig
from rsseg.errors import MachineError
from rsseg.methods.base import Segmenter
from rsseg.runs import RunFolder
from rsseg.training.state import Counters, Identity, Parts, save_state


class Checkpoints:
    """Writes `best`, `last`, older ones, the resume state and the model to ship. Only the main process writes."""

    def __init__(
        self,
        folder: RunFolder,
        config: TrainerConfig,
        identity: Identity,
        header: Callable[[Segmenter, dict[str, Any]], ModelHeader],
        *,
        used: Mapping[str, str],
        writes: bool = True,
    ) -> None:
        """Keep what every file says; `used` maps split hashes to what they served, `writes` is off on other ranks."""
        self._folder = folder
        self._config = config
        self._identity = identity
        self._header = header
        self._used = dict(used)
        self._writes = writes

    def save_best(self, segmenter: Segmenter, counters: Counters) -> None:
        """Keep the network as the best; it becomes the one to ship unless the recipe ships the last."""
        if not self._writes or self._config.monitor == "last":
            return
        self._write(self._folder.best, segmenter, counters)
        publish(self._folder.best, self._folder.model)

    def save_last(self, segmenter: Segmenter, parts: Parts, counters: Counters) -> None:
        """Keep the network as the last, and the state to resume from."""
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

    def last_good(self) -> str:
        """For a message: what a failed run leaves behind."""
        kept = self._folder.last
        return f"The last good checkpoint is {kept}." if kept.exists() else "No checkpoint was saved before."

    def _write(self, path: Path, segmenter: Segmenter, counters: Counters) -> None:
        training = {
            "step": counters.step,
            "used": self._used,
            "monitor": self._config.monitor,
            "score": counters.best_score if counters.best_step == counters.step else None,
        }
        write_model(path, segmenter.state_dict(), self._header(segmenter, training))


def publish(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, at once: a hard link, or a copy where links are not possible.

    Raises:
        MachineError: neither is possible.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        temporary.replace(target)
    except OSError as error:
        raise MachineError(
            f"{target}: cannot be written: {error}. Free some space or choose another --output."
        ) from None
