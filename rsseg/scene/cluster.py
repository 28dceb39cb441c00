"""Batches on a Ray cluster: a scene per task; lost workers are replaced, scenes that keep losing them are given up."""

import os
import signal
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rsseg
from rsseg.errors import MachineError, RssegError, UsageError
from rsseg.files import content_hash, is_folder
from rsseg.scene.batch import Execute, SceneJob, Target, predict_target, prepare_for
from rsseg.scene.memory import PreparedNetwork
from rsseg.scene.options import Outcome

_CONNECT_S = 10.0
"""Time limit for reaching the cluster."""
_START_S = 300.0
"""Time limit for the first worker, and for another one once all are lost."""
_POLL_S = 2.0
"""Interval at which nodes that joined or left are noticed."""
_STORE_BYTES = 80 << 20
"""Ray's object store on this machine: only names and results pass through it."""
_LIBRARY_BYTES = 1 << 30
"""Memory of a worker besides --max-memory: Python, torch, GDAL."""


@dataclass(frozen=True)
class Cluster:
    """Where to run, and what a worker takes.

    address: HOST:PORT of the cluster, "auto" for the one of this machine, "local" for one that is started here
    cpus: cores, and threads, of a worker
    tries: a scene that loses this many workers, or runs out of disk or memory this often, is given up
    """

    address: str
    cpus: int = 1
    tries: int = 3


def on_ray(cluster: Cluster, models: Sequence[Path], job: SceneJob) -> Execute:
    """Return a function that predicts scenes on a cluster, in any order.

    Workers read the model and the scenes, and write the outputs, under the names that are given here: these must lie on
    a file system that all machines share. A scene whose worker is lost is computed again by another one; what it had
    finished is found and kept.

    Args:
        cluster: see `Cluster`.
        models: file of the model, or of each model of an ensemble.
        job: what to do with each scene.

    Raises:
        MachineError: Ray is not installed; the cluster cannot be reached, has too few cores, or is lost; a worker has
            another version of rsseg, torch or the model.
        UsageError: the address is invalid.
    """
    facts = _facts(models)
    plan = _Assignment(tuple(models), job, str(Path.cwd()), cluster.cpus)

    def execute(targets: Sequence[Target]) -> Iterator[Outcome]:
        with _connected(cluster) as ray:
            yield from _Pool(ray, cluster, plan, facts).run(targets)

    return execute


@dataclass(frozen=True)
class _Assignment:
    models: tuple[Path, ...]
    job: SceneJob
    folder: str
    threads: int


@dataclass
class _Task:
    target: Target
    losses: int = 0
    """Number of failed tries."""


class _Worker:
    """Runs as an actor of Ray: holds the network and predicts scenes, one at a time."""

    def __init__(self, plan: _Assignment) -> None:
        self._plan = plan
        self._prepared: PreparedNetwork | None = None

    def check(self) -> dict[str, str]:
        """Load the model; return versions and name of the machine, or an `error`."""
        import torch

        host = {"host": socket.gethostname()}
        if not is_folder(self._plan.folder):
            return host | {"error": f"there is no folder {self._plan.folder}. All machines need the same file system"}
        os.chdir(self._plan.folder)
        torch.set_num_threads(self._plan.threads)
        try:
            self._prepared = prepare_for(self._plan.models, self._plan.job.options)
            facts = _facts(self._plan.models)
        except RssegError as error:
            return host | {"error": str(error).rstrip(".")}
        network = self._prepared.network
        return (
            host | facts | {"network": f"{network.dtype} on {network.device.partition(':')[0]} with {network.engine}"}
        )

    def predict(self, target: Target, *, again: bool) -> Outcome:
        """Predict one scene; `again` accepts what a lost worker has finished."""
        assert self._prepared is not None, "checked before"
        outcome = predict_target(self._prepared, target, self._plan.job, keep_finished=again)
        # Other exceptions need not survive the way to the other process.
        known = outcome.exception if isinstance(outcome.exception, RssegError) else None
        return outcome.model_copy(update={"exception": known})


@dataclass
class _Pool:
    """Workers, as many as the cluster has room for, and their tasks."""

    ray: Any
    cluster: Cluster
    plan: _Assignment
    facts: dict[str, str]
    """Versions that every worker must have; the precision is that of the first one."""
    starting: dict[Any, Any] = field(default_factory=dict)
    """Pending check -> worker."""
    idle: list[Any] = field(default_factory=list)
    running: dict[Any, tuple[Any, _Task]] = field(default_factory=dict)
    """Pending outcome -> worker, task."""

    def run(self, targets: Sequence[Target]) -> Iterator[Outcome]:
        waiting = deque(_Task(target) for target in targets)
        alive = time.monotonic()
        try:
            while waiting or self.running:
                self._start(len(waiting))
                while waiting and self.idle:
                    worker, task = self.idle.pop(), waiting.popleft()
                    self.running[worker.predict.remote(task.target, again=task.losses > 0)] = worker, task
                pending = [*self.running, *self.starting]
                ready = self.ray.wait(pending, num_returns=1, timeout=_POLL_S)[0] if pending else []
                if not pending:
                    time.sleep(_POLL_S)
                if ready and ready[0] in self.starting:
                    self._admit(ready[0])
                elif ready and (outcome := self._outcome(ready[0], waiting)) is not None:
                    yield outcome
                if self.running or self.idle:
                    alive = time.monotonic()
                elif time.monotonic() - alive > _START_S:
                    raise MachineError(
                        f"--ray {self.cluster.address}: no worker with {self.cluster.cpus} free cores for "
                        f"{_START_S:.0f} s; {len(waiting)} scenes are left. Run the command again with --skip-existing."
                    )
        finally:
            for worker in [*self.starting.values(), *self.idle, *(worker for worker, _ in self.running.values())]:
                with suppress(Exception):  # the cluster may be gone
                    self.ray.kill(worker)

    def _start(self, tasks: int) -> None:
        """Start workers for the waiting tasks where the cluster has room."""
        room, needs_gpu = 0, self.plan.job.options.device.startswith("cuda")
        for node in self.ray.nodes():
            if node["Alive"]:
                cores = int(node["Resources"].get("CPU", 0) // self.cluster.cpus)
                room += min(cores, int(node["Resources"].get("GPU", 0))) if needs_gpu else cores
        wanted = min(room - len(self.running), tasks) - len(self.starting) - len(self.idle)
        limit = self.plan.job.options.max_memory
        for _ in range(wanted):
            actor = self.ray.remote(_Worker).options(
                num_cpus=self.cluster.cpus,
                num_gpus=int(needs_gpu),
                memory=None if limit is None else limit + _LIBRARY_BYTES,
                max_restarts=0,
            )
            worker = actor.remote(self.plan)
            self.starting[worker.check.remote()] = worker

    def _admit(self, check: Any) -> None:
        worker = self.starting.pop(check)
        try:
            facts = self.ray.get(check)
        except self.ray.exceptions.RayActorError:
            return  # lost while it started; another one is started in its place
        host = facts.pop("host")
        if error := facts.get("error"):
            raise MachineError(f"worker on {host}: {error}.")
        self.facts = facts | self.facts
        if wrong := [name for name in facts if facts[name] != self.facts[name]]:
            found = ", ".join(f"{name} {facts[name]} instead of {self.facts[name]}" for name in wrong)
            raise MachineError(
                f"worker on {host}: {found}. Install the same versions everywhere; finished scenes are kept, "
                "continue with --skip-existing."
            )
        self.idle.append(worker)

    def _outcome(self, pending: Any, waiting: deque[_Task]) -> Outcome | None:
        """The outcome of a task; None if it is to be tried again."""
        worker, task = self.running.pop(pending)
        target = task.target
        try:
            outcome: Outcome = self.ray.get(pending)
        except self.ray.exceptions.RayError as error:
            with suppress(Exception):
                self.ray.kill(worker)
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".:")
            message = f"{target.scene}: lost its worker {task.losses + 1} times, possibly for lack of memory: {reason}."
            outcome = Outcome(scene=target.scene, output=target.output, status="failed", seconds=0, error=message)
            retried = True
        else:
            self.idle.append(worker)
            retried = isinstance(outcome.exception, MachineError)
        if retried:
            task.losses += 1
            if task.losses < self.cluster.tries:
                waiting.append(task)
                return None
        if outcome.status == "skipped" and task.losses and not self.plan.job.skip_existing:
            outcome = outcome.model_copy(update={"status": "done"})  # by the worker that was lost
        return outcome


@contextmanager
def _connected(cluster: Cluster) -> Iterator[Any]:
    """The module `ray`, connected."""
    try:
        import ray
    except ImportError:
        raise MachineError("--ray needs the package ray: pip install 'rsseg[ray]'.") from None
    before = signal.getsignal(signal.SIGTERM)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if cluster.address == "local":
        where = {"address": "local", "include_dashboard": False, "object_store_memory": _STORE_BYTES}
    else:
        where = {"address": _reached(cluster.address)}
    start = time.monotonic()
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **where)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), "no answer").rstrip(".")
        raise MachineError(
            f"--ray {cluster.address}: no cluster after {time.monotonic() - start:.0f} s: {reason}. "
            "Start one with `ray start --head`, or give --ray local."
        ) from None
    # Ray's own handler would end the process without a message.
    signal.signal(signal.SIGTERM, before)
    try:
        yield ray
    except ray.exceptions.RaySystemError as error:
        raise MachineError(f"--ray {cluster.address}: the cluster is lost: {error}.") from None
    finally:
        ray.shutdown()


def _reached(address: str) -> str:
    """The address, once something answers there: Ray itself would try for minutes."""
    if address == "auto":
        return address
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "://" in address:
        raise UsageError(f"--ray {address}: give HOST:PORT of the cluster, such as 10.0.0.5:6379, auto or local.")
    start = time.monotonic()
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise MachineError(
            f"--ray {address}: not reached in {time.monotonic() - start:.1f} s: {error}. "
            "Is the head node running (`ray status`)?"
        ) from None
    return address


def _facts(models: Sequence[Path]) -> dict[str, str]:
    """What all workers must have in common with the process that started them."""
    hashes = " ".join(content_hash(model).hex() for model in models)
    return {"rsseg": rsseg.__version__, "torch": version("torch"), "model": hashes}
