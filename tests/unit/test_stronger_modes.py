"""What the stronger modes add: a start model, thresholds by class, a ramp, and one plain network in DASegNet."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rsseg.checkpoint import write_model
from rsseg.config import BaseRecipe
from rsseg.data.streams import Batch
from rsseg.errors import RecipeError
from rsseg.methods.base import Method, Segmenter
from rsseg.methods.dasegnet.single import SingleMethod
from rsseg.methods.mtdf.method import ClassThresholds, PseudoLabels, pseudo_label_loss
from rsseg.methods.registry import import_checkpoint, load_model, method_for, segmenter_for
from rsseg.recipe import Recipe, recipe_from_dict
from rsseg.task import ClassInfo, Task
from rsseg.training.checkpoints import model_header
from tests.conftest import rgb_task
from tests.unit import dasegnet_models, mtdf_models

TASK = rgb_task()
PYRAMID = {"name": "resnet_mini", "weights": "random"}
HEAD = {"type": "segformer", "channels": 8}
COMMON = {"name": "tiny", "data": {"path": "unused", "augment": {"crop_size": 64}}}
TEACHER = {"type": "whole", "start": "student", "mode": "eval", "buffers": "average"}
TRAINING = {
    "supervised": {"backbone": PYRAMID, "decoder": HEAD},
    "ktda": {"student": PYRAMID, "decoder": HEAD},
    "mtdf": {"student": PYRAMID, "decoder": HEAD},
    "dasegnet": {"backbone": PYRAMID, "single": {"decoder": HEAD}, "self_training": {"teacher": TEACHER}},
}


def recipe_of(method: str, **changes: Any) -> Recipe:
    return recipe_from_dict({"method": method, **COMMON, **TRAINING[method], **changes}, "tiny")


def method_of(method: str, **changes: Any) -> Method:
    torch.manual_seed(1)
    return method_for(recipe_of(method, **changes), TASK)


def written(segmenter: Segmenter, recipe: BaseRecipe, folder: Path) -> Path:
    """The network as the model of a run."""
    folder.mkdir(exist_ok=True)
    write_model(folder / "model.safetensors", segmenter.state_dict(), model_header(recipe, segmenter, {}))
    return folder


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """A supervised run whose weights are unlike any new network's."""
    torch.manual_seed(7)
    recipe = recipe_of("supervised")
    segmenter = segmenter_for(recipe, TASK)
    with torch.no_grad():
        for parameter in segmenter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return written(segmenter, recipe, tmp_path / "run")


@pytest.mark.parametrize(
    ("method", "stream"), [("mtdf", "labeled"), ("mtdf", "unlabeled"), ("dasegnet", "source"), ("dasegnet", "target")]
)
def test_one_image_of_any_stream_is_refused_where_a_norm_would_see_one_value(method: str, stream: str) -> None:
    head = {"type": "upernet", "channels": 8}
    part = {"single": {"decoder": head}} if method == "dasegnet" else {"decoder": head}
    assert recipe_of(method, trainer={"batch_size": 2}, **part)
    with pytest.raises(RecipeError, match=r"'upernet' needs two images"):
        recipe_of(method, trainer={"batch_size": 2, "stream_batch_sizes": {stream: 1}}, **part)


def predicted(segmenter: torch.nn.Module) -> torch.Tensor:
    return segmenter.eval()(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("method", TRAINING)
def test_every_method_can_start_from_a_supervised_run_and_then_predicts_as_it_does(method: str, tuned: Path) -> None:
    wanted = predicted(load_model(tuned))
    assert not torch.equal(predicted(method_of(method).deployable()), wanted)
    torch.testing.assert_close(predicted(method_of(method, start=str(tuned)).deployable()), wanted)


def test_averages_that_label_images_start_from_the_run_too(tuned: Path) -> None:
    wanted = predicted(load_model(tuned))
    mtdf = method_of("mtdf", start=str(tuned))
    torch.testing.assert_close(predicted(mtdf.get_submodule("average.module")), wanted)
    single = method_of("dasegnet", start=str(tuned))
    assert isinstance(single, SingleMethod)
    assert single.teacher is not None
    torch.testing.assert_close(predicted(single.teacher.averaged("segmenter")), wanted)


def test_both_students_start_from_the_run_and_keep_a_new_neck(tuned: Path) -> None:
    pair = method_of("dasegnet", single=None, decoder=HEAD | {"dropout": 0.1}, adversarial=None, start=str(tuned))
    net = pair.deployable()
    first, second = net.get_submodule("backbone_source"), net.get_submodule("backbone_target")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_low_rank_adapters_start_on_the_tuned_weights(tmp_path: Path) -> None:
    vit = {"backbone": {"name": "vit_mini_patch8", "weights": "random"}, "decoder": {"type": "linear"}}
    torch.manual_seed(7)
    run = written(segmenter_for(recipe_of("supervised", **vit), TASK), recipe_of("supervised", **vit), tmp_path / "vit")
    adapted = method_of("supervised", **vit, tune="lora", start=str(run)).deployable()
    torch.testing.assert_close(predicted(adapted), predicted(load_model(run)))


def test_start_model_of_another_network_is_refused_with_both_named(tuned: Path) -> None:
    other = {"name": "convnext_mini", "weights": "random"}
    with pytest.raises(RecipeError, match=r"start: the backbone of .*run is resnet_mini .*is convnext_mini"):
        method_of("supervised", backbone=other, start=str(tuned))
    with pytest.raises(RecipeError, match=r"the decoder of .*run is SegFormerHead .*is LinearHead"):
        method_of("supervised", decoder={"type": "linear"}, start=str(tuned))


def test_start_model_of_other_classes_is_refused_with_both_named(tuned: Path) -> None:
    classes = (*TASK.classes[:-1], ClassInfo(name="elsewhere", value=77, color=(1, 2, 3)))
    task = Task.model_validate(TASK.model_dump() | {"name": "other", "classes": [c.model_dump() for c in classes]})
    with pytest.raises(RecipeError, match=r"start: .*run has the classes .*other has .*elsewhere"):
        method_for(recipe_of("supervised", start=str(tuned)), task)


def test_convolutional_student_with_a_plain_decoder_takes_crops_of_any_size() -> None:
    crop = {"path": "unused", "augment": {"crop_size": 62}}
    network = method_of("mtdf", data=crop).deployable()
    assert network(torch.rand(2, 3, 62, 62)).shape == (2, 3, 62, 62)
    with pytest.raises(RecipeError, match="62 pixels are not a multiple of"):
        method_of("mtdf", data=crop, decoder=None)


def test_link_to_the_newest_run_is_replaced_by_the_run_that_it_names_now(tuned: Path) -> None:
    latest = tuned.parent / "latest"
    latest.symlink_to(tuned.name)
    assert recipe_of("supervised", start=str(latest)).start == tuned
    teacher = {"model": str(latest)}
    recipe = recipe_of("ktda", task_teacher=teacher)
    assert recipe.method == "ktda"
    assert recipe.task_teacher is not None
    assert recipe.task_teacher.model == tuned
    within = recipe_of("supervised", start=str(latest / "model.safetensors"))
    assert within.start == tuned / "model.safetensors"


def test_threshold_of_an_uncertain_class_falls_and_that_of_the_most_certain_stays() -> None:
    thresholds = ClassThresholds(3, 0.9, momentum=0.5)
    labels = torch.tensor([[[0, 0, 1, 1]]])
    pseudo = PseudoLabels(labels, torch.tensor([[[1.0, 1.0, 0.5, 0.7]]]), torch.ones_like(labels, dtype=torch.bool))
    torch.testing.assert_close(thresholds(pseudo), torch.tensor([0.9, 0.9 * 0.8, 0.9]))
    assert thresholds.state_dict().keys() == {"running_mean"}
    invalid = PseudoLabels(labels, pseudo.confidence, torch.zeros_like(pseudo.valid))
    torch.testing.assert_close(thresholds(invalid), torch.tensor([0.9, 0.72, 0.9]))


def test_pixels_count_by_the_threshold_of_their_class() -> None:
    labels = torch.tensor([[[0, 1]]])
    pseudo = PseudoLabels(labels, torch.tensor([[[0.7, 0.7]]]), torch.ones_like(labels, dtype=torch.bool))
    limits = torch.tensor([0.8, 0.6])
    assert pseudo.confident(limits).tolist() == [[[False, True]]]
    logits = torch.randn(1, 2, 1, 2, requires_grad=True)
    pseudo_label_loss(logits, pseudo, threshold=limits).backward()
    assert logits.grad is not None
    assert logits.grad[..., 0].abs().sum() == 0
    assert logits.grad[..., 1].abs().sum() > 0


def test_thresholds_by_class_let_more_pixels_in() -> None:
    def ratio(adaptive: bool) -> float:
        method = mtdf_models.method_of(mtdf_models.FIXMATCH, confidence=0.5, class_thresholds=adaptive).train()
        for step in range(30):
            output = method(mtdf_models.batch_of(), step)
        return output.logs["confident_ratio"].item()

    assert ratio(True) > ratio(False)


def test_weight_of_pseudo_labels_grows_over_its_part_of_the_run() -> None:
    trainer = {"steps": 8}
    base = mtdf_models.FIXMATCH | {"trainer": trainer, "confidence": 0.0}

    def loss(step: int, **changes: Any) -> float:
        return mtdf_models.method_of(base, **changes).eval()(mtdf_models.batch_of(), step).losses["pseudo"].item()

    full = loss(0)
    ramped = [loss(step, pseudo_ramp=0.5) for step in (0, 1, 3, 7)]
    assert ramped == pytest.approx([full / 4, full / 2, full, full])


def single_of(**self_training: Any) -> SingleMethod:
    torch.manual_seed(0)
    config = {"teacher": TEACHER, "confidence": 0.3} | self_training
    recipe = dasegnet_models.make_recipe(
        backbone=PYRAMID,
        single={"decoder": HEAD | {"dropout": 0.0}},
        decoder={},
        adversarial=None,
        self_training=config,
    )
    method = method_for(recipe, TASK)
    assert isinstance(method, SingleMethod)
    return method.train()


def losses(method: SingleMethod, batch: Batch) -> dict[str, float]:
    torch.manual_seed(5)
    return {name: loss.item() for name, loss in method(batch, 0).losses.items()}


def test_single_network_learns_labels_and_pseudo_labels_and_ships_alone() -> None:
    method, batch = single_of(), dasegnet_models.make_batch()
    output = method(batch, 0)
    assert set(output.losses) == {"seg", "pseudo"}
    assert {name.partition(".")[0] for name, _ in method.deployable().named_children()} == {"backbone", "decoder"}
    sum(output.losses.values()).backward()
    assert [name for name, p in method.network.named_parameters() if p.grad is None] == []


def test_each_harder_view_of_the_target_changes_the_loss() -> None:
    batch = dasegnet_models.make_batch(strong=True)
    same = losses(single_of(), batch)
    assert losses(single_of(student_view="strong"), batch)["pseudo"] != same["pseudo"]
    assert losses(single_of(class_mix=True), batch)["pseudo"] != same["pseudo"]
    assert "masked" in losses(single_of(masked={"patch": 16}), batch)
    assert all(losses(single_of(student_view="strong"), batch)[k] == same[k] for k in ("seg",))


def test_teacher_of_the_single_network_follows_it() -> None:
    method = single_of()
    assert method.teacher is not None
    average = method.teacher.averaged("segmenter")
    with torch.no_grad():
        for parameter in method.network.parameters():
            parameter.add_(1.0)
    before = [p.clone() for p in average.parameters()]
    method.after_optimizer_step(0)
    for old, new, own in zip(before, average.parameters(), method.network.parameters(), strict=True):
        torch.testing.assert_close(new, (old + own) / 2)


def test_batch_norms_record_the_source_only() -> None:
    method = single_of(student_view="strong", class_mix=True, masked={"patch": 16})
    recorded = {name: b for name, b in method.network.named_buffers() if "running" in name}
    alone = single_of(student_view="strong")
    method(dasegnet_models.make_batch(strong=True), 0)
    with torch.no_grad():
        alone.network(dasegnet_models.make_batch()["source"].images)
    expected = dict(alone.network.named_buffers())
    assert all(torch.allclose(tensor, expected[name]) for name, tensor in recorded.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neck": {"type": "ds2"}}, "neck: belongs to the two students"),
        ({"decoder": {"channels": 8}}, "decoder: belongs to the two students"),
        ({"self_training": {"confidence": 0.3}}, "single needs {type: whole, start: student}"),
    ],
)
def test_parts_of_the_pair_beside_a_single_network_are_refused(changes: dict[str, Any], message: str) -> None:
    values = {"single": {"decoder": HEAD}, "decoder": {}, "adversarial": None, "self_training": None} | changes
    with pytest.raises(ValidationError, match=message):
        dasegnet_models.make_recipe(**values)


def test_authors_checkpoints_have_two_students(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="two students"):
        import_checkpoint(tmp_path / "x.pth", recipe_of("dasegnet"), TASK, output=tmp_path / "y")
