"""KTDA's stronger mode: FAM beside the decoder's path, and a teacher that has learnt the task."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from rsseg.checkpoint import write_model
from rsseg.data.streams import Samples
from rsseg.errors import RecipeError, WeightsError
from rsseg.methods.ktda.method import KTDAMethod, probability_loss
from rsseg.methods.ktda.network import build_segmenter
from rsseg.methods.registry import method_for, segmenter_for
from rsseg.recipe import recipe_from_dict
from rsseg.task import Task
from rsseg.training.checkpoints import model_header
from rsseg.training.device import is_shared, shard
from rsseg.training.progress import Progress
from rsseg.training.run import train
from tests.conftest import rgb_task
from tests.unit.ktda_models import PLAIN, TASK, batch_of, method_of, recipe_of

SIDE = PLAIN | {"teacher": {"name": "vit_mini_patch8", "weights": "random"}, "fam": {"path": "side"}}


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return save_teacher(tmp_path / "teacher.safetensors", TASK)


def save_teacher(file: Path, task: Task) -> Path:
    values = {
        "method": "supervised",
        "name": "teacher",
        "data": {"path": "unused", "augment": {"crop_size": 32}},
        "backbone": {"name": "vit_mini_patch8", "weights": "random"},
        "decoder": {"type": "dpt", "channels": 8, "widths": [8, 8, 8, 8]},
    }
    recipe = recipe_from_dict(values, "teacher")
    segmenter = segmenter_for(recipe, task)
    write_model(file, segmenter.state_dict(), model_header(recipe, segmenter, {"step": 1}))
    return file


def taught(model: Path, base: dict[str, Any] = PLAIN, **settings: Any) -> KTDAMethod:
    torch.manual_seed(0)
    recipe = recipe_of(base, task_teacher={"model": str(model), **settings})
    method = method_for(recipe, TASK)
    assert isinstance(method, KTDAMethod)
    return method


def test_side_branch_ships_the_plain_network_and_its_loss_reaches_the_student() -> None:
    method = method_of(SIDE)
    plain = build_segmenter(recipe_of(PLAIN), TASK)
    assert method.deployable().state_dict().keys() == plain.state_dict().keys()
    assert method.deployable().tile == plain.tile
    method.training_step(batch_of(), 0).losses["distill"].backward()
    assert all(p.grad is not None for p in method.side.parameters())
    assert any(p.grad is not None for p in method.segmenter.student.parameters())
    assert all(p.grad is None for p in method.segmenter.decoder.parameters())


def test_decoder_sees_the_students_own_levels() -> None:
    method = method_of(SIDE).eval()
    images = batch_of()["labeled"].images
    levels = method.segmenter.student(images)
    assert torch.equal(method.segmenter.run(images).logits, method.segmenter.decoder(levels))


@pytest.mark.parametrize("part", [{"neck": {}}, {"fmm": {}}, {"fuse": True}])
def test_parts_that_act_on_the_outputs_of_fam_are_refused_beside_it(part: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="leave them out"):
        recipe_of(SIDE, **part)


def test_side_branch_without_a_teacher_is_refused() -> None:
    with pytest.raises(ValidationError, match="give a teacher or task_teacher"):
        recipe_of(PLAIN, fam={"path": "side"})


def test_probability_loss_is_the_divergence_over_valid_pixels() -> None:
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    valid = torch.rand(2, 4, 5) > 0.5
    p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
    expected = 4 * (p * (p / q).log()).sum(1)[valid].mean()
    torch.testing.assert_close(probability_loss(student, teacher, valid, 2.0), expected)
    assert probability_loss(student, student, valid, 2.0).item() == pytest.approx(0.0, abs=1e-6)
    assert probability_loss(student, teacher, torch.zeros_like(valid), 2.0).item() == 0.0


def test_task_teacher_pulls_the_student_and_stays_as_it_is(teacher: Path) -> None:
    method = taught(teacher, weight=3.0)
    batch = batch_of()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.5)
    before = {name: t.clone() for name, t in method.task_teacher.frozen.module.state_dict().items()}
    losses = []
    for step in range(8):
        loss = method.training_step(batch, step).losses["taught"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(before[name], t) for name, t in method.task_teacher.frozen.module.state_dict().items())
    assert not any("teacher" in name for name in method.state_dict())
    assert taught(teacher, weight=1.0).training_step(batch, 0).losses["taught"].item() == pytest.approx(losses[0] / 3)


def test_temperature_changes_what_is_learnt(teacher: Path) -> None:
    losses = {t: taught(teacher, temperature=t).training_step(batch_of(), 0).losses["taught"].item() for t in (1, 4)}
    assert losses[1] != losses[4]


def test_features_of_the_task_teacher_are_distilled_beside_its_probabilities(teacher: Path) -> None:
    losses = taught(teacher, PLAIN | {"fam": {"path": "side"}}).training_step(batch_of(), 0).losses
    assert set(losses) == {"seg", "distill", "taught"}


def test_backbone_that_teaches_features_and_probabilities_runs_once_on_the_labeled_images(teacher: Path) -> None:
    method = taught(teacher, PLAIN | {"fam": {"path": "side"}})
    backbone, batch, passes = method.distillation.teacher.module, batch_of(), []
    backbone.body.register_forward_hook(lambda *_: passes.append(1))
    once = method.training_step(batch, 0).losses
    assert len(passes) == 1
    expected = method.distillation.teacher_maps(batch["labeled"].images)
    logits, maps = method.task_teacher.logits(batch["labeled"].images)
    assert maps is not None
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(maps, expected, strict=True))
    assert not backbone._forward_hooks
    other = taught(teacher, PLAIN | {"fam": {"path": "side"}, "teacher_input": "student_normalized"})
    assert other.task_teacher.logits(batch["labeled"].images)[1] is None
    assert torch.equal(other.task_teacher.logits(batch["labeled"].images)[0], logits)
    assert other.training_step(batch, 0).losses["taught"].item() == pytest.approx(once["taught"].item())


def test_backbone_that_teaches_features_and_probabilities_is_divided_once(teacher: Path, tmp_path: Path) -> None:
    method = taught(teacher, PLAIN | {"fam": {"path": "side"}})
    batch = batch_of()
    torch.manual_seed(0)
    expected = method(batch, 0).losses
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        shard(method, [], torch.device("cpu"), 1)
        assert all(map(is_shared, method.distillation.teacher.module.parameters()))
        torch.manual_seed(0)
        found = method(batch, 0).losses
    finally:
        dist.destroy_process_group()
    assert {name: loss.item() for name, loss in found.items()} == pytest.approx(
        {name: loss.item() for name, loss in expected.items()}
    )


def test_unlabeled_crops_are_taught_by_the_weak_view_to_the_strong_one(teacher: Path) -> None:
    method = taught(teacher, PLAIN | {"student": {"name": "resnet_mini", "weights": "random"}}, unlabeled=True).eval()
    labeled, weak = batch_of()["labeled"], torch.rand(2, 3, 32, 32)
    valid = torch.ones(2, 32, 32, dtype=torch.bool)

    def loss(strong: torch.Tensor) -> float:
        batch = {"labeled": labeled, "unlabeled": Samples(weak, valid, strong=strong[:, None])}
        return method.training_step(batch, 0).losses["taught_unlabeled"].item()

    student = method.segmenter(weak)
    expected = probability_loss(student, method.task_teacher.logits(weak)[0], valid, 2.0).item()
    assert loss(weak) == pytest.approx(expected, rel=1e-5)
    assert loss(weak.flip(1)) != pytest.approx(expected, rel=1e-3)


def test_boxes_of_cutmix_hold_the_partners_pixels_and_what_the_teacher_says_of_them(teacher: Path) -> None:
    base = PLAIN | {"student": {"name": "resnet_mini", "weights": "random"}}
    weak, strong = torch.rand(2, 3, 32, 32), torch.rand(2, 1, 3, 32, 32)
    valid = torch.ones(2, 32, 32, dtype=torch.bool)
    labeled = batch_of()["labeled"]

    def loss(mix: torch.Tensor, images: torch.Tensor = weak, *, cutmix: bool = True) -> float:
        method = taught(teacher, base, unlabeled=True, cutmix=cutmix).eval()
        views = strong if images is weak else strong.flip(0)
        samples = Samples(images, valid, strong=views, mix=mix[:, None])
        return method.training_step({"labeled": labeled, "unlabeled": samples}, 0).losses["taught_unlabeled"].item()

    nowhere, everywhere = torch.zeros(2, 32, 32, dtype=torch.bool), torch.ones(2, 32, 32, dtype=torch.bool)
    half = nowhere.clone()
    half[:, :16] = True
    assert loss(everywhere) == pytest.approx(loss(nowhere, weak.flip(0)), rel=1e-5)  # the pair exchanged, whole
    assert loss(half) != pytest.approx(loss(nowhere), rel=1e-4)
    assert loss(half, cutmix=False) == loss(nowhere, cutmix=False)


def test_strong_views_do_not_enter_the_batch_norms(teacher: Path) -> None:
    base = PLAIN | {"student": {"name": "resnet_mini", "weights": "random"}}
    method = taught(teacher, base, unlabeled=True).train()
    alone = taught(teacher, base).train()
    labeled = batch_of()["labeled"]
    strong = torch.rand(2, 1, 3, 32, 32)
    unlabeled = Samples(strong[:, 0], torch.ones(2, 32, 32, dtype=torch.bool), strong=strong)
    method.training_step({"labeled": labeled, "unlabeled": unlabeled}, 0)
    alone.training_step({"labeled": labeled}, 0)
    means = [{n: t for n, t in m.segmenter.state_dict().items() if n.endswith("running_mean")} for m in (method, alone)]
    assert all(torch.equal(tensor, means[1][name]) for name, tensor in means[0].items())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"classes": rgb_task().classes[::-1]}, "the classes"),
        ({"bands": ("red", "nir", "green")}, "the bands red, nir, green"),
        ({"scale": (1e-4,) * 3}, "the scaling"),
    ],
)
def test_teacher_of_another_task_names_both_sides(change: dict[str, Any], what: str, tmp_path: Path) -> None:
    model = save_teacher(tmp_path / "other.safetensors", TASK.model_copy(update=change))
    with pytest.raises(RecipeError, match=f"{model} has {what}.*tiny has"):
        taught(model)


def test_missing_teacher_is_a_missing_model(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        taught(tmp_path / "none")


def test_one_run_teaches_the_next(rgb_dataset: Path, tmp_path: Path) -> None:
    shared = {"data": {"path": str(rgb_dataset), "augment": {"crop_size": 32}, "cache": False}}
    shared |= {"trainer": {"steps": 2, "batch_size": 2, "workers": 0, "eval_every": 2, "checkpoint_every": 1}}
    first = {"method": "supervised", "name": "t", "backbone": PLAIN["student"], "decoder": {"channels": 8}}
    teacher = train(recipe_from_dict(first | shared, "t"), output=tmp_path, progress=Progress()).run
    second = PLAIN | shared | {"task_teacher": {"model": str(teacher), "unlabeled": True}}
    second["data"] = shared["data"] | {"streams": {"unlabeled": {"split": "val"}}}
    result = train(recipe_from_dict(second, "s"), output=tmp_path, progress=Progress())
    assert result.state == "finished"
