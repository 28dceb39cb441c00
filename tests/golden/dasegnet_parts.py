"""Golden cases of ST-DASegNet's modules and rules."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rsseg.layers.losses import cross_entropy, pixel_accuracy
from rsseg.methods.dasegnet.adversarial import PatchDiscriminator, gan_loss, spatial_softmax, upsampled
from rsseg.methods.dasegnet.importer import (
    rename_backbone,
    rename_decoder,
    rename_discriminator,
    rename_neck,
    rename_neck_level,
)
from rsseg.methods.dasegnet.neck import DisentangledLevel, DisentangledNeck
from rsseg.methods.dasegnet.network import build_decoder
from rsseg.methods.dasegnet.recipe import SelfTrainingConfig, TeacherConfig
from rsseg.methods.dasegnet.self_training import AVERAGED, Teacher, pseudo_labels
from tests.golden.dasegnet_build import decoder_config, grads, load_exactly, make_backbone, neck_values
from tests.golden.harness import Case, Handler

Rename = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def check_gradients(case: Case, module: nn.Module, rename: Rename, inputs: Mapping[str, Tensor]) -> None:
    for key, tensor in inputs.items():
        assert tensor.grad is not None
        case.check(tensor.grad, f"grad.{key}", "grad")
    actual = grads(module)
    expected = rename(case.group("grad.param"))
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, **case.tolerance("grad"), msg=lambda t, n=name: f"{n}: {t}")


def check_neck(case: Case, module: nn.Module, rename: Rename) -> None:
    load_exactly(module, rename(case.group("state")))
    source, target = ([x.requires_grad_() for x in case.sequence(key)] for key in ("x_s", "x_t"))
    if isinstance(module, DisentangledNeck):
        refined = module(source, target)
    else:
        refined = tuple((maps,) for maps in module(source[0], target[0]))
    objective = torch.zeros(())
    for style, maps in zip("st", refined, strict=True):
        for level, actual in enumerate(maps):
            case.check(actual, f"out_{style}.{level}")
            objective = objective + (actual * case.tensors[f"cot_{style}.{level}"]).sum()
    objective.backward()
    inputs = {f"x_s.{i}": x for i, x in enumerate(source)} | {f"x_t.{i}": x for i, x in enumerate(target)}
    check_gradients(case, module, rename, inputs)


def check_level(case: Case) -> None:
    config = case.meta["module"]
    module = DisentangledLevel(
        config["in_channels"],
        universal=config["type"] == "DS2Neck",
        reduction=config["r"],
        min_width=config["L"],
    )
    check_neck(case, module, rename_neck_level)


def check_levels(case: Case) -> None:
    config = case.meta["module"]
    check_neck(case, DisentangledNeck(config["in_channels"], **neck_values(config)), rename_neck)


def check_discriminator(case: Case) -> None:
    config = case.meta["module"]
    gan = config["gan_loss"]
    module = PatchDiscriminator(config["in_channels"], base_channels=config["base_channels"], convs=config["num_conv"])
    load_exactly(module, rename_discriminator(case.group("state")))
    feature = case.tensors["feature"].requires_grad_()
    softened = spatial_softmax(feature)
    case.check(softened, "sw_softmax")
    logits = module(softened)
    case.check(logits, "disc_out")
    judged = upsampled(logits, case.meta["image_size"])
    case.check(judged.expand_as(case.tensors["disc_out_resized"]), "disc_out_resized")

    def loss(real: bool) -> Tensor:
        values = {"real_value": gan["real_label_val"], "fake_value": gan["fake_label_val"]}
        return gan_loss(judged, real=real, kind=gan["gan_type"].lower(), **values)

    case.check(gan["loss_weight"] * loss(True), "loss_real")
    case.check(gan["loss_weight"] * loss(False), "loss_fake")
    case.check(loss(True), "loss_real_is_disc")
    (gan["loss_weight"] * (1000 * loss(True) + 300 * loss(False))).backward()
    check_gradients(case, module, rename_discriminator, {"feature": feature})


def check_gan_loss(case: Case) -> None:
    for row in case.meta["values"]:
        actual = gan_loss(
            case.tensors["input"],
            real=bool(row["target_is_real"]),
            kind=row["gan_type"].lower(),
            real_value=row["real_label_val"],
            fake_value=row["fake_label_val"],
        )
        weight = 1.0 if row["is_disc"] else row["loss_weight"]
        torch.testing.assert_close(float(weight * actual), row["value"], **case.tolerance("loss"))


def check_spatial_softmax(case: Case) -> None:
    x = case.tensors["x"].requires_grad_()
    out = spatial_softmax(x)
    case.check(out, "out")
    (out * case.tensors["cot"]).sum().backward()
    assert x.grad is not None
    case.check(x.grad, "grad.x", "grad")


def check_pseudo_labels(case: Case) -> None:
    for entry in case.meta["cases"]:
        tag = entry["tag"]
        config = SelfTrainingConfig(
            confidence=entry["pseudo_threshold"],
            rare_confidence=entry["pseudo_rare_threshold"],
            class_weights=entry["pseudo_class_weight"],
        )
        logits = case.tensors[f"{tag}.pred"]
        actual = pseudo_labels(logits, logits.shape[-2:], None, config)
        assert torch.equal(actual.labels, case.tensors[f"{tag}.label"].squeeze(1).long()), tag
        case.check(actual.weights, f"{tag}.weight", "weight")
        torch.testing.assert_close(float(actual.ratio), entry["ratio"], **case.tolerance("weight"))


class Bag(nn.Module):
    """Any module's tensors under their names: parameters those that `trained` lists, the others buffers."""

    def __init__(self, state: Mapping[str, Tensor], trained: set[str]) -> None:
        super().__init__()
        for name, tensor in state.items():
            key = name.replace(".", "/")
            if name in trained:
                self.register_parameter(key, nn.Parameter(tensor.clone()))
            else:
                self.register_buffer(key, tensor.clone())

    def fill(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in state.items():
                self.get_parameter(name.replace(".", "/")).copy_(tensor)


def check_ema(case: Case) -> None:
    kind = case.meta["type"]
    parts = dict(zip(AVERAGED[kind], ema_pairs(kind, case.meta["pairs"]), strict=True))
    student, fresh = nn.Module(), {}
    for part, (theirs, average) in parts.items():
        start = start_of_average(case, theirs, average)
        trained = set(case.group(f"step0.student.{theirs}"))
        student.add_module(part, Bag(start, trained))
        fresh[part] = Bag(start, trained)
    config = TeacherConfig(type=kind, decay=case.meta["decay"])
    teacher = Teacher(config, student, fresh.__getitem__)  # type: ignore[arg-type]
    for j, iteration in enumerate(case.meta["iters"]):
        for part, (theirs, _) in parts.items():
            bag = student.get_submodule(part)
            assert isinstance(bag, Bag)
            bag.fill(case.group(f"step{j}.student.{theirs}"))
        teacher.update(student, iteration - 1)  # type: ignore[arg-type]
        for part, (_, average) in parts.items():
            actual = dict(teacher.averaged(part).named_parameters())
            for name in case.group(f"step{j}.ema.{average}"):
                case.check(actual[name.replace(".", "/")], f"step{j}.ema.{average}.{name}", "ema")
    for part, (_, average) in parts.items():
        buffers = dict(teacher.averaged(part).named_buffers())
        for name, expected in case.group(f"final_buffers.{average}").items():
            assert torch.equal(buffers[name.replace(".", "/")], expected), name


def start_of_average(case: Case, theirs: str, average: str) -> dict[str, Tensor]:
    """The average before the first update.

    A recording by reference holds the values after the last update in `init`; the start then follows from the first
    update, which leaves the others to check.
    """
    start = case.group(f"init.{average}")
    first, last = (case.group(f"step{j}.ema.{average}") for j in (0, len(case.meta["iters"]) - 1))
    if all(torch.equal(start[name], value) for name, value in last.items()):
        alpha = case.meta["alphas"][0]
        student = case.group(f"step0.student.{theirs}")
        start |= {name: (value - (1 - alpha) * student[name]) / alpha for name, value in first.items()}
    return start


def ema_pairs(kind: str, pairs: Any) -> list[tuple[str, str]]:
    """The authors' (student, average) names in our order."""
    order = {"decoder_only_t": ("decode_head_s", "decode_head_t"), "single_t": ("backbone_t", "decode_head_t")}[kind]
    return [(theirs, dict(pairs)[theirs]) for theirs in order]


def check_head(case: Case) -> None:
    config = case.meta["module"]
    maps = [x.requires_grad_() for x in case.sequence("x")]
    channels = [level.shape[1] for level in maps]
    head = build_decoder(decoder_config(config), channels, config["num_classes"])
    load_exactly(head, rename_decoder(case.group("state")))
    head.eval()
    case.check(head(maps), "logits_eval")
    head.train()
    logits = head(maps)
    case.check(logits, "logits_train")
    labels = case.tensors["label"].squeeze(1).long()
    weights = config["loss_decode"]["class_weight"]
    by_class = None if weights is None else torch.tensor(weights)
    plain = cross_entropy(logits, labels, class_weights=by_class, divisor="all")
    weighted = cross_entropy(
        logits, labels, class_weights=by_class, pixel_weights=case.tensors["pixel_weight"], divisor="all"
    )
    case.check(plain, "loss_ce", "loss")
    case.check(weighted, "loss_ce_weighted", "loss")
    torch.testing.assert_close(pixel_accuracy(logits, labels).reshape(1), case.tensors["acc_seg"], rtol=1e-5, atol=1e-5)
    (plain + 0.25 * weighted).backward()
    used = {f"x.{i}": x for i, x in enumerate(maps) if x.grad is not None}
    assert {f"grad.{key}" for key in used} == {key for key in case.tensors if key.startswith("grad.x.")}
    check_gradients(case, head, rename_decoder, used)
    state = head.state_dict()
    for name, expected in rename_decoder(case.group("state_after")).items():
        torch.testing.assert_close(state[name], expected, **case.tolerance("forward"))


def check_mit(case: Case) -> None:
    backbone = make_backbone(case.meta["module"])
    load_exactly(backbone, rename_backbone(case.group("state")))
    x = case.tensors["x"].requires_grad_()
    maps = backbone(x)
    objective = torch.zeros(())
    for level, actual in enumerate(maps):
        case.check(actual, f"out.{level}")
        objective = objective + (actual * case.tensors[f"cot.{level}"]).sum()
    objective.backward()
    assert x.grad is not None
    case.check(x.grad, "grad.x", "grad")
    actual_grads = grads(backbone)
    for name, norm in case.meta["param_grad_norms"].items():
        # renaming splits a packed projection in two tensors, whose gradients add up to the recorded norm
        names = rename_backbone({name: case.tensors[f"state.{name}"]})
        total = sum(float(actual_grads[ours].double().square().sum()) for ours in names) ** 0.5
        torch.testing.assert_close(total, norm, **case.tolerance("param_grad_norms"), msg=lambda t, n=name: f"{n}: {t}")


HANDLERS: dict[str, Handler] = {
    "DSKNeck": check_level,
    "DS2Neck": check_level,
    "ML_DSKNeck": check_levels,
    "AdapSegDiscriminator": check_discriminator,
    "gan_loss": check_gan_loss,
    "sw_softmax": check_spatial_softmax,
    "pseudo_label": check_pseudo_labels,
    "ema": check_ema,
    "SegformerHead": check_head,
    "DepthwiseSeparableASPPHead": check_head,
    "MixVisionTransformer": check_mit,
}
