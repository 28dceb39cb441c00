"""A GPU against the CPU: `pytest -m gpu`, nothing to download.

Without a GPU most of them run in short with the CPU in its place. Comparisons of the two devices then compare the CPU
with itself: they stay runnable, but show nothing.
"""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from benchmarks.scenes import make_segmenter, write_scene
from rsseg.data.streams import training_batches
from rsseg.errors import Interrupted
from rsseg.inference.machine import resident_bytes
from rsseg.inference.torch_network import PinnedCopies
from rsseg.recipe import Recipe
from rsseg.runs import RunFolder, find_run
from rsseg.scene.options import SceneOptions
from rsseg.scene.predict import predict_scene
from rsseg.training.batch_size import largest_batch
from rsseg.training.device import Hardware, float32_products
from rsseg.training.graphs import WARM_UP, CudaRecorder
from rsseg.training.progress import Progress, StepReport
from rsseg.training.run import train
from rsseg.training.step import seed_everything
from tests.conformance.cases import Case, make_case, recipe_files, trained, without_dropout
from tests.training.replaying import CpuRecorder
from tests.training.test_step import Messages

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ONE = "ktda"
MEGABYTE = 1 << 20

pytestmark = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


@pytest.fixture(scope="module", params=[f for f in recipe_files() if CUDA or f.stem == ONE], ids=lambda f: f.stem)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(request.param, tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(next(f for f in recipe_files() if f.stem == ONE), tmp_path_factory.mktemp("one"))


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    with float32_products(tf32=False):
        yield


def on_device(case: Case, **trainer: object) -> Recipe:
    """The recipe of a case for the device."""
    return case.recipe.model_copy(
        update={"trainer": case.recipe.trainer.model_copy(update={"device": DEVICE, **trainer})}
    )


class DrawnOnTheCpu(TorchDispatchMode):
    """Draws all random numbers on the CPU, so that both devices get the same."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        device = torch.device((kwargs or {}).get("device") or next(a.device for a in args if isinstance(a, Tensor)))

        def moved(value: Any) -> Any:
            return value.cpu() if isinstance(value, Tensor) else value

        given = tree_map(moved, {**(kwargs or {}), **({"device": "cpu"} if "device" in (kwargs or {}) else {})})
        drawn = func(*tree_map(moved, args), **given)
        if func._schema.is_mutable:
            return args[0].copy_(drawn)
        return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, drawn)


def losses_and_gradients(case: Case, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    method = without_dropout(case.method()).train().to(device)
    batches = training_batches(case.recipe, method.streams, case.task, device=device, start_step=0)
    batch = next(batches)
    batches.close()
    seed_everything(0, 0, 0, 0)
    with DrawnOnTheCpu():
        losses = torch.stack(list(method(batch, 0).losses.values()))
        losses.sum().backward()
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in method.named_parameters():
        if parameter.grad is not None:
            gradients.setdefault(name.split(".")[0], []).append(parameter.grad.detach().flatten().cpu())
    return losses.detach().cpu(), {part: torch.cat(each) for part, each in gradients.items()}


def apart(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference relative to the expected norm."""
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-12))


def test_losses_and_gradients_are_those_of_the_cpu(case: Case) -> None:
    losses, gradients = losses_and_gradients(case, DEVICE)
    expected, wanted = losses_and_gradients(case, "cpu")
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)
    assert gradients.keys() == wanted.keys()
    assert {
        part: apart(gradients[part], wanted[part]) for part in wanted if apart(gradients[part], wanted[part]) > 1e-4
    } == {}


def test_graphs_train_as_eager_steps_do(case: Case) -> None:
    steps = 20 if CUDA else WARM_UP + 2
    weights, losses = trained(case, steps, recorder=None if CUDA else CpuRecorder(), device=DEVICE)
    expected, eager = trained(case, steps, graphs="off", device=DEVICE)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(eager), rtol=1e-5, atol=1e-6)
    flat, wanted = (torch.cat([t.float().flatten() for t in each.values()]) for each in (weights, expected))
    assert apart(flat, wanted) < 1e-5


@needs_gpu
def test_step_does_not_wait_for_the_gpu(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    method = case.method().cuda().train()
    batches = training_batches(case.recipe, method.streams, case.task, device="cuda", start_step=0)
    batch = next(batches)
    batches.close()
    for step in range(2):  # the first step may copy constants to the device
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            torch.stack(list(method(batch, step).losses.values())).sum().backward()
            method.after_optimizer_step(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")


class Finite(Messages):
    """All losses of a run."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def on_step(self, report: StepReport) -> None:
        self.losses.append(report.loss)


@pytest.mark.parametrize("amp", ["bf16", "fp16", "none"])
def test_whole_runs_train_in_every_precision(one: Case, tmp_path: Path, amp: str) -> None:
    seen = Finite()
    steps = 8 if CUDA else 1
    result = train(on_device(one, steps=steps, amp_dtype=amp, channels_last=True), output=tmp_path, progress=seen)
    assert (result.steps, len(seen.losses)) == (steps, steps)
    assert np.isfinite(seen.losses).all()
    assert seen.said == []  # no step was skipped, and the graphs were captured


class StopAfterOne(Progress):
    def on_step(self, report: StepReport) -> None:
        if report.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_resumed_deterministic_run_equals_an_unbroken_one(one: Case, tmp_path: Path) -> None:
    recipe = on_device(one, steps=6 if CUDA else 2, deterministic=True, graphs="off")
    unbroken = RunFolder(train(recipe, output=tmp_path / "unbroken", progress=Progress()).run)
    with pytest.raises(Interrupted):
        train(recipe, output=tmp_path / "broken", progress=StopAfterOne())
    broken = find_run(None, tmp_path / "broken")
    train(recipe, output=tmp_path / "broken", resume=broken.path, progress=Progress())
    first, second = load_file(unbroken.state), load_file(broken.state)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_largest_batch_is_found_and_trains(one: Case, tmp_path: Path) -> None:
    recipe = on_device(one, batch_size="auto")
    found = largest_batch(recipe, one.task, Hardware(torch.device(DEVICE)), memory=(256 if CUDA else 64) * MEGABYTE)
    assert found > 2
    assert train(on_device(one, batch_size=found, steps=1), output=tmp_path, progress=Progress()).steps == 1


def classes_of(output: Path) -> np.ndarray:
    with rasterio.open(output) as file:
        return file.read(1)


def test_classes_of_a_scene_are_those_of_the_cpu(tmp_path: Path) -> None:
    torch.manual_seed(0)
    segmenter, scene = make_segmenter(), write_scene(tmp_path / "scene.tif", 1500 if CUDA else 200)
    found = []
    for device in (DEVICE, "cpu"):
        output = tmp_path / f"{device}.tif"
        predict_scene(segmenter, scene, output, SceneOptions(device=device, dtype="float32", tile=256, overwrite=True))
        found.append(classes_of(output))
    assert (found[0] != found[1]).mean() <= 1e-5


def test_memory_of_ten_scenes_in_one_process_is_flat(tmp_path: Path) -> None:
    segmenter, scene = make_segmenter(), write_scene(tmp_path / "scene.tif", 600 if CUDA else 200)
    used = []
    for _ in range(10 if CUDA else 3):
        predict_scene(segmenter, scene, tmp_path / "out.tif", SceneOptions(device=DEVICE, overwrite=True))
        used.append(torch.cuda.memory_allocated() if CUDA else resident_bytes())
    assert used[-1] - used[1] <= (1 if CUDA else 64) * MEGABYTE


@needs_gpu
def test_failed_capture_leaves_the_caller_on_its_stream() -> None:
    recorder, caller = CudaRecorder(torch.device("cuda")), torch.cuda.current_stream()
    value = torch.ones((), device="cuda")
    work: Callable[[], float] = value.item
    with pytest.raises(RuntimeError):
        recorder.record(work)
    assert torch.cuda.current_stream() == caller
    assert float(value + 1) == 2.0


@needs_gpu
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float32", "bool"])
def test_arrays_arrive_whole_although_buffers_are_reused(dtype: str) -> None:
    copies, rng = PinnedCopies(torch.device("cuda")), np.random.default_rng(0)
    sent = []
    for side in (100, 900, 300, 900, 900, 20):
        arrays = [rng.integers(0, 200, (side, side, 3)).astype(dtype) for _ in range(2)]
        sent.append((np.stack(arrays).astype(np.float32), copies.send(arrays).to(torch.float32)))
        for array in arrays:
            array[:] = 0
    for expected, arrived in sent:
        assert np.array_equal(arrived.cpu().numpy(), expected)
