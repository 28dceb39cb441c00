"""Recorded steps against eager ones, with a recorder that replays on the CPU."""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from rsseg.data.streams import Batch
from rsseg.distributed import StopSignals
from rsseg.errors import RecipeError
from rsseg.methods.base import StepOutput
from rsseg.runs import RunFolder
from rsseg.training import device as device_module
from rsseg.training.checkpoints import Checkpoints, Counters, Identity, Parts
from rsseg.training.device import Hardware, float32_products, prefetched
from rsseg.training.graphs import WARM_UP, GraphStep, make_step
from rsseg.training.step import build_optimizers
from rsseg.training.trainer import Trainer
from tests.training.replaying import CpuRecorder, Result
from tests.training.test_trainer import Messages, NormMethod
from tests.training.tiny_method import ToyMethod, toy_batches, toy_recipe

CPU = Hardware(torch.device("cpu"))
STEPS = WARM_UP + 4


def trainer_of(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    recorder: Any,
    *,
    method: ToyMethod | None = None,
    nan_at: tuple[int, ...] = (),
    scaled: bool = False,
    **config: object,
) -> tuple[Trainer, Messages]:
    """Seven steps in float64 with a constant learning rate; recorded if there is a recorder."""
    messages = Messages()
    values = {"steps": STEPS, "log_every": 1, "eval_every": 99, "checkpoint_every": 99, "monitor": "last"}
    recipe = toy_recipe(**values, graphs="off" if recorder is None else "on", **config)
    method = method or NormMethod()

    def batches(start: int) -> Generator[Batch]:
        for number, batch in enumerate(toy_batches(recipe, start, 0, 1), start=start):
            if number in nan_at:
                batch["labeled"].images[0, 0, 0, 0] = torch.nan
            yield batch

    def make(*arguments: Any) -> Any:
        return make_step(*arguments, recorder)

    with monkeypatch.context() as patch:
        patch.setattr("rsseg.training.trainer.make_step", make)
        trainer = Trainer(
            Parts(method, None, build_optimizers(method, recipe.optimizers), GradScaler("cpu", enabled=scaled)),
            recipe,
            CPU,
            Counters(),
            batches_from=batches,
            evaluate=None,
            checkpoints=Checkpoints(
                RunFolder(folder),
                recipe,
                Identity(recipe={}, frozen={}, splits={}, processes=1),
                used={},
                writes=False,
            ),
            progress=messages,
            signals=StopSignals(),
        )
    return trainer, messages


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    assert trainer.fit() == "all steps"
    return trainer.parts.method.state_dict()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"grad_accum_steps": 3, "clip_grad": 0.1},
        {"scaled": True, "clip_grad": 0.1},
        {"nan_at": (1, 4, 6)},
        {"grad_accum_steps": 2, "nan_at": (2 * WARM_UP,)},
    ],
    ids=["plain", "accumulated", "scaled", "skipped", "skipped where it would be recorded"],
)
def test_recorded_run_ends_as_the_eager_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    trainer, messages = trainer_of(tmp_path, monkeypatch, CpuRecorder(), **config)
    recorded = weights_of(trainer)
    assert isinstance(trainer.step, GraphStep)
    assert trainer.step.is_recorded
    eager, expected_messages = trainer_of(tmp_path, monkeypatch, None, **config)
    for name, tensor in weights_of(eager).items():
        torch.testing.assert_close(
            recorded[name], tensor, rtol=1e-6, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert messages.said == expected_messages.said
    assert trainer.counters == eager.counters.model_copy(update={"elapsed_s": trainer.counters.elapsed_s})


class ReadsItsLoss(ToyMethod):
    """A step that cannot be captured, as its host waits for the device."""

    def training_step(self, batch: Batch, step: int) -> StepOutput:
        output = super().training_step(batch, step)
        return StepOutput({**output.losses, "branch": 0.0 * output.losses["seg"] * output.losses["seg"].item()})


class CountsByItself(ToyMethod):
    """A step whose capture would repeat a number of Python."""

    calls = 0

    def training_step(self, batch: Batch, step: int) -> StepOutput:
        self.calls += 1
        output = super().training_step(batch, step)
        return StepOutput({name: loss * self.calls for name, loss in output.losses.items()})


class RampsByItself(ToyMethod):
    """A weight by the step's number that `before_step` should set."""

    def training_step(self, batch: Batch, step: int) -> StepOutput:
        weight = (step + 1) / 100
        return StepOutput({name: weight * loss for name, loss in super().training_step(batch, step).losses.items()})


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (RampsByItself, "unsupported operand"),
        (ReadsItsLoss, "waits for the device"),
        (CountsByItself, "its result differs from the eager step's by 25%"),
    ],
)
def test_step_that_cannot_be_captured_stays_eager_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Callable[[], ToyMethod], reason: str
) -> None:
    trainer, messages = trainer_of(tmp_path, monkeypatch, CpuRecorder(), method=method().double())
    assert isinstance(trainer.step, GraphStep)
    trainer.step._required = False
    weights = weights_of(trainer)
    assert len(messages.said) == 1
    assert reason in messages.said[0]
    assert "Training continues without graphs" in messages.said[0]
    if method is not CountsByItself:
        expected = weights_of(trainer_of(tmp_path, monkeypatch, None, method=method().double())[0])
        assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []


def test_required_graphs_that_are_impossible_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = trainer_of(tmp_path, monkeypatch, CpuRecorder(), method=ReadsItsLoss().double())
    with pytest.raises(RecipeError, match=r"trainer\.graphs: the step cannot be captured .* Set it to auto or off"):
        trainer.fit()
    with pytest.raises(
        RecipeError, match=r"trainer\.graphs: on: needs a GPU, but this run uses the cpu\. Set it to auto"
    ):
        make_step(trainer.parts, toy_recipe(graphs="on"), CPU, pytest.fail)
    assert not isinstance(make_step(trainer.parts, toy_recipe(), CPU, pytest.fail), GraphStep)


class RefusesUpdates(CpuRecorder):
    """Fails at the third recording, that of the update, as a GPU does whose memory is full."""

    def record(self, work: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        if self.recorded == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().record(work)


def test_update_that_cannot_be_captured_stays_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, messages = trainer_of(tmp_path, monkeypatch, RefusesUpdates())
    assert isinstance(trainer.step, GraphStep)
    trainer.step._required = False
    weights = weights_of(trainer)
    assert "out of memory" in messages.said[0]
    expected = weights_of(trainer_of(tmp_path, monkeypatch, None)[0])
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []
    rates = [group["lr"] for optimizer in trainer.parts.optimizers.values() for group in optimizer.param_groups]
    assert all(isinstance(rate, float) for rate in rates)


class FakeStream:
    """Writes down what is asked of streams and events."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def record_event(self) -> str:
        return f"{self.name} event"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


def test_batches_are_copied_one_step_ahead_on_a_stream_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    main, side = FakeStream(log, "main"), FakeStream(log, "side")

    def within(stream: FakeStream) -> AbstractContextManager[None]:
        log.append(f"on {stream.name}")
        return nullcontext()

    fake = SimpleNamespace(Stream=lambda device: side, stream=within, current_stream=lambda device: main, Event=object)
    monkeypatch.setattr(device_module.torch, "cuda", fake)

    class Owned(SimpleNamespace):
        def record_stream(self, stream: FakeStream) -> None:
            log.append(f"{self.name} used on {stream.name}")

    monkeypatch.setattr(device_module, "tensors_of", lambda batch: [batch])
    closed = []

    def source() -> Generator[Any]:
        try:
            for number in range(5):
                log.append(f"copy {number}")
                yield Owned(name=f"batch {number}")
        finally:
            closed.append(True)

    ahead = prefetched(source(), torch.device("cuda"))
    assert next(ahead).name == "batch 0"
    begin = ["on side", "copy 0", "main waits for side event", "batch 0 used on main"]
    assert log == [*begin, "on side", "copy 1"]
    assert next(ahead).name == "batch 1"
    ahead.close()
    assert closed == [True]


def test_float32_products_are_those_asked_for_and_restored() -> None:
    def settings() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = settings()
    with float32_products(tf32=True):
        assert settings() == (True, True)
        with float32_products(tf32=False):
            assert settings() == (False, False)
    assert settings() == before
