"""A training step that is captured once and replayed as CUDA graphs.

Small networks leave a GPU idle: it computes a kernel faster than Python launches the next one. A graph launches all of
them in one call.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from rsseg import distributed
from rsseg.config import BaseRecipe
from rsseg.data.streams import Batch, Samples
from rsseg.errors import RecipeError
from rsseg.methods.base import StepOutput
from rsseg.training.checkpoints import Parts
from rsseg.training.device import Hardware, check_gpu, tensors_by_name, tensors_of
from rsseg.training.step import BufferSnapshot, EagerStep, MicroStep, Step

WARM_UP = 3
"""Steps before the capture, in which libraries choose kernels and optimizers allocate their state."""
LARGEST_DIFFERENCE = 0.05
"""Relative difference between captured and eager losses or gradients above which the capture is not used. Far above the
rounding of kernels that sum in any order, far below a value that was captured instead of computed."""

Result = TypeVar("Result")


class Recorder(Protocol):
    """Records the kernels of a function for later replays."""

    def warm_up(self) -> AbstractContextManager[None]:
        """Context of the steps before the first record."""

    def record(self, work: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """Record a function without computing anything; its result is computed by each call of the replay."""


class CudaRecorder:
    """CUDA graphs that share one pool of memory; they must be replayed in the order in which they were recorded."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = None

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        """See `Recorder`: the stream of the capture, as autograd remembers the streams of gradients."""
        caller = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            yield
        caller.wait_stream(self._stream)

    def record(self, work: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """See `Recorder`."""
        graph, caller = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._stream.device)
        try:
            # thread_local: the loader's thread pins memory meanwhile, which "global" forbids.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = work()
        finally:
            torch.cuda.set_stream(caller)  # torch does not after a failed capture
        self._pool = graph.pool()
        return result, graph.replay


class GraphStep:
    """A step of three graphs, recorded after some eager steps: forward pass, backward pass, update of the weights.

    Random numbers are those of the eager step, as every replay continues from the seed of its micro-step. The graphs
    are used only if their first replay gives the losses and gradients of the eager step; a step that cannot be recorded
    stays eager.
    """

    def __init__(self, eager: EagerStep, recorder: Recorder, *, required: bool, report: Callable[[str], None]) -> None:
        """Wrap a step of one process.

        Args:
            eager: computes the first steps.
            recorder: records the others.
            required: a step that cannot be recorded is an error, not a message.
            report: gets the message.
        """
        self._eager, self._recorder, self._required, self._report = eager, recorder, required, report
        self._wait = WARM_UP
        self._micro: _MicroGraphs | None = None
        self._update: Callable[[], None] | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether steps are replayed."""
        return self._micro is not None

    def gradients(self, batch: Batch, step: int, micro: int) -> MicroStep:
        """See `Step`; raises `RecipeError` if graphs are required and impossible."""
        if self._wait >= 0:  # a graph computes what it was recorded with: teachers must not keep outputs before
            batch = {name: replace(samples, keys=None) for name, samples in batch.items()}
        if self._wait > 0:
            with self._recorder.warm_up():
                return self._eager.gradients(batch, step, micro)
        if self._micro is not None:
            self._eager.seed(step, micro)
            return self._micro(batch, step)
        if self._wait < 0 or micro > 0:  # the record counts from gradients of zero
            return self._eager.gradients(batch, step, micro)
        return self._record(batch, step, micro)

    def update(self) -> None:
        """See `Step`."""
        if self._micro is None:
            self._eager.update()
            self._wait -= self._wait > 0
            return
        if self._update is None:
            try:
                with self._tensor_rates():
                    _, self._update = self._recorder.record(lambda: self._eager.apply_gradients(to_none=False))
            except RuntimeError as error:
                self._give_up(error)
                self._eager.update()
                return
        self._update()

    def discard(self) -> None:
        """See `Step`."""
        if self._micro is None:
            self._eager.discard()
        else:
            torch._foreach_zero_(self._micro.gradients)

    def _record(self, batch: Batch, step: int, micro: int) -> MicroStep:
        """Record forward and backward pass of a first micro-step, and compare them with an eager one."""
        buffers = BufferSnapshot(self._eager.parts.method)
        with self._recorder.warm_up():
            expected = self._eager.gradients(batch, step, micro)
        if not expected.is_finite():
            return expected  # will be skipped, and tells nothing
        parameters = [p for p in self._eager.parts.method.parameters() if p.grad is not None]
        eager = [p.grad for p in parameters]
        buffers.restore()
        try:
            graphs = _MicroGraphs(self._eager, self._recorder, parameters, batch, step)
            self._eager.seed(step, micro)
            replayed = graphs(batch, step)
            difference = max(
                _difference(graphs.gradients, eager),
                _difference(list(replayed.output.losses.values()), list(expected.output.losses.values())),
            )
            if not difference <= LARGEST_DIFFERENCE:
                raise RuntimeError(f"its result differs from the eager step's by {difference:.0%}")
        except (RuntimeError, TypeError) as error:
            for parameter, gradient in zip(parameters, eager, strict=True):
                parameter.grad = gradient
            self._give_up(error)
            return expected
        self._micro = graphs
        return replayed

    @contextmanager
    def _tensor_rates(self) -> Iterator[None]:
        """Move learning rates to the device, where a replay reads them; undone if the update cannot be recorded."""
        groups = [group for optimizer in self._eager.parts.optimizers.values() for group in optimizer.param_groups]
        before = [dict(group) for group in groups]
        for group in groups:
            group["lr"] = torch.tensor(group["lr"], device=self._eager.hardware.device)
            if "capturable" in group:
                group["capturable"] = True
        try:
            yield
        except RuntimeError:
            for group, old in zip(groups, before, strict=True):
                group.update(old)
            raise

    def _give_up(self, error: Exception) -> None:
        self._wait, self._micro, self._update = -1, None, None
        reason = (str(error).strip().splitlines() or ["unknown error"])[0].rstrip(".")
        what = f"the step cannot be captured as a CUDA graph: {reason}"
        if self._required:
            raise RecipeError(f"trainer.graphs: {what}. Set it to auto or off.") from None
        self._report(f"{what}. Training continues without graphs; trainer.graphs: off hides this message.")


class _MicroGraphs:
    """Recorded forward and backward pass, with the tensors that they read and write.

    gradients: of all parameters, to which each replay adds
    """

    def __init__(
        self, eager: EagerStep, recorder: Recorder, parameters: list[torch.nn.Parameter], batch: Batch, step: int
    ) -> None:
        """Record both passes; gradients become zeros. Raises `RuntimeError` if that is impossible."""
        self._method = eager.parts.method
        self._batch = {name: replace(samples, **_cloned(samples), keys=None) for name, samples in batch.items()}
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self._method.before_step(step)

        def forward() -> tuple[StepOutput, Tensor, Tensor, Tensor]:
            # No number of the step: a replay would repeat it.
            output, loss = eager.forward(self._method.training_step, self._batch, cast(int, None))
            values = torch.stack([value.detach().float() for value in _values(output)])
            return output, values, loss.detach(), eager.parts.scaler.scale(loss)

        (self._output, self._values, self._loss, scaled), self._forward = recorder.record(forward)
        _, self._backward = recorder.record(scaled.backward)

    def __call__(self, batch: Batch, step: int) -> MicroStep:
        """Replay both passes for another batch of the same shape."""
        self._method.before_step(step)
        torch._foreach_copy_(list(tensors_of(self._batch)), list(tensors_of(batch)))
        self._forward()
        values = iter(self._values.clone().unbind())
        losses, logs = ({name: next(values) for name in part} for part in (self._output.losses, self._output.logs))
        done = MicroStep(batch, StepOutput(losses, logs), self._loss)
        self._backward()
        return done


def make_step(
    parts: Parts,
    recipe: BaseRecipe,
    hardware: Hardware,
    report: Callable[[str], None],
    recorder: Recorder | None = None,
) -> Step:
    """The step that `trainer.graphs` asks for.

    Args:
        parts: method and optimizers.
        recipe: accumulation, precision, clipping.
        hardware: device of the parts.
        report: gets a message if the step cannot be captured.
        recorder: None records on the device.

    Raises:
        RecipeError: graphs are required on a CPU or with several processes.
    """
    eager, wanted = EagerStep(parts, recipe, hardware), recipe.trainer.graphs
    several = distributed.current_ranks().world_size > 1
    if wanted == "on":
        if several:
            raise RecipeError("trainer.graphs: on is for one process, but there are several. Set it to auto.")
        if recorder is None:
            check_gpu(hardware, "trainer.graphs: on", "Set it to auto")
    if wanted == "off" or several or (hardware.device.type != "cuda" and recorder is None):
        return eager
    return GraphStep(eager, recorder or CudaRecorder(hardware.device), required=wanted == "on", report=report)


def _difference(first: list[Tensor], second: Iterable[Tensor | None]) -> float:
    """Norm of the difference of two lists of tensors, relative to the second; 0 if both are 0."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if b is not None]
    apart = torch.stack([(a.float() - b.float()).norm() for a, b in pairs]).norm()
    size = torch.stack([b.float().norm() for _, b in pairs]).norm()
    return float(apart / size.clamp(min=torch.finfo(torch.float32).tiny))


def _values(output: StepOutput) -> Iterable[Tensor]:
    return chain(output.losses.values(), output.logs.values())


def _cloned(samples: Samples) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors_by_name(samples).items()}
