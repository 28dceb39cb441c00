"""Schedule the cells of a profile, several processes at once, until all are done or the time is up."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy.data import prepare
from benchmarks.accuracy.jobs import Job, code_version, make_job, missing_weights
from benchmarks.accuracy.table import SETTINGS, Arm, Profile, Setting
from rsseg.files import write_json, write_text
from rsseg.recipe import dump_recipe

GRACE_S = 600
"""After SIGTERM: a run saves its state at the end of its step."""


@dataclass(frozen=True)
class Ready:
    """A setting whose data is there, with the arms whose weights are there."""

    setting: Setting
    dataset: Path
    arms: tuple[Arm, ...]


class Table:
    """The cells of a profile and where they are kept."""

    def __init__(
        self,
        profile: Profile,
        *,
        data: Path | None,
        weights: Path | None,
        output: Path,
        any_code: bool = False,
        only_settings: Sequence[str] = (),
        only_arms: Sequence[str] = (),
        only_seeds: Sequence[int] = (),
    ) -> None:
        """Prepare the datasets and look for the weights; `left_out` says what cannot be run, and why.

        `only_settings`, `only_arms` and `only_seeds` restrict what is run, with the arms that these need; the page
        shows all.
        """
        self.only_settings, self.only_arms, self.only_seeds = set(only_settings), set(only_arms), set(only_seeds)
        self.profile, self.weights, self.output, self.any_code = profile, weights, output, any_code
        self.left_out: list[str] = []
        self._jobs: dict[tuple[str, Arm, int, float, bool], Job] = {}
        self.ready: list[Ready] = []
        for setting in (SETTINGS[name] for name in profile.settings):
            dataset = prepare(setting.dataset, data, output / "data", half=profile.half)
            if dataset is None:
                self.left_out.append(f"{setting.title}: the images are not here; see --data")
                continue
            arms = []
            for arm in setting.arms:
                reason = missing_weights(setting, arm, profile, dataset, weights)
                arms += [] if reason else [arm]
                self.left_out += [f"{setting.title}, {arm.name}: {reason}"] if reason else []
            self.ready.append(Ready(setting, dataset, tuple(arms)))

    def cells(self) -> Iterator[tuple[Ready, Arm, int]]:
        """First every arm of every setting once, then the next seed; single switches at the end."""
        for switch in (False, True):
            for seed in self.profile.seeds:
                for ready in self.ready:
                    yield from ((ready, arm, seed) for arm in ready.arms if arm.switch == switch)

    def sweep(self, ready: Ready, arm: Arm) -> list[Job | None]:
        """One short run per rate with the first seed, on the setting whose sweep is used; None: a model is missing."""
        used, arm = self._swept(ready, arm)
        return [
            self._job(used, arm, self.profile.seeds[0], rate, score=False)
            for rate in (self.profile.rates if len(self.profile.rates) > 1 else ())
        ]

    def _swept(self, ready: Ready, arm: Arm) -> tuple[Ready, Arm]:
        """Setting and arm whose sweep chooses the rate."""
        arm = _named(ready, arm.rate_of) or arm
        return next((r for r in self.ready if r.setting.name == ready.setting.rates and arm in r.arms), ready), arm

    def cell(self, ready: Ready, arm: Arm, seed: int) -> Job | None:
        """The job of a cell at the rate that its sweep chose; None while the sweep or a needed model is missing."""
        rates = [(_read(job) if job else None, job.rate if job else 1.0) for job in self.sweep(ready, arm)]
        if any(result is None for result, _ in rates):
            return None
        scored = [(result.get("val_miou") or 0.0, -abs(rate - 1.0), rate) for result, rate in rates if result]
        return self._job(ready, arm, seed, max(scored)[2] if scored else 1.0, score=True)

    def pending(self) -> Iterator[Job]:
        """Jobs that can start now, the most wanted first; each may be yielded more than once."""
        for ready, arm, seed in self.cells():
            wanted = (
                ready.setting.name in (self.only_settings or {ready.setting.name})
                and arm.name in (self.only_arms or {arm.name})
                and seed in (self.only_seeds or {seed})
            )
            yield from self._towards(ready, arm, seed) if wanted else ()

    def _towards(self, ready: Ready, arm: Arm, seed: int) -> Iterator[Job]:
        """The cell, or what it waits for: its sweep, and the arms whose models it or its sweep needs."""
        job, sweep = self.cell(ready, arm, seed), self.sweep(ready, arm)
        yield from (known for known in (sweep if job is None else [job]) if known is not None and not known.done)
        if job is None:
            used, swept = self._swept(ready, arm)
            blocked = (used, swept, self.profile.seeds[0]) if None in sweep else (ready, arm, seed)
            for _, name in blocked[1].needs:
                if other := _named(blocked[0], name):
                    yield from self._towards(blocked[0], other, blocked[2])

    def _job(self, ready: Ready, arm: Arm, seed: int, rate: float, *, score: bool) -> Job | None:
        models = {}
        for key, name in arm.needs:
            other = _named(ready, name)
            job = self.cell(ready, other, seed) if other else None
            if job is None or not job.model.is_file():
                return None
            models[key] = job.model
        known = (ready.setting.name, arm, seed, rate, score)
        if known not in self._jobs:
            self._jobs[known] = make_job(
                ready.setting,
                arm,
                self.profile,
                ready.dataset,
                self.output,
                seed=seed,
                rate=rate,
                score=score,
                weights=self.weights,
                models=models,
                any_code=self.any_code,
            )
        return self._jobs[known]


def _named(ready: Ready, name: str | None) -> Arm | None:
    """The arm of this name, if its weights are there."""
    return next((arm for arm in ready.arms if arm.name == name), None)


def run_table(table: Table, *, jobs: int, hours: float | None, threads: int, say: Any = print) -> None:
    """Run what is pending; returns when all is done or the time is up. Ctrl-C and SIGTERM stop as the limit does."""
    until = time.monotonic() + 3600 * hours if hours is not None else float("inf")
    running: dict[Path, tuple[subprocess.Popen[bytes], Job, float]] = {}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while time.monotonic() < until:
            if len(running) < jobs:
                waiting = next((job for job in table.pending() if job.folder not in running), None)
                if waiting is not None:
                    running[waiting.folder] = (_start(waiting, threads), waiting, time.monotonic())
                    continue
                if not running:
                    return
            time.sleep(0.5)
            _collect(running, say)
        say("time is up; what runs is saved and continues with the next call")
    except KeyboardInterrupt:
        say("stopped; what runs is saved and continues with the next call")
    finally:
        signal.signal(signal.SIGTERM, before)
        for process, _, _ in running.values():
            process.send_signal(signal.SIGTERM)
        for process, _, _ in running.values():
            process.wait(GRACE_S)


def _start(job: Job, threads: int) -> subprocess.Popen[bytes]:
    job.folder.mkdir(parents=True, exist_ok=True)
    write_text(job.folder / "recipe.yaml", dump_recipe(job.recipe))
    facts = {
        "setting": job.setting.name,
        "arm": job.arm.name,
        "title": job.recipe.title,
        "method": job.recipe.method,
        "seed": job.seed,
        "rate": job.rate,
        "lr": job.recipe.optimizers["main"].lr,
        "steps": job.recipe.trainer.steps,
        "score": job.score,
        "code": code_version(),
    }
    write_json(job.folder / "job.json", facts)
    command = [sys.executable, "-m", "benchmarks.accuracy.cell", str(job.folder), str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with (job.folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def _collect(running: dict[Path, tuple[subprocess.Popen[bytes], Job, float]], say: Any) -> None:
    """Report the processes that ended; one that failed leaves a result that says so, or it would be tried for ever."""
    for folder, (process, job, started) in list(running.items()):
        if process.poll() is None:
            continue
        del running[folder]
        if not job.result.is_file():
            reason = f"ended with code {process.returncode}; see {folder / 'log.txt'}"
            write_json(job.result, json.loads((folder / "job.json").read_text()) | {"error": reason})
        result = _read(job) or {}
        score = result.get("error") or (
            f"test mIoU {result['test']['miou']:.4f}" if job.score else f"validation mIoU {result['val_miou']:.4f}"
        )
        say(f"{job.name}: {score} ({time.monotonic() - started:.0f} s)", flush=True)


def _read(job: Job) -> dict[str, Any] | None:
    return json.loads(job.result.read_text()) if job.result.is_file() else None
