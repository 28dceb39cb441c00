"""KTDA's training step and each option of it that departs from the publication."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from rsseg.config import EvalConfig
from rsseg.inference.image import predict_probabilities
from rsseg.methods.ktda.method import KTDAMethod, distillation_loss, weight_at
from rsseg.methods.ktda.network import build_segmenter
from rsseg.methods.ktda.recipe import DistillationConfig
from tests.unit.ktda_models import PLAIN, TASK, TAUGHT, batch_of, method_of, recipe_of


def losses_of(method: KTDAMethod, step: int = 0, **batch: Any) -> dict[str, float]:
    method.eval()  # no dropout, so that methods of equal weights compare
    return {name: float(loss.detach()) for name, loss in method(batch_of(**batch), step).losses.items()}


def maps(seed: int, *, scale: float = 1.0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(2, 6, 4, 5, generator=draw) for _ in range(2)]


def test_step_has_the_three_losses_and_every_trainable_parameter_a_gradient() -> None:
    method = method_of()
    losses = method(batch_of(), 0).losses
    assert set(losses) == {"seg", "aux", "distill"}
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None] == []


def test_losses_are_finite_without_a_single_label() -> None:
    losses = losses_of(method_of(), labeled=False)
    assert losses["seg"] == losses["aux"] == 0.0
    assert 0.0 < losses["distill"] < float("inf")


def test_plain_supervised_training_decodes_the_students_own_levels() -> None:
    method = method_of(PLAIN)
    assert set(losses_of(method)) == {"seg"}
    assert method.segmenter.decoder.in_channels == method.segmenter.student.info.channels
    assert method.deployable().tile.flexible


def test_teacher_never_trains_is_not_saved_and_does_not_ship() -> None:
    method = method_of()
    assert method.distillation is not None
    teacher = method.distillation.teacher.module
    before = copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.SGD([p for group in method.param_groups()["main"] for p in group.params], lr=0.1)
    torch.stack(list(method.train()(batch_of(), 0).losses.values())).sum().backward()
    optimizer.step()
    assert not teacher.training
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert not any("teacher" in name for name in method.state_dict())
    assert method.deployable().state_dict().keys() == build_segmenter(recipe_of(), TASK).state_dict().keys()


def test_weight_decay_exemption_by_name_leaves_biases_and_batch_norms_decaying() -> None:
    method = method_of()
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    decayed, exempt = ([names[id(p)] for p in group.params] for group in method.param_groups()["main"])
    assert all("norm" in name for name in exempt)
    assert any(name.endswith("bn.weight") for name in decayed)
    assert any(name.endswith("bias") for name in decayed)


@pytest.mark.parametrize(("rule", "groups"), [("norms_and_biases", 2), ("none", 1)])
def test_other_weight_decay_exemptions(rule: str, groups: int) -> None:
    method = method_of(weight_decay_exempt=rule)
    found = method.param_groups()["main"]
    assert len(found) == groups
    assert all(parameter.ndim > 1 for parameter in found[0].params) == (groups == 2)
    assert sum(len(group.params) for group in found) == len(list(method.parameters()))


def test_several_auxiliary_heads_share_the_weight() -> None:
    one = losses_of(method_of(aux=[{"level": 0, "channels": 8}]))
    two = losses_of(method_of(aux=[{"level": 0, "channels": 8}, {"level": 3, "channels": 8}]))
    assert two["aux_0"] == pytest.approx(one["aux"] / 2)
    assert set(two) == {"seg", "aux_0", "aux_1", "distill"}


def test_divisor_valid_ignores_unlabeled_pixels() -> None:
    batch = batch_of()
    batch["labeled"].masks[:, :16] = 255  # type: ignore[index]
    published, corrected = (
        method_of(loss_divisor=divisor).eval()(batch, 0).losses["seg"] for divisor in ("all", "valid")
    )
    assert corrected.item() == pytest.approx(2 * published.item())


def test_second_student_pass_changes_nothing_without_stochastic_depth() -> None:
    assert losses_of(method_of(student_passes=2)) == losses_of(method_of())


def test_second_student_pass_draws_another_sub_network_with_stochastic_depth() -> None:
    student = {"name": "convnext_mini", "weights": "random", "drop_path": 0.5}
    method = method_of(student=student, student_passes=2).train()
    torch.nn.init.ones_(method.segmenter.student.body.network.stages[3].blocks[0].gamma)  # type: ignore[union-attr]
    seen: list[Tensor] = []
    method.segmenter.student.register_forward_hook(lambda _module, _inputs, levels: seen.append(levels[-1]))
    method(batch_of(), 0)
    assert len(seen) == 2
    assert not torch.equal(seen[0], seen[1])


def test_teacher_can_see_the_batch_as_the_student_normalized_it() -> None:
    method, batch = method_of(teacher_input="student_normalized"), batch_of()
    assert method.distillation is not None
    teacher, images = method.distillation.teacher.module, batch["labeled"].images
    expected = teacher.forward_normalized(method.segmenter.student.normalize(images))  # type: ignore[operator]
    torch.testing.assert_close(list(method.distillation.teacher_maps(images)), list(expected))
    own = method_of(teacher_input="own").distillation
    assert own is not None
    assert not torch.allclose(own.teacher_maps(images)[0], expected[0])  # this pair has different statistics


def test_fused_levels_are_distilled_and_decoded_as_one_map() -> None:
    method = method_of(fuse=True, neck={"scales": [1]}, aux=[])
    student = method.segmenter.run(batch_of()["labeled"].images)
    assert len(student.aligned) == len(student.features) == 1
    assert losses_of(method)["distill"] > 0


def test_single_scale_distills_the_last_level_from_the_last_block() -> None:
    student = {"name": "convnext_mini", "weights": "random", "out_indices": [3]}
    teacher = {"name": "vit_mini_patch8", "weights": "random", "out_indices": [3], "out_norm": "last"}
    method = method_of(student=student, teacher=teacher, neck={"scales": [1]}, aux=[{"level": 0, "channels": 8}])
    assert set(losses_of(method)) == {"seg", "aux", "distill"}


def test_auto_grid_trains_on_images_that_are_not_square() -> None:
    assert losses_of(method_of(), height=32, width=64)["distill"] > 0


def test_halved_precision_teacher_gives_nearly_the_same_loss() -> None:
    half = {"name": "vit_mini_patch8", "weights": "random", "dtype": "bfloat16"}
    assert losses_of(method_of(teacher=half))["distill"] == pytest.approx(losses_of(method_of())["distill"], rel=0.05)


def test_alpha_zero_is_halved_as_published_or_not() -> None:
    student, teacher = maps(0), maps(1)
    published = distillation_loss(student, teacher, DistillationConfig(alpha=0))
    corrected = distillation_loss(student, teacher, DistillationConfig(alpha=0, alpha_zero_halving=False))
    assert corrected.item() == pytest.approx(2 * published.item())


def test_kl_averaged_over_distributions_does_not_grow_with_channels() -> None:
    summed = distillation_loss(maps(0), maps(1), DistillationConfig(alpha=1))
    averaged = distillation_loss(maps(0), maps(1), DistillationConfig(alpha=1, kl_reduction="mean"))
    assert summed.item() == pytest.approx(averaged.item() * 6 * 4, rel=1e-5)


def test_kl_axes_differ() -> None:
    values = {
        axis: distillation_loss(maps(0), maps(1), DistillationConfig(alpha=1, kl_axis=axis)).item()
        for axis in ("width", "height", "channel")
    }
    assert len(set(values.values())) == 3


def test_standardized_teacher_maps_take_outlying_channels_out() -> None:
    teacher = maps(1)
    spiked = [level * torch.tensor([1.0, 100.0, 1.0, 1.0, 1.0, 1.0]).view(-1, 1, 1) + 3.0 for level in teacher]
    settings = DistillationConfig(alpha=0, standardize=True)
    expected = distillation_loss(maps(0), teacher, settings).item()
    assert distillation_loss(maps(0), spiked, settings).item() == pytest.approx(expected, rel=1e-4)


def test_cosine_loss_replaces_both_terms() -> None:
    settings = DistillationConfig(loss="cosine")
    assert distillation_loss(maps(0), maps(0, scale=5.0), settings).item() == pytest.approx(0.0, abs=1e-6)


def test_weight_and_schedule_scale_the_distillation_only() -> None:
    plain, weighted = (losses_of(method_of(distillation={"weight": weight})) for weight in (1.0, 0.25))
    assert weighted["distill"] == pytest.approx(plain["distill"] / 4)
    assert weighted["seg"] == plain["seg"]
    ending = method_of(distillation={"decay": "linear"})
    assert losses_of(ending, step=9)["distill"] == 0.0


def test_weight_is_constant_unless_asked_for() -> None:
    assert {weight_at(DistillationConfig(), step, 10) for step in range(10)} == {1.0}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"warmup_steps": 4}, [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"decay": "linear"}, [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0]),
        ({"decay": "linear", "weight": 2.0}, [2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25, 0.0]),
        ({"warmup_steps": 4, "decay": "cosine"}, [0.0, 0.25, 0.5, 0.75, 1.0, 0.85355339, 0.5, 0.14644661, 0.0]),
    ],
)
def test_weight_schedules(settings: dict[str, Any], expected: list[float]) -> None:
    config = DistillationConfig.model_validate(settings)
    assert [weight_at(config, step, len(expected)) for step in range(len(expected))] == pytest.approx(expected)


@pytest.mark.parametrize("size", [(32, 32), (33, 50), (7, 5), (1, 1)])
def test_logits_have_the_size_of_the_image(size: tuple[int, int]) -> None:
    segmenter = method_of(TAUGHT).deployable().eval()
    assert segmenter.predict_logits(torch.rand(1, 3, *size)).shape == (1, 3, *size)


def test_fixed_grid_predicts_any_size_as_it_trains_without_padding() -> None:
    segmenter = method_of(fam={"grid": 4}).segmenter.eval()
    images = torch.rand(1, 3, 48, 80, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(segmenter.predict_logits(images), segmenter(images))
        assert segmenter.predict_logits(images[..., :20, :20]).shape == (1, segmenter.task.num_classes, 20, 20)
        tile = predict_probabilities(segmenter, images[0, :, :, :48], None, EvalConfig(tile=48), device="cpu")
        torch.testing.assert_close(tile, segmenter(images[..., :48])[0].softmax(0).permute(1, 2, 0))
