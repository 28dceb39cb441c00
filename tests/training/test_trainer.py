"""Steps whose loss is not finite."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.amp.grad_scaler import GradScaler

from rsseg.data.streams import Batch
from rsseg.distributed import StopSignals
from rsseg.errors import RecipeError
from rsseg.runs import RunFolder
from rsseg.training.checkpoints import Checkpoints, Counters, Identity, Parts
from rsseg.training.device import Hardware
from rsseg.training.progress import Progress
from rsseg.training.step import build_optimizers
from rsseg.training.trainer import Trainer
from tests.training.tiny_method import ToyMethod, toy_batches, toy_recipe


class NormMethod(ToyMethod):
    """With running statistics, which a forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        assert isinstance(self.segmenter.net, nn.Sequential)
        self.segmenter.net[1] = nn.BatchNorm2d(8)
        self.double()


class Messages(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def on_message(self, text: str) -> None:
        self.said.append(text)


def trainer_with(folder: Path, nan_at: set[int], messages: Messages) -> Trainer:
    """Five steps; the batches of some have NaN in them."""
    recipe = toy_recipe(steps=5, log_every=1, eval_every=9, checkpoint_every=9, monitor="last")
    method = NormMethod()

    def batches(start: int) -> Iterator[Batch]:
        for step, batch in enumerate(toy_batches(recipe, start, 0, 1), start=start):
            if step in nan_at:
                batch["labeled"].images[0, 0, 0, 0] = torch.nan
            yield batch

    identity = Identity(recipe={}, frozen={}, splits={}, processes=1)
    return Trainer(
        Parts(method, None, build_optimizers(method, recipe.optimizers), GradScaler("cpu", enabled=False)),
        recipe,
        Hardware(torch.device("cpu")),
        Counters(),
        batches_from=batches,  # type: ignore[arg-type]
        evaluate=None,
        checkpoints=Checkpoints(RunFolder(folder), recipe, identity, used={}, writes=False),
        progress=messages,
        signals=StopSignals(),
    )


def test_step_with_a_loss_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    messages = Messages()
    trainer = trainer_with(tmp_path, {2}, messages)
    batches = trainer.batches_from(0)
    for step in range(2):
        trainer.train_step(step, batches)
    before = {name: tensor.clone() for name, tensor in trainer.parts.method.state_dict().items()}
    trainer.train_step(2, batches)
    after = trainer.parts.method.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert messages.said == ["step 1: the losses seg, teach are not finite; the step is skipped, 1 so far."]
    trainer.train_step(3, batches)
    assert not torch.equal(before["segmenter.net.0.weight"], after["segmenter.net.0.weight"])


def test_run_counts_skipped_steps_and_goes_on(tmp_path: Path) -> None:
    messages = Messages()
    trainer = trainer_with(tmp_path, {0, 1, 3, 4}, messages)
    assert trainer.fit() == "all steps"
    assert (trainer.counters.step, trainer.counters.skipped, trainer.counters.skipped_in_row) == (5, 4, 2)
    assert messages.said[-1].startswith("step 5: ")


def test_three_in_a_row_end_the_run_and_save_the_batch(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"seg, teach are not finite by step 4. The batch is in .*batch-0.safe"):
        trainer_with(tmp_path, {1, 2, 3}, Messages()).fit()
    saved = load_file(tmp_path / "diverged-batch-0.safetensors")
    assert saved.keys() == {"labeled/images", "labeled/valid", "labeled/masks"}
    assert saved["labeled/images"].isnan().any()
