"""RS-MTDF's training step, its ablations and each option that departs from the publication."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from rsseg.checkpoint import ModelHeader, write_model
from rsseg.errors import RecipeError
from rsseg.inference.network import ready_to_predict
from rsseg.layers.blocks import cutmix, resize
from rsseg.methods.mtdf.method import (
    MTDFMethod,
    PseudoLabels,
    build_method,
    complementary_masks,
    ema_ratio,
    pseudo_label_loss,
)
from rsseg.methods.mtdf.network import MTDFSegmenter, build_segmenter
from rsseg.methods.registry import load_model
from tests.unit.mtdf_models import FIXMATCH, PYRAMID, TASK, TAUGHT, TEACHERS, VIT, batch_of, method_of, recipe_of


def total(method: MTDFMethod, **batch: Any) -> torch.Tensor:
    return torch.stack(list(method.train()(batch_of(**batch), 0).losses.values())).sum()


def train_one_step(method: MTDFMethod, step: int = 0) -> None:
    optimizer = torch.optim.SGD([p for group in method.param_groups()["main"] for p in group.params], lr=0.1)
    total(method).backward()
    optimizer.step()
    method.after_optimizer_step(step)


@pytest.mark.parametrize(
    ("changes", "losses"),
    [
        ({}, {"seg", "pseudo", "distill"}),
        ({"teachers": TEACHERS[:1]}, {"seg", "pseudo", "distill"}),
        ({"teachers": []}, {"seg", "pseudo"}),
        ({"fusion": False}, {"seg", "pseudo", "distill"}),
        ({"teachers": [], "unlabeled": False}, {"seg"}),
        ({"unlabeled": False}, {"seg", "distill"}),
        ({"strong_views": 2}, {"seg", "pseudo", "distill"}),
        ({"strong_views": 2, "complementary_dropout": True}, {"seg", "pseudo", "distill"}),
        ({"teachers": [TEACHERS[1] | {"student_pass": "shared"}]}, {"seg", "pseudo", "distill"}),
        ({"teachers": [TEACHERS[1] | {"grid": "student", "standardize": True}]}, {"seg", "pseudo", "distill"}),
        ({"student": PYRAMID}, {"seg", "pseudo", "distill"}),
    ],
    ids=[
        "published",
        "one-teacher",
        "fixmatch",
        "no-fusion",
        "supervised",
        "distillation-only",
        "two-strong-views",
        "complementary-dropout",
        "shared-pass",
        "standardized",
        "pyramid-student",
    ],
)
def test_every_ablation_has_its_losses_and_a_gradient_for_every_trainable_parameter(
    changes: dict[str, Any], losses: set[str]
) -> None:
    method = method_of(**changes)
    output = method.train()(batch_of(views=changes.get("strong_views", 1)), 0)
    assert set(output.losses) == losses
    assert all(torch.isfinite(loss) for loss in output.losses.values())
    torch.stack(list(output.losses.values())).sum().backward()
    assert [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None] == []
    grouped = [id(p) for group in method.param_groups()["main"] for p in group.params]
    assert sorted(grouped) == sorted(id(p) for p in method.parameters() if p.requires_grad)


def test_losses_share_the_weight_equally_unless_the_recipe_says_otherwise() -> None:
    assert method_of().loss_weights["seg"] == pytest.approx(1 / 3)
    assert method_of(FIXMATCH).loss_weights["pseudo"] == pytest.approx(1 / 2)
    assert method_of(FIXMATCH, unlabeled=False).loss_weights["seg"] == 1.0
    assert method_of(distill_weight=0.1).loss_weights["distill"] == 0.1


def test_batch_without_labels_or_data_gives_exactly_zero() -> None:
    losses = method_of().train()(batch_of(labels=False, valid=False), 0).losses
    assert losses["seg"].item() == losses["pseudo"].item() == 0.0
    assert torch.isfinite(losses["distill"])


def test_teachers_never_train_are_not_saved_and_do_not_ship() -> None:
    method = method_of()
    before = {n: copy.deepcopy(t.frozen.module.state_dict()) for n, t in method.teachers.items()}  # type: ignore[union-attr, operator]
    train_one_step(method)
    for name, teacher in method.teachers.items():
        assert not teacher.frozen.module.training  # type: ignore[union-attr]
        after = teacher.frozen.module.state_dict()  # type: ignore[union-attr, operator]
        assert all(torch.equal(before[name][key], after[key]) for key in after)
    assert not any("teachers" in name for name in method.state_dict())
    assert method.deployable().state_dict().keys() == build_segmenter(recipe_of(), TASK).state_dict().keys()


def test_average_starts_as_the_first_student_and_then_follows() -> None:
    method = method_of()
    assert method.average is not None
    train_one_step(method, step=0)
    student, average = (m.state_dict() for m in (method.student, method.average.module))
    assert all(torch.equal(student[name], average[name]) for name in student)
    train_one_step(method, step=1)
    changed = [name for name in student if not torch.equal(method.student.state_dict()[name], average[name])]
    assert len(changed) > len(student) // 2
    assert [ema_ratio(step, 0.996) for step in (0, 1, 3, 10**6)] == [0.0, 0.5, 0.75, 0.996]


def test_the_average_ships_if_the_recipe_says_so() -> None:
    method = method_of(ship="average")
    assert method.average is not None
    assert method.deployable() is method.average.module
    plain = method_of()
    assert plain.deployable() is plain.student


@pytest.mark.parametrize("student", [VIT, PYRAMID], ids=["vit", "pyramid"])
@pytest.mark.parametrize("student_pass", ["resized", "shared"])
def test_prediction_with_folded_layers_equals_the_training_form(student: dict[str, Any], student_pass: str) -> None:
    teachers = [TEACHERS[0], TEACHERS[1] | {"student_pass": student_pass}]
    network = method_of(student=student, teachers=teachers).student.eval()
    images = batch_of()["labeled"].images
    expected = network.forward_translated(images).logits
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
    parameters = sum(p.numel() for p in network.parameters())
    network.fold()
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in network.parameters()) < parameters


def test_copy_for_prediction_is_folded_and_the_original_is_not() -> None:
    network = method_of().student.eval()
    images = batch_of()["labeled"].images
    copy_, _ = ready_to_predict(network, torch.device("cpu"), torch.float32)
    assert not any("predict" in name for name, _ in copy_.named_parameters() if name.startswith("translators"))
    with torch.inference_mode():
        torch.testing.assert_close(copy_(images), network.forward_translated(images).logits, rtol=1e-4, atol=1e-5)


def test_teacher_without_a_share_in_the_fusion_costs_nothing_at_prediction() -> None:
    calls: list[int] = []
    network = method_of(teachers=[TEACHERS[0], TEACHERS[1] | {"fusion_weight": 0.0}]).student.eval()
    network.backbone.register_forward_hook(lambda *_: calls.append(1))
    images = batch_of()["labeled"].images
    torch.testing.assert_close(network(images), network.forward_translated(images).logits, rtol=1e-4, atol=1e-5)
    network.fold()
    network(images)
    assert len(calls) == 1 + 2 + 1
    assert list(network.translators) == ["vit"]


def test_supervised_baseline_can_ship_its_average() -> None:
    method = method_of(FIXMATCH, unlabeled=False, ship="average")
    train_one_step(method)
    assert method.average is not None
    assert method.deployable() is method.average.module
    assert set(method(batch_of(), 1).losses) == {"seg"}


def test_student_can_start_from_the_model_of_another_run(tmp_path: Path) -> None:
    first = method_of().student
    file = tmp_path / "model.safetensors"
    header = ModelHeader(recipe_of().model_dump(mode="json"), TASK, backbones={}, training={}, made_with={})
    write_model(file, first.state_dict(), header)
    shared = [TEACHERS[0], TEACHERS[1] | {"student_pass": "shared"}]
    torch.manual_seed(9)
    second = build_method(recipe_of(teachers=shared, start=str(tmp_path)), TASK, load_model)
    assert second.average is not None
    for network in (second.student, second.average.module):
        assert all(torch.equal(tensor, first.state_dict()[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(RecipeError, match=r"the translators of .* that of this recipe"):
        build_method(recipe_of(start=str(file), translator_width=13), TASK, load_model)


def test_any_size_can_be_predicted() -> None:
    network = method_of().student.eval()
    assert isinstance(network, MTDFSegmenter)
    for size in ((1, 1), (33, 47), (8, 100)):
        assert network.predict_logits(torch.rand(1, 3, *size)).shape == (1, 3, *size)


def test_shared_pass_runs_the_student_once() -> None:
    calls: list[int] = []
    for student_pass, expected in (("resized", 2), ("shared", 1)):
        network = method_of(teachers=[TEACHERS[1] | {"student_pass": student_pass}]).student
        network.backbone.register_forward_hook(lambda *_: calls.append(1))
        calls.clear()
        network(torch.rand(1, 3, 32, 32))
        assert len(calls) == expected


@pytest.mark.parametrize("choice", ["own", "student_normalized"])
def test_teacher_sees_its_bands_in_its_size_with_the_statistics_that_the_recipe_names(choice: str) -> None:
    teacher = TEACHERS[1] | {"teacher_input": choice, "bands": ["blue"], "backbone": PYRAMID}
    method = method_of(teachers=[teacher])
    seen: list[torch.Tensor] = []

    def remember(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0])

    backbone = method.teachers["cnn"].frozen.module  # type: ignore[union-attr]
    backbone.body.register_forward_pre_hook(remember)  # type: ignore[union-attr, operator]
    method.training_step(batch_of(), 0)
    statistics = method.student.backbone.info if choice == "student_normalized" else backbone.info  # type: ignore[union-attr]
    band = 2 if choice == "student_normalized" else 0
    u = batch_of()["unlabeled"]
    assert u.strong is not None
    assert u.mix is not None
    blue = torch.cat([batch_of()["labeled"].images, cutmix(u.strong[:, 0], u.mix[:, 0])])[:, 2:]
    expected = (blue - statistics.mean[band]) / statistics.std[band]  # type: ignore[index, union-attr]
    assert seen[0].shape == (4, 1, 64, 64)
    torch.testing.assert_close(seen[0], resize(expected, (64, 64), align_corners=True), rtol=0, atol=1e-4)


def test_batch_norm_keeps_the_statistics_of_labeled_full_images_alone() -> None:
    student = {"name": "resnet_mini", "weights": "random"}
    crops = batch_of()["labeled"]

    def statistics(method: MTDFMethod) -> dict[str, torch.Tensor]:
        return {name: t for name, t in method.student.named_buffers() if "running" in name}

    method = method_of(student=student)
    alone = copy.deepcopy(method)
    total(method)
    alone.train().student.backbone(crops.images)
    assert len(statistics(alone)) > 10
    for name, recorded in statistics(alone).items():
        torch.testing.assert_close(statistics(method)[name], recorded)
    supervised = method_of(FIXMATCH, student=student, unlabeled=False)
    before = {name: t.clone() for name, t in statistics(supervised).items()}
    total(supervised)
    assert any(not torch.equal(t, before[name]) for name, t in statistics(supervised).items())


def test_cutmix_takes_the_box_from_the_mirrored_sample_at_once() -> None:
    x = torch.arange(3.0)[:, None, None].expand(3, 2, 2)
    mix = torch.zeros(3, 2, 2, dtype=torch.bool)
    mix[:, 0] = True
    mixed = cutmix(x, mix)
    assert mixed[:, 0, 0].tolist() == [2.0, 1.0, 0.0]
    assert torch.equal(mixed[:, 1], x[:, 1])
    assert torch.equal(cutmix(x[:, None], mix)[:, 0], mixed)


def test_confidence_is_the_softmax_maximum() -> None:
    logits = 5 * torch.randn(2, 4, 3, 3)
    found = PseudoLabels.of(logits, torch.ones(2, 3, 3, dtype=torch.bool))
    confidence, labels = logits.softmax(1).max(1)
    torch.testing.assert_close(found.confidence, confidence)
    assert torch.equal(found.labels, labels)


def test_divisor_confident_leaves_out_the_doubtful_pixels() -> None:
    logits = torch.randn(1, 3, 2, 2)
    confidence = torch.tensor([[[0.99, 0.5], [0.5, 0.99]]])
    pseudo = PseudoLabels(
        torch.zeros(1, 2, 2, dtype=torch.long), confidence, torch.tensor([[[True] * 2, [True, False]]])
    )
    valid, confident = (pseudo_label_loss(logits, pseudo, threshold=0.95, divisor=d) for d in ("valid", "confident"))
    assert confident.item() == pytest.approx(3 * valid.item())


def test_complementary_masks_split_the_channels_of_half_of_the_pairs() -> None:
    torch.manual_seed(0)
    masks = complementary_masks(5, 64)
    assert (masks[:5] + masks[5:] == 2).all()
    kept = (masks[:5] == 1).all(dim=1)
    assert int(kept.sum()) == 2
    assert set(masks[:5][~kept].unique().tolist()) == {0.0, 2.0}


def test_teachers_can_live_in_bfloat16() -> None:
    half = [t | {"backbone": t["backbone"] | {"dtype": "bfloat16"}} for t in TEACHERS]  # type: ignore[operator]
    method = method_of(TAUGHT, teachers=half)
    for teacher in method.teachers.values():
        assert next(teacher.frozen.module.parameters()).dtype == torch.bfloat16  # type: ignore[union-attr, operator]
    total(method).backward()
