"""What every method promises, whatever it computes."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rsseg.backbones.timm_adapter import synchronize_batch_norms
from rsseg.checkpoint import load_tensors, write_model
from rsseg.config import LossConfig
from rsseg.data.streams import Batch, training_batches
from rsseg.distributed import wrap
from rsseg.errors import Interrupted
from rsseg.layers.blocks import has_batch_norm, resize_logits
from rsseg.layers.ema import Frozen
from rsseg.methods.base import Method
from rsseg.methods.registry import method_for, segmenter_for
from rsseg.recipe import METHODS
from rsseg.runs import RunFolder, find_run
from rsseg.task import IGNORE_INDEX
from rsseg.training.checkpoints import frozen_hashes, model_header
from rsseg.training.graphs import WARM_UP
from rsseg.training.progress import Progress, StepReport
from rsseg.training.run import train
from rsseg.training.step import BufferSnapshot, build_optimizers, seed_everything
from tests.conformance.cases import Case, make_case, methods_covered, recipe_files, trained
from tests.training.replaying import CpuRecorder, NoSynchronization


@pytest.fixture(scope="module", params=recipe_files(), ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(request.param, tmp_path_factory.mktemp("conformance"))


@pytest.fixture
def method(case: Case) -> Method:
    torch.manual_seed(0)
    return case.method().train()


@pytest.fixture
def batches(case: Case, method: Method) -> Iterator[Batch]:
    return training_batches(case.recipe, method.streams, case.task, device="cpu", start_step=0)


def backward(method: torch.nn.Module, batch: Batch, step: int = 0) -> dict[str, Tensor]:
    seed_everything(0, 0, step, 0)
    output = method(batch, step)
    sum(output.losses.values()).backward()
    assert not any(value.requires_grad for value in output.logs.values())
    return dict(output.losses)


def test_every_method_has_a_small_recipe() -> None:
    assert methods_covered() == set(METHODS)


def test_every_trainable_parameter_is_in_one_group_and_gets_a_gradient(
    case: Case, method: Method, batches: Iterator[Batch]
) -> None:
    optimizers = build_optimizers(method, case.recipe.optimizers)
    losses = backward(method, next(batches))
    assert all(loss.ndim == 0 and loss.isfinite() for loss in losses.values())
    without = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    grouped = {p for optimizer in optimizers.values() for group in optimizer.param_groups for p in group["params"]}
    assert {p for p in grouped if not p.requires_grad} == set()


def test_crops_without_a_label_have_no_segmentation_loss_and_finite_gradients(
    method: Method, batches: Iterator[Batch]
) -> None:
    batch = {
        name: samples if samples.masks is None else replace(samples, masks=torch.full_like(samples.masks, IGNORE_INDEX))
        for name, samples in next(batches).items()
    }
    losses = backward(method, batch)
    assert losses["seg"].item() == 0.0
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_step_does_not_wait_for_the_device(method: Method, batches: Iterator[Batch]) -> None:
    batch = next(batches)
    backward(method, batch)  # the first step may copy constants to the device
    method.after_optimizer_step(0)
    with NoSynchronization():
        output = method(batch, 1)
        torch.stack(list(output.losses.values())).sum().backward()
        method.after_optimizer_step(1)


def test_what_a_recipe_adds_to_the_loss_on_labels_acts_in_every_method(case: Case) -> None:
    def seg(**loss: object) -> float:
        torch.manual_seed(0)
        method = method_for(case.recipe.model_copy(update={"loss": LossConfig.model_validate(loss)}), case.task).train()
        return backward(method, batch)["seg"].item()

    batch = next(training_batches(case.recipe, case.method().streams, case.task, device="cpu", start_step=0))
    plain = seg()
    assert seg(dice=1.0) > plain
    assert seg(focal_gamma=2.0) < plain
    if getattr(case.recipe, "source_decoder_weights", None) is None:
        assert seg(class_weights=(2.0, 2.0, 2.0)) == pytest.approx(2 * plain, rel=1e-5)


def test_frozen_parts_stay_as_they_are(case: Case, method: Method, batches: Iterator[Batch]) -> None:
    before = frozen_hashes(method)
    optimizers = build_optimizers(method, case.recipe.optimizers)
    weights = {name: p.detach().clone() for name, p in method.named_parameters() if p.requires_grad}
    for step in range(3):
        backward(method, next(batches), step)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        method.after_optimizer_step(step)
        method.train()
    assert frozen_hashes(method) == before
    frozen = [m.module for m in method.modules() if isinstance(m, Frozen)]
    assert not any(part.training for module in frozen for part in module.modules())
    assert any(not torch.equal(p, weights[name]) for name, p in method.named_parameters() if name in weights)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 47), (63, 65)])
def test_logits_have_the_size_of_the_image(method: Method, size: tuple[int, int]) -> None:
    segmenter = method.deployable().eval()
    with torch.inference_mode():
        logits = segmenter.predict_logits(torch.rand(2, 3, *size))
    assert logits.shape == (2, segmenter.task.num_classes, *size)
    assert logits.isfinite().all()


def test_low_resolution_logits_become_the_logits_by_plain_resizing(method: Method) -> None:
    segmenter = method.deployable().eval()
    images = segmenter.padded(torch.rand(1, 3, 64, 96))
    with torch.inference_mode():
        logits, low = segmenter(images), segmenter.low_resolution_logits(images)
        assert torch.equal(resize_logits(low, images.shape[-2:]), logits)


def test_saved_network_gives_the_same_logits_and_holds_nothing_else(case: Case, method: Method, tmp_path: Path) -> None:
    segmenter = method.deployable().eval()
    file = tmp_path / "model.safetensors"
    write_model(file, segmenter.state_dict(), model_header(case.recipe, segmenter, {"step": 0}))
    loaded = segmenter_for(case.recipe, case.task).eval()
    load_tensors(loaded, file)
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(images), segmenter(images))
    assert not any(isinstance(module, Frozen) for module in segmenter.modules())
    stored = load_file(file)
    for_training = {
        "teacher",
        "teachers",
        "distillation",
        "aux_heads",
        "disc_source",
        "disc_target",
        "average",
        "averages",
    }
    assert [name for name in stored if for_training & set(name.split("."))] == []
    assert sum(t.numel() for t in stored.values()) == sum(t.numel() for t in segmenter.state_dict().values())


class _StopAfter(Progress):
    def on_step(self, report: StepReport) -> None:
        if report.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_resumed_run_equals_an_unbroken_one(case: Case, tmp_path: Path) -> None:
    unbroken = RunFolder(train(case.recipe, output=tmp_path / "unbroken", progress=Progress()).run)
    with pytest.raises(Interrupted):
        train(case.recipe, output=tmp_path / "broken", progress=_StopAfter())
    broken = find_run(None, tmp_path / "broken")
    train(case.recipe, output=tmp_path / "broken", resume=broken.path, progress=Progress())
    for a, b in ((unbroken.state, broken.state), (unbroken.model, broken.model)):
        first, second = load_file(a), load_file(b)
        assert first.keys() == second.keys()
        assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_recorded_steps_equal_eager_ones(case: Case) -> None:
    recorder = CpuRecorder()
    steps = WARM_UP + 3
    weights, losses = trained(case, steps, recorder=recorder)
    assert (recorder.recorded, recorder.replays) == (3, 9)
    expected, eager = trained(case, steps, graphs="off")
    assert losses == eager
    assert [name for name, tensor in expected.items() if not torch.equal(weights[name], tensor)] == []


def test_teachers_stored_in_half_precision_teach_the_same(method: Method, batches: Iterator[Batch]) -> None:
    batch = next(batches)
    statistics = BufferSnapshot(method)

    def losses() -> dict[str, Tensor]:
        statistics.restore()
        with torch.autocast("cpu", torch.bfloat16):
            return backward(method, batch)

    before = losses()
    for teacher in method.frozen_teachers():
        teacher.store_as(torch.bfloat16)
    stored = {p.dtype for teacher in method.frozen_teachers() for p in teacher.module.parameters()}
    assert stored in (set(), {torch.float32, torch.bfloat16})
    after = losses()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_synchronized_batch_norms_change_no_name_or_tensor(method: Method) -> None:
    tensors = {id(tensor) for tensor in (*method.parameters(), *method.buffers())}
    names, shipped = method.state_dict().keys(), method.deployable().state_dict().keys()
    has = has_batch_norm(method)
    synchronize_batch_norms(method)
    assert (method.state_dict().keys(), method.deployable().state_dict().keys()) == (names, shipped)
    assert {id(tensor) for tensor in (*method.parameters(), *method.buffers())} == tensors
    norms = [m for part in (method, method.deployable()) for m in part.modules() if isinstance(m, _BatchNorm)]
    assert bool(norms) == has
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)


@pytest.fixture
def single_process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("single_process_group")
def test_distributed_wrapper_finds_no_unused_parameter(method: Method, batches: Iterator[Batch]) -> None:
    wrapped = wrap(method, torch.device("cpu"))
    for step in range(2):
        backward(wrapped, next(batches), step)
