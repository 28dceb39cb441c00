"""One rank of the two-process tests: trains a small method, writes weights and losses; again from the state that one
process left after two steps; and again with shared parameters. Arguments: folder, accumulation, name of the case."""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch.amp.grad_scaler import GradScaler

from rsseg.config import BaseRecipe
from rsseg.data.streams import Batch, Samples, training_batches
from rsseg.distributed import StopSignals, current_ranks, process_group
from rsseg.evaluation.result import Evaluation
from rsseg.methods.base import Method, Segmenter
from rsseg.methods.registry import method_for
from rsseg.metrics import scores
from rsseg.recipe import recipe_from_dict
from rsseg.runs import RunFolder
from rsseg.training import device as device_module
from rsseg.training.checkpoints import Checkpoints, Counters, Identity, Parts, load_state, save_state
from rsseg.training.device import Hardware, is_shared, shard, whole, without_weights
from rsseg.training.progress import Progress, StepReport
from rsseg.training.step import build_optimizers
from rsseg.training.trainer import Trainer
from tests.conformance.cases import make_case, recipe_files, without_dropout
from tests.training.tiny_method import ToyMethod, toy_batches, toy_recipe
from tests.unit.dasegnet_models import SIDE, make_method

Made = tuple[BaseRecipe, Method, Callable[[int, int, int], Iterator[Batch]]]
"""Recipe, method, and (start step, rank, number of ranks) -> batches."""


def toy(trainer: dict[str, Any]) -> Made:
    recipe = toy_recipe(**trainer)
    return recipe, ToyMethod().double(), lambda step, rank, ranks: toy_batches(recipe, step, rank, ranks)


def dasegnet(trainer: dict[str, Any]) -> Made:
    """Students with layer norms, decoders with batch norm. Plain SGD: Adam would enlarge the rounding of gradients that
    are zero but for it, such as those of a bias before a norm."""
    sgd = {"name": "sgd", "lr": 0.1, "momentum": 0.9}
    method = make_method(
        trainer={"steps": 3, "batch_size": 2, **trainer},
        optimizers=dict.fromkeys(("main", "disc_source", "disc_target"), sgd),
        adversarial={"convs": 1, "base_channels": 4, "weight": 0.5},
        self_training={"confidence": 0.36, "class_weights": [1.01, 1.51, 2.01], "rare_confidence": 0.35},
    )
    accumulate = method.recipe.trainer.grad_accum_steps

    def batches(start: int, rank: int, ranks: int) -> Iterator[Batch]:
        micro = start * accumulate
        while True:
            yield domains(micro * ranks + rank)
            micro += 1

    return method.recipe, method, batches


def domains(number: int) -> Batch:
    """Two source and two target images; the same ones whichever rank takes the batch of this number."""
    generator = torch.Generator().manual_seed(number)
    source, target = (torch.rand(2, 3, SIDE, SIDE, generator=generator) for _ in range(2))
    valid = torch.ones(2, SIDE, SIDE, dtype=torch.bool)
    masks = (source.mean(1) * 6).long().clamp(0, 2)
    return {"source": Samples(source, valid, masks), "target": Samples(target**2, valid)}


def real(file: str, **changes: Any) -> Callable[[dict[str, Any]], Made]:
    """A small recipe with changes, on images; nothing in a forward pass draws random numbers, which differ between
    ranks. Plain SGD, as above.
    """

    def make(trainer: dict[str, Any]) -> Made:
        folder = Path(tempfile.mkdtemp())
        case = make_case({path.stem: path for path in recipe_files()}[file], folder)
        values = case.recipe.model_dump(mode="json", exclude_unset=True) | changes
        values["trainer"] |= {"steps": 3, "batch_size": 2, **trainer}
        values["optimizers"] = {"main": {"name": "sgd", "lr": 0.05, "momentum": 0.9}}
        recipe = recipe_from_dict(values, file)
        torch.manual_seed(0)
        method = without_dropout(method_for(recipe, case.task))
        accumulate = recipe.trainer.grad_accum_steps
        loaded = training_batches(case.recipe, method.streams, case.task, device="cpu", start_step=0)
        pool = [next(loaded) for _ in range(12)]
        loaded.close()
        shutil.rmtree(folder)

        def batches(start: int, rank: int, ranks: int) -> Iterator[Batch]:
            yield from (pool[micro * ranks + rank] for micro in range(start * accumulate, len(pool) // ranks))

        return recipe, method, batches

    return make


CASES: Mapping[str, Callable[[dict[str, Any]], Made]] = MappingProxyType(
    {
        "toy": toy,
        "dasegnet": dasegnet,
        "supervised": real("demo-supervised"),
        "ktda": real("ktda"),
        "mtdf": real("mtdf-vit", complementary_dropout=False),
    }
)


class Losses(Progress):
    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {}

    def on_step(self, report: StepReport) -> None:
        for name, value in report.losses.items():
            self.seen.setdefault(name, []).append(value)


def scored(segmenter: Segmenter, file: Path) -> Evaluation:
    """Keeps the network that a rank scores."""
    assert not segmenter.training
    save_file(dict(segmenter.state_dict()), file)
    counts = ((1, 0), (0, 1), (0, 0))
    return Evaluation(counts=counts, scores=scores(counts, ["a", "b"]), images=1, seconds=0.0)


class States(Checkpoints):
    """Keeps the state of every checkpoint, and no model."""

    def save_last(self, segmenter: Segmenter, parts: Parts, counters: Counters) -> None:
        assert not any(map(is_shared, segmenter.state_dict().values()))
        kind = "shared" if parts.template is not None else str(self._identity.processes)
        file = state_file(self._folder.path, kind, counters.step)
        save_state(file, parts, counters, self._identity, writes=self._writes)


def state_file(folder: Path, kind: str, step: int) -> Path:
    return folder / "state" / f"{kind}-{step}" / "state.safetensors"


def train(folder: Path, accumulate: int, case: str, *, resume: Path | None = None, shared: bool = False) -> None:
    """A few steps, or those after a state; files of a resumed training begin with `resumed`, of a shared one with
    `shared`.
    """
    recipe, method, batches = CASES[case](
        {"grad_accum_steps": accumulate, "monitor": "last", "eval_every": 100, "checkpoint_every": 2, "log_every": 1}
    )
    losses, ranks = Losses(), current_ranks()
    prefix = f"{'shared-' if shared else ''}{'' if resume is None else 'resumed-'}{ranks.world_size}"
    device, template = torch.device("cpu"), without_weights(method.deployable()) if shared else None
    if shared:
        shard(method, [], device, ranks.world_size)
    with StopSignals() as signals:
        optimizers, scaler = build_optimizers(method, recipe.optimizers), GradScaler("cpu", enabled=False)
        parts = Parts(method, None, optimizers, scaler, template)
        given = {"trainer": {"grad_accum_steps": accumulate}}
        identity = Identity(recipe=given, frozen={}, splits={}, processes=ranks.world_size)
        trainer = Trainer(
            parts,
            recipe,
            Hardware(device),
            Counters() if resume is None else load_state(resume, parts, identity),
            batches_from=lambda step: batches(step, ranks.rank, ranks.world_size),
            evaluate=lambda segmenter, stop: scored(segmenter, folder / f"{prefix}-{ranks.rank}.safetensors"),
            checkpoints=States(RunFolder(folder), recipe, identity, used={}, writes=ranks.is_main),
            progress=losses,
            signals=signals,
        )
        assert trainer.fit() == "all steps"
        weights = {name: whole(tensor) for name, tensor in method.state_dict().items()}
        if ranks.is_main:
            logged = {f"loss.{name}": torch.tensor(values) for name, values in losses.seen.items()}
            save_file(weights | logged, folder / f"{prefix}.safetensors")


def main(folder: Path, accumulate: int, case: str) -> None:
    torch.set_num_threads(1)
    device_module.SMALLEST_SHARD = 1  # every block is gathered on its own
    with process_group("cpu"):
        train(folder, accumulate, case)
        train(folder, accumulate, case, resume=state_file(folder, "1", 2))
        train(folder, accumulate, case, shared=True)
        train(folder, accumulate, case, shared=True, resume=state_file(folder, "1", 2))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
