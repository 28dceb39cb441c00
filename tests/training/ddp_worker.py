"""One rank of the two-process test: trains the toy method and writes the weights. Arguments: folder, accumulation."""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.amp.grad_scaler import GradScaler

from rsseg.checkpoint import ModelHeader
from rsseg.methods.base import Segmenter
from rsseg.training.checkpoints import Checkpoints
from rsseg.training.distributed import process_group
from rsseg.training.hardware import Hardware
from rsseg.training.optimizers import build_optimizers
from rsseg.training.progress import Silent
from rsseg.training.runs import RunFolder
from rsseg.training.signals import StopSignals
from rsseg.training.state import Counters, Identity, Parts
from rsseg.training.trainer import Surroundings, Trainer
from tests.training.tiny_method import ToyMethod, toy_batches, toy_recipe


def header(segmenter: Segmenter, training: dict[str, Any]) -> ModelHeader:
    return ModelHeader(recipe={}, task=segmenter.task, backbones={}, training=training, made_with={})


def main(folder: Path, accumulate: int) -> None:
    torch.set_num_threads(1)
    recipe = toy_recipe(grad_accum_steps=accumulate, eval_every=100, checkpoint_every=100, log_every=2)
    with process_group("cpu") as ranks, StopSignals() as signals:
        method = ToyMethod().double()
        parts = Parts(method, None, build_optimizers(method, recipe.optimizers), GradScaler("cpu", enabled=False))
        identity = Identity(recipe={}, frozen={}, splits={}, processes=ranks.world_size)
        trainer = Trainer(
            parts,
            recipe,
            Hardware(torch.device("cpu")),
            Surroundings(
                batches_from=lambda step: toy_batches(recipe, step, ranks.rank, ranks.world_size),
                evaluate=None,
                checkpoints=Checkpoints(RunFolder(folder), recipe.trainer, identity, header, used={}, writes=False),
                progress=Silent(),
                signals=signals,
            ),
            Counters(),
        )
        assert trainer.fit() == "all steps"
        if ranks.is_main:
            save_file(method.state_dict(), folder / f"{ranks.world_size}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
