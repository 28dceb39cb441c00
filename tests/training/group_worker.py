"""One of two processes that fail or are stopped. Arguments: what happens, folder for files that tell the test."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.amp.grad_scaler import GradScaler

from rsseg import cli
from rsseg.data.index import IndexItem
from rsseg.data.sources import Source
from rsseg.data.streams import Batch
from rsseg.distributed import StopSignals, process_group
from rsseg.errors import DataError, Interrupted
from rsseg.evaluation.model import evaluate
from rsseg.runs import RunFolder
from rsseg.training.checkpoints import Checkpoints, Counters, Identity, Parts
from rsseg.training.device import Hardware
from rsseg.training.progress import Progress
from rsseg.training.step import build_optimizers
from rsseg.training.trainer import Trainer
from tests.training.tiny_method import TASK, ToyMethod, ToySegmenter, toy_batches, toy_recipe


def fail(folder: Path) -> None:
    """Rank 1 fails while rank 0 waits for it; rank 0 writes down what it is told."""
    with process_group("cpu", (folder / "told").write_text) as ranks:
        if ranks.is_main:
            dist.barrier()
        (folder / "failed").write_text(str(time.time()))
        raise DataError("mask 7 is broken.")


def send(folder: Path) -> None:
    (folder / "sent").write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGTERM)


def stop_training(folder: Path) -> None:
    """Rank 1 gets the signal in step 23; ranks report every 20 steps."""
    torch.set_num_threads(1)
    recipe = toy_recipe(steps=100_000, eval_every=100_000, checkpoint_every=100_000)
    method = ToyMethod().double()
    with process_group("cpu") as ranks, StopSignals() as signals:

        def batches(start: int) -> Iterator[Batch]:
            for number, batch in enumerate(toy_batches(recipe, start, ranks.rank, ranks.world_size), start=1):
                if number == 23 and ranks.rank == 1:
                    send(folder)
                yield batch

        counters = Counters()
        identity = Identity(recipe={}, frozen={}, splits={}, processes=2)
        trainer = Trainer(
            Parts(method, None, build_optimizers(method, recipe.optimizers), GradScaler("cpu", enabled=False)),
            recipe,
            Hardware(torch.device("cpu")),
            counters,
            batches_from=batches,  # type: ignore[arg-type]
            evaluate=None,
            checkpoints=Checkpoints(RunFolder(folder), recipe, identity, used={}, writes=False),
            progress=Progress(),
            signals=signals,
        )
        reason = trainer.fit()
        (folder / f"end-{ranks.rank}").write_text(f"{counters.step} {reason} {time.time()}")


class Noise:
    """Reads images of eight pixels."""

    def sample(self, item: IndexItem) -> tuple[Any, Any, Any]:
        image = np.zeros((2, 8, 8), np.float32)
        return image, np.ones((8, 8), np.bool_), np.zeros((8, 8), np.uint8)


def stop_evaluation(folder: Path) -> None:
    """Rank 1 gets the signal at its third image of a long evaluation."""
    torch.set_num_threads(1)
    recipe = toy_recipe()
    items = tuple(IndexItem(image=str(number), split="val") for number in range(10**5))
    source = Source(items, Noise(), TASK)  # type: ignore[arg-type]
    with process_group("cpu") as ranks, StopSignals() as signals:

        def advance(done: int, _: int) -> None:
            time.sleep(0.01)
            if done == 3 and ranks.rank == 1:
                send(folder)

        try:
            evaluate(
                ToySegmenter().eval(),
                recipe,
                source,
                device="cpu",
                progress=advance,
                stop=lambda: signals.received is not None,
            )
        except Interrupted:
            (folder / f"end-{ranks.rank}").write_text(str(time.time()))


if __name__ == "__main__":
    work, folder = sys.argv[1], Path(sys.argv[2])
    cli.app.command("work")(lambda: {"fail": fail, "signal": stop_training, "evaluate": stop_evaluation}[work](folder))
    sys.argv[1:] = ["work"]
    cli.main()
