"""The rows of a scene shared out among processes, such as one per GPU.

They need no connection: each leaves its rows in a log beside the output, and the first one, which is called the main
one, puts them together. A log that is complete, and the message of a process that failed, get names that carry the
start they belong to, so that what an earlier start left is never taken for it.
"""

import glob
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rsseg import errors
from rsseg.errors import RssegError, UsageError
from rsseg.inference.tiling import Span
from rsseg.scene.striplog import LoggedStrip, StripLog

_PAUSE = 0.05
"""Seconds between two looks for the others' files."""


@dataclass(frozen=True)
class Share:
    """Which of how many processes this is.

    number: from 0
    start: what the processes of one start have in common, and others do not
    """

    number: int = 0
    count: int = 1
    start: str = ""

    @classmethod
    def from_environment(cls, variables: Mapping[str, str]) -> "Share":
        """As torchrun says it; a process that it did not start is the only one.

        Raises:
            UsageError: the processes are on several machines.
        """
        count = int(variables.get("WORLD_SIZE", "1"))
        if count == 1:
            return ALONE
        if int(variables.get("LOCAL_WORLD_SIZE", count)) != count:
            raise UsageError(
                "the processes of one scene must be on one machine. Share scenes among machines by --part."
            )
        names = ("TORCHELASTIC_RUN_ID", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
        return cls(int(variables["RANK"]), count, "-".join(variables.get(name, "0") for name in names))

    @property
    def is_main(self) -> bool:
        """True for the process that makes the outputs and talks."""
        return self.number == 0

    def rows(self, total: int) -> Span:
        """This process's part of so many rows of tiles."""
        return Span(total * self.number // self.count, total * (self.number + 1) // self.count)

    def log(self, output: Path) -> Path:
        """Where finished rows wait for the rest."""
        return output.with_name(f".{output.name}{self._part()}.resume")

    @contextmanager
    def of_scene(self, output: Path, *, resume: bool) -> Iterator[None]:
        """Around all that a process does for a scene: what fails in any of them fails in the main one, and only there.

        Args:
            output: of the scene.
            resume: take up the rows that an earlier start left, and leave those of this one if it fails.
        """
        if self.count == 1:
            yield
            return
        self._tidy(output, resume=resume)
        kept = resume
        try:
            yield
            kept = False
        except Exception as error:
            if self.is_main:
                # The others go on to the next scene: none may find the files of this one gone.
                with suppress(RssegError):
                    self.wait(output)
                raise
            self._hand_over_failure(output, error)
            if not isinstance(error, RssegError):
                raise
        finally:
            if self.is_main:
                self._clear(output, kept=kept)
            if not kept:
                self.log(output).unlink(missing_ok=True)

    def hand_over(self, output: Path) -> None:
        """The log is complete."""
        self.log(output).replace(self._named(output, self.number, "rows"))

    def wait(self, output: Path) -> list[Path]:
        """The others' complete logs, when all are done.

        Raises:
            RssegError: what the first process that failed did so with.
        """
        logs, failures = [], []
        for number in range(1, self.count):
            log, failure = (self._named(output, number, kind) for kind in ("rows", "failed"))
            while not (log.exists() or failure.exists()):
                time.sleep(_PAUSE)
            if log.exists():
                logs.append(log)
            else:
                failures.append(failure)
        if failures:
            name, message = json.loads(failures[0].read_text(encoding="utf-8"))
            raise getattr(errors, name)(message)
        return logs

    def _tidy(self, output: Path, *, resume: bool) -> None:
        """What an earlier start left of this process's part."""
        for left in output.parent.glob(f"{glob.escape(f'.{output.name}{self._part()}.')}*.*"):
            if left.suffix == ".rows" and resume:
                left.replace(self.log(output))
            else:
                left.unlink()
        if not resume:
            self.log(output).unlink(missing_ok=True)

    def _hand_over_failure(self, output: Path, error: Exception) -> None:
        kind = type(error).__name__ if isinstance(error, RssegError) else RssegError.__name__
        made = self._named(output, self.number, "failing")
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_text(json.dumps([kind, str(error)]), encoding="utf-8")
        made.replace(self._named(output, self.number, "failed"))

    def _clear(self, output: Path, *, kept: bool) -> None:
        for number in range(1, self.count):
            rows = self._named(output, number, "rows")
            if kept and rows.exists():
                rows.replace(Share(number, self.count).log(output))
            for kind in ("rows", "failed"):
                self._named(output, number, kind).unlink(missing_ok=True)

    def _part(self, number: int | None = None) -> str:
        number = self.number if number is None else number
        return f".{number + 1}-of-{self.count}" if self.count > 1 else ""

    def _named(self, output: Path, number: int, kind: str) -> Path:
        return output.with_name(f".{output.name}{self._part(number)}.{self.start}.{kind}")


ALONE = Share()


def in_order(logs: Sequence[StripLog], panels: int) -> Iterator[LoggedStrip]:
    """The strips of all logs, each of which holds rows below those of the one before: panel by panel, from the top."""
    strips = [log.strips() for log in logs]
    heads = [next(iterator, None) for iterator in strips]
    for panel in range(panels):
        for i, iterator in enumerate(strips):
            while (head := heads[i]) is not None and head.panel == panel:
                yield head
                heads[i] = next(iterator, None)
