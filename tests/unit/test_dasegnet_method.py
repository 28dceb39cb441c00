"""ST-DASegNet's step: who gets which gradient, what is batched, what the teacher does, and the switches."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.overrides import TorchFunctionMode

from rsseg.backbones.backbone import create_backbone
from rsseg.config import BackboneConfig
from rsseg.data.streams import training_batches
from rsseg.methods.dasegnet.adversarial import Alignment, PatchDiscriminator, adversarial_terms, gan_loss
from rsseg.methods.dasegnet.method import DASegNetMethod, split_norms
from rsseg.methods.dasegnet.recipe import AdversarialConfig, GanLoss
from rsseg.methods.dasegnet.self_training import class_mix, hide_patches
from rsseg.task import IGNORE_INDEX
from tests.conftest import rgb_task
from tests.unit.dasegnet_models import BATCH_NORM, make_batch, make_method, make_recipe


def test_adversarial_term_trains_features_and_discriminator_terms_train_discriminators_only() -> None:
    disc = PatchDiscriminator(4, base_channels=4, convs=1)
    own, other = (torch.randn(2, 4, 8, 8, requires_grad=True) for _ in range(2))
    terms = adversarial_terms(disc, Alignment(own, other, (64, 64), (64, 64)), AdversarialConfig(convs=1))
    terms.align.backward()
    assert other.grad is not None
    assert own.grad is None
    assert all(p.grad is None for p in disc.parameters())
    before = other.grad.clone()
    (terms.real + terms.fake).backward()
    assert torch.equal(other.grad, before)
    assert own.grad is None
    assert all(p.grad is not None for p in disc.parameters())


def test_weight_acts_on_discriminators_only_if_published() -> None:
    disc = PatchDiscriminator(4, base_channels=4, convs=1)
    alignment = Alignment(torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), (64, 64), (64, 64))
    published = adversarial_terms(disc, alignment, AdversarialConfig(weight=0.005))
    corrected = adversarial_terms(disc, alignment, AdversarialConfig(weight=0.005, weight_on_discriminators=False))
    torch.testing.assert_close(published.align, corrected.align)
    torch.testing.assert_close(published.real, 0.005 * corrected.real)


LOGITS = [-2.0, -0.5, 0.25, 3.0]
SOFTPLUS = (0.126928 + 0.474077 + 0.825939 + 3.048587) / 4
SOFTPLUS_OF_MINUS = (2.126928 + 0.974077 + 0.575939 + 0.048587) / 4


@pytest.mark.parametrize(
    ("loss", "for_discriminator", "real", "fake"),
    [
        ("vanilla", True, SOFTPLUS_OF_MINUS, SOFTPLUS),
        ("lsgan", True, (9 + 2.25 + 0.5625 + 4) / 4, (4 + 0.25 + 0.0625 + 9) / 4),
        ("l1", True, (3 + 1.5 + 0.75 + 2) / 4, (2 + 0.5 + 0.25 + 3) / 4),
        ("wgan", True, -0.1875, 0.1875),
        ("wgan", False, -0.1875, 0.1875),
        ("wgan-logistic-ns", True, SOFTPLUS_OF_MINUS, SOFTPLUS),
        ("hinge", True, (3 + 1.5 + 0.75 + 0) / 4, (0 + 0.5 + 1.25 + 4) / 4),
        ("hinge", False, -0.1875, -0.1875),
    ],
)
def test_gan_losses_of_known_values(loss: GanLoss, for_discriminator: bool, real: float, fake: float) -> None:
    logits = torch.tensor(LOGITS)
    for target, expected in ((True, real), (False, fake)):
        actual = gan_loss(logits, real=target, loss=loss, for_discriminator=for_discriminator)
        assert float(actual) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss", get_args(GanLoss))
def test_every_gan_loss_can_be_chosen(loss: GanLoss) -> None:
    """The student's loss raises the output on its features, and so does the discriminator's on real ones."""
    config = AdversarialConfig(loss=loss)
    logits = torch.tensor([-0.5, 0.25], requires_grad=True)
    for for_discriminator in (True, False):
        value = gan_loss(logits, real=True, loss=config.loss, for_discriminator=for_discriminator)
        assert (torch.autograd.grad(value, logits)[0] < 0).all()
    own, other = (torch.randn(2, 8, 12, 12, requires_grad=True) for _ in range(2))
    disc = PatchDiscriminator(8, base_channels=4, convs=1)
    terms = adversarial_terms(disc, Alignment(own, other, (64, 64), (64, 64)), config)
    assert all(term.isfinite() for term in (terms.align, terms.real, terms.fake))


def test_source_and_target_as_one_batch_give_the_same_numbers_as_apart() -> None:
    joint = make_method()
    apart = copy.deepcopy(joint)
    apart.segmenter.batching = False
    assert joint.segmenter.batching
    batch = make_batch()
    for method in (joint, apart):
        torch.stack(list(method(batch, 0).losses.values())).sum().backward()
    for (name, a), b in zip(joint.named_parameters(), apart.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}")


def test_batch_norm_sees_one_domain_at_a_time_and_the_target_last() -> None:
    method = make_method(backbone=BATCH_NORM)
    norm = method.segmenter.backbone_source.get_submodule("body.network.bn1")
    seen: list[torch.Tensor] = []
    norm.register_forward_hook(lambda _m, inputs, _out: seen.append(inputs[0].detach()))
    batch = make_batch()
    batch = {**batch, "target": replace(batch["target"], images=batch["target"].images + 10)}
    method.passes(batch)
    assert [len(maps) for maps in seen] == [2, 2]
    assert seen[1].abs().mean() > seen[0].abs().mean()


def test_teacher_that_starts_from_the_student_is_a_copy_and_one_that_does_not_is_not() -> None:
    def equal(method: DASegNetMethod) -> bool:
        assert method.teacher is not None
        own = method.teacher.averaged("decoder_target").state_dict()
        return all(torch.equal(own[name], v) for name, v in method.segmenter.decoder_target.state_dict().items())

    assert not equal(make_method())
    assert equal(make_method(self_training={"teacher": {"start": "student"}}))


def test_share_of_the_student_in_the_average_follows_the_step_of_the_run_also_after_a_resume() -> None:
    method = make_method()
    assert method.teacher is not None
    average = next(method.teacher.averaged("decoder_source").parameters())
    student = next(method.segmenter.decoder_source.parameters())
    before = average.detach().clone()
    method.after_optimizer_step(10)
    torch.testing.assert_close(average, before + (student.detach() - before) / 12)


def test_running_statistics_of_the_teacher_are_its_own_or_averaged() -> None:
    for buffers, mode in (("own", "train"), ("average", "eval")):
        method = make_method(self_training={"teacher": {"buffers": buffers, "mode": mode}})
        assert method.teacher is not None
        name = "fusion.bn.running_mean"
        method.segmenter.decoder_source.get_buffer(name).fill_(7.0)
        before = method.teacher.averaged("decoder_source").get_buffer(name).clone()
        method.after_optimizer_step(0)
        after = method.teacher.averaged("decoder_source").get_buffer(name)
        assert torch.equal(after, before) == (buffers == "own")


def test_teacher_keeps_its_mode_when_the_method_is_switched() -> None:
    for mode, buffers in (("train", "own"), ("eval", "average")):
        method = make_method(self_training={"teacher": {"mode": mode, "buffers": buffers}})
        method.eval()
        method.train()
        assert method.teacher is not None
        assert method.teacher.averaged("decoder_source").training == (mode == "train")


@pytest.mark.parametrize("kind", ["decoder_only_t", "single_t", "whole"])
@pytest.mark.parametrize("backbone", ["tokens", "batch_norm"])
def test_every_teacher_labels_without_a_graph(kind: str, backbone: str) -> None:
    chosen = {"backbone": BATCH_NORM} if backbone == "batch_norm" else {}
    method = make_method(**chosen, self_training={"confidence": 0.3, "teacher": {"type": kind}})
    passes = method.passes(make_batch())
    assert not passes.pseudo_views[0].pseudo.weights.requires_grad
    assert all(not p.requires_grad for p in method.teacher.parameters())  # type: ignore[union-attr]


def test_masked_consistency_adds_a_view_with_the_teachers_labels() -> None:
    method = make_method(self_training={"confidence": 0.3, "masked": {"patch": 16, "weight": 0.5}})
    passes = method.passes(make_batch())
    assert [view.name for view in passes.pseudo_views] == ["pseudo", "masked"]
    assert passes.pseudo_views[1].pseudo is passes.pseudo_views[0].pseudo
    assert passes.pseudo_views[1].weight == 0.5 * passes.pseudo_views[0].weight
    assert set(method(make_batch(), 0).losses) >= {"pseudo", "masked"}


def test_strong_view_changes_the_students_image_and_not_the_teachers() -> None:
    method = make_method(self_training={"confidence": 0.3, "student_view": "strong"})
    assert [spec.strong_views for spec in method.streams] == [0, 1]
    seen: list[torch.Tensor] = []
    method.segmenter.backbone_source.register_forward_hook(lambda _m, inputs, _out: seen.append(inputs[0]))
    batch = make_batch(strong=True)
    method.passes(batch)
    strong = batch["target"].strong
    assert strong is not None
    assert torch.equal(seen[0], torch.cat([batch["source"].images, batch["target"].images]))
    assert torch.equal(seen[1], strong[:, 0])


def test_class_mix_pastes_source_pixels_with_their_labels_at_full_weight() -> None:
    method = make_method(self_training={"confidence": 0.999, "class_mix": True})
    seen: list[torch.Tensor] = []
    method.segmenter.backbone_source.register_forward_hook(lambda _m, inputs, _out: seen.append(inputs[0]))
    batch = make_batch()
    pseudo = method.passes(batch).pseudo_views[0].pseudo
    source, mixed = batch["source"], seen[1]
    pasted = (mixed == source.images).all(1)
    assert 0 < pasted.float().mean() < 1
    assert source.masks is not None
    assert torch.equal(pseudo.labels[pasted], source.masks[pasted])
    assert (pseudo.weights[pasted] == 1).all()
    assert torch.equal(mixed[:, :, ~pasted[0]][0], batch["target"].images[:, :, ~pasted[0]][0])


def test_class_mix_takes_half_of_the_classes_and_never_ignored_pixels() -> None:
    masks = torch.tensor([[[0, 1, 2], [3, IGNORE_INDEX, 0]]])
    torch.manual_seed(0)
    for _ in range(5):
        pasted = class_mix(masks)
        assert len(masks[pasted].unique()) == 2
        assert not pasted[masks == IGNORE_INDEX].any()
    assert not class_mix(torch.full((1, 2, 2), IGNORE_INDEX)).any()


def test_hidden_patches_are_whole_squares_of_the_fill() -> None:
    images = torch.rand(2, 3, 40, 56) + 1
    hidden = (hide_patches(images, (0.0, 0.0, 0.0), patch=16, ratio=0.5) == 0).all(1)
    for top in range(0, 40, 16):
        for left in range(0, 56, 16):
            square = hidden[:, top : top + 16, left : left + 16].flatten(1)
            assert torch.equal(square.all(1), square.any(1))
    assert torch.equal(hide_patches(images, (0.0,) * 3, patch=16, ratio=0.0), images)
    assert (hide_patches(images, (0.5,) * 3, patch=16, ratio=1.0) == 0.5).all()


@pytest.mark.parametrize(
    ("off", "losses"),
    [
        ({"adversarial": None, "self_training": None}, {"seg"}),
        ({"self_training": None}, {"seg", "adv_source", "adv_target", "disc_source", "disc_target"}),
        ({"adversarial": None}, {"seg", "pseudo"}),
        ({"neck": None}, {"seg", "pseudo", "adv_source", "adv_target", "disc_source", "disc_target"}),
    ],
)
def test_each_ablation_is_one_switch(off: dict[str, None], losses: set[str]) -> None:
    method = make_method(**off)
    assert set(method(make_batch(), 0).losses) == losses
    assert set(method.param_groups()) == set(method.recipe.optimizers)
    assert [spec.name for spec in method.streams] == (["source"] if losses == {"seg"} else ["source", "target"])


def test_decoders_learn_faster_only_if_asked() -> None:
    scales = [group.lr_scale for group in make_method(head_lr_scale=10.0).param_groups()["main"]]
    assert scales[-1] == 10.0
    assert set(scales[:-1]) == {1.0}
    assert {group.lr_scale for group in make_method().param_groups()["main"]} == {1.0}


def test_published_weight_decay_exempts_as_many_norm_tensors_as_the_authors_code() -> None:
    config = BackboneConfig(name="mit_b5", weights="random")
    with torch.device("meta"):
        backbone = create_backbone(config, rgb_task(), load_weights=False)
    _, exempt = split_norms((backbone,), "names_with_norm")
    assert len(exempt) == 314
    assert len(split_norms((backbone,), "norms")[1]) == 322
    assert split_norms((backbone,), "none")[1] == []


def test_target_masks_are_never_opened(rgb_dataset: Path) -> None:
    for number in (1, 3):  # the northern images of the training split
        (rgb_dataset / "masks" / f"{number:02d}.png").write_bytes(b"not an image")
    data = {
        "path": rgb_dataset,
        "cache": False,
        "augment": {"crop_size": 64},
        "streams": {"source": {"domain": "south"}, "target": {"domain": "north"}},
    }
    method = make_method(data=data)
    recipe = make_recipe(data=data, trainer={"batch_size": 2, "workers": 0})
    batches = training_batches(recipe, method.streams, rgb_task(), device="cpu", start_step=0)
    for _ in range(3):
        batch = next(batches)
        assert batch["target"].masks is None
        assert all(loss.isfinite() for loss in method(batch, 0).losses.values())


def test_students_look_at_plain_target_images_only_if_a_loss_or_the_teacher_needs_it() -> None:
    seen: list[int] = []
    for kind, forwards in (("whole", 2), ("decoder_only_t", 2)):
        method = make_method(adversarial=None, self_training={"class_mix": True, "teacher": {"type": kind}})
        seen.clear()
        hook = method.segmenter.backbone_source.register_forward_hook(
            lambda _m, inputs, _o: seen.append(len(inputs[0]))
        )
        losses = method(make_batch(), 0).losses
        hook.remove()
        assert set(losses) == {"seg", "pseudo"}
        assert len(seen) == forwards
        assert seen[0] == (2 if kind == "whole" else 4)


class _Types(TorchFunctionMode):
    """Notes the type of what certain functions are given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("softmax", "bmm", "cross_entropy", "binary_cross_entropy_with_logits"):
            self.seen.setdefault(func.__name__, set()).add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_energies_softmax_and_losses_stay_in_single_precision_under_autocast() -> None:
    method = make_method(backbone=BATCH_NORM)
    with _Types() as types, torch.autocast("cpu", torch.bfloat16):
        losses = method(make_batch(), 0).losses
        mixed = method.segmenter.backbone_source(make_batch()["source"].images)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert types.seen["softmax"] == {torch.float32}
    assert types.seen["cross_entropy"] == types.seen["binary_cross_entropy_with_logits"] == {torch.float32}
    assert torch.float32 in types.seen["bmm"]
    assert mixed[-1].dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_students_side_by_side_give_the_same_gradients() -> None:
    alone = make_method().cuda()
    beside = copy.deepcopy(alone)
    beside.segmenter.side_by_side = True
    batch = {
        name: replace(
            samples,
            images=samples.images.cuda(),
            valid=samples.valid.cuda(),
            masks=None if samples.masks is None else samples.masks.cuda(),
        )
        for name, samples in make_batch().items()
    }
    for method in (alone, beside):
        torch.stack(list(method(batch, 0).losses.values())).sum().backward()
    torch.cuda.synchronize()
    for a, b in zip(alone.parameters(), beside.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
