"""Kill trainings again and again, and compare their ends with unbroken ones bit by bit.

    python -m tests.training.torture --kills 20 --processes 1 2

One small recipe of each method; kills are SIGKILL, SIGTERM, SIGINT and a full disk (a limit on the size of files) in
turn, at random moments, of a random process of several. Prints a line per run; exits with 1 if one differs.
"""

import argparse
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from rsseg.errors import RssegError
from rsseg.recipe import load_recipe
from rsseg.runs import RunFolder, readable_runs
from rsseg.training.progress import Progress
from rsseg.training.run import train
from tests.conformance.cases import Case, make_case, recipe_files

RECIPES = ("demo-supervised", "demo-ktda", "mtdf-vit", "dasegnet")
FULL_DISK = 0
"""Stands for a limit on the size of files, among the numbers of signals."""
KINDS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, FULL_DISK)
SMALL_FILE = 1 << 16
"""Bytes; every checkpoint is larger."""
PATIENCE_S = 300.0
GRACE_S = 60.0


def run_rank(recipe: str, output: str, run: str | None, rank: int, ranks: int, port: int, limit: int | None) -> None:
    """One process of a training; exits with 0 if it finished."""
    torch.set_num_threads(1)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(ranks)}
    try:
        train(load_recipe(recipe), output=Path(output), resume=None if run is None else Path(run), progress=Progress())
    except RssegError as error:
        print(f"  rank {rank}: {error}", file=sys.stderr)
        os._exit(error.exit_code)
    os._exit(0)


def start(recipe: Path, output: Path, ranks: int, limit: int | None = None) -> list[Any]:
    """Start or resume."""
    # A clean process that has imported torch once; a fork of this one could not compute gradients.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rsseg.training.run", "tests.conformance.cases"])
    run = newest(output)
    if run is None:
        shutil.rmtree(output, ignore_errors=True)  # killed before its first checkpoint
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    resumed = None if run is None else str(run.path)
    made = [
        context.Process(target=run_rank, args=(str(recipe), str(output), resumed, rank, ranks, port, limit))
        for rank in range(ranks)
    ]
    for process in made:
        process.start()
    return made


def newest(output: Path) -> RunFolder | None:
    runs = readable_runs(output) if output.is_dir() else []
    return next((run for run in runs if run.state.exists()), None)


def steps_done(output: Path) -> int:
    run = newest(output)
    return 0 if run is None else run.manifest().steps or 0


def kill_once(recipe: Path, output: Path, ranks: int, kind: int, choice: random.Random) -> bool:
    """Start, wait for a checkpoint, kill; False if the run finished instead."""
    before = steps_done(output)
    processes = start(recipe, output, ranks, SMALL_FILE if kind == FULL_DISK else None)
    deadline = time.monotonic() + PATIENCE_S
    while all(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if kind != FULL_DISK and steps_done(output) > before:
            time.sleep(choice.uniform(0, 0.05))
            victim = choice.choice(processes)
            if victim.is_alive():
                os.kill(victim.pid, kind)
            break
        time.sleep(0.005)
    if kind == signal.SIGKILL:  # as torchrun does, once a process is lost
        for process in processes:
            process.kill()
    for process in processes:
        process.join(GRACE_S)
        if process.is_alive():
            process.kill()
            process.join()
            raise AssertionError(f"a process did not end within {GRACE_S:.0f} s after {kind!r}")
    return any(process.exitcode != 0 for process in processes)


def finish(recipe: Path, output: Path, ranks: int) -> RunFolder:
    processes = start(recipe, output, ranks)
    for process in processes:
        process.join(PATIENCE_S)
    assert [process.exitcode for process in processes] == [0] * ranks, f"{output}: could not be finished"
    run = newest(output)
    assert run is not None
    return run


def differences(a: RunFolder, b: RunFolder) -> list[str]:
    found = []
    for name in ("state", "model", "last"):
        first, second = load_file(getattr(a, name)), load_file(getattr(b, name))
        found += [key for key in first if key not in second or not torch.equal(first[key], second[key])]
    return found


def torture(case: Case, folder: Path, kills: int, ranks: int, seed: int = 0, kinds: Sequence[int] = KINDS) -> list[str]:
    """Tensors that differ between an unbroken run and one that was killed so many times."""
    values = case.recipe.model_dump(mode="json")
    steps = 3 * kills + 3
    values["trainer"] |= {"steps": steps, "checkpoint_every": 1, "eval_every": steps}
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    unbroken = finish(recipe, folder / "unbroken", ranks)
    choice = random.Random(seed)
    for number in range(kills):
        kind = kinds[number % len(kinds)]
        assert kill_once(recipe, folder / "killed", ranks, kind, choice), f"finished after {number} of {kills} kills"
    return differences(unbroken, finish(recipe, folder / "killed", ranks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    files = {path.stem: path for path in recipe_files()}
    failed = False
    for name in chosen.recipes:
        for ranks in chosen.processes:
            with tempfile.TemporaryDirectory() as folder:
                began = time.monotonic()
                case = make_case(files[name], Path(folder) / "data")
                wrong = torture(case, Path(folder) / "runs", chosen.kills, ranks, chosen.seed)
                failed |= bool(wrong)
                result = f"{len(wrong)} tensors differ, such as {wrong[0]}" if wrong else "bit-identical"
                seconds = time.monotonic() - began
                print(f"{name}, {ranks} process(es), {chosen.kills} kills: {result} ({seconds:.0f} s)", flush=True)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
