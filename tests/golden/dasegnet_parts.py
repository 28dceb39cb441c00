"""ST-DASegNet's golden cases of single modules and rules."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rsseg.layers.blocks import has_batch_norm
from rsseg.layers.losses import cross_entropy, pixel_accuracy
from rsseg.methods.dasegnet.adversarial import PatchDiscriminator, gan_loss, spatial_softmax, upsampled
from rsseg.methods.dasegnet.importer import (
    rename_backbone,
    rename_decoder,
    rename_discriminator,
    rename_neck,
    rename_neck_level,
)
from rsseg.methods.dasegnet.network import DisentangledLevel, DisentangledNeck, build_decoder
from rsseg.methods.dasegnet.recipe import NeckConfig, SelfTrainingConfig, TeacherConfig
from rsseg.methods.dasegnet.self_training import AVERAGED, Teacher, pseudo_labels
from tests.golden.builders import check_loss, grad_of, gradients, load_exactly, norm
from tests.golden.case import Case
from tests.golden.dasegnet_build import (
    decoder_config,
    discriminator_values,
    gan_values,
    make_backbone,
    neck_values,
)
from tests.golden.harness import Drivers
from tests.golden.settings import plain

Rename = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def check_gradients(case: Case, module: nn.Module, rename: Rename, inputs: Mapping[str, Tensor]) -> None:
    """Compare recorded gradients of inputs, and of all parameters or none."""
    recorded = {key for key in inputs if case.has(f"grad.{key}")}
    for key in sorted(recorded):
        case.check(grad_of(inputs[key]), f"grad.{key}", "grad")
    expected = rename(case.group("grad.param"))
    found = gradients(module)
    assert not expected or set(found) == set(expected), set(found) ^ set(expected)
    case.check_named(found, expected)


def check_neck(case: Case, module: nn.Module, rename: Rename) -> None:
    """Both outputs of every level, and gradients of sum(out * cotangent)."""
    load_exactly(module, rename(case.group("state")))
    source, target = ([x.requires_grad_() for x in case.sequence(key)] for key in ("x_s", "x_t"))
    if isinstance(module, DisentangledNeck):
        refined = module(source, target)
    else:
        refined = tuple((maps,) for maps in module(source[0], target[0]))
    compared = [case.check_maps(maps, f"out_{style}") for style, maps in zip("st", refined, strict=True)]
    assert all(compared), f"{case.name}: {compared} maps are recorded"
    cotangents = [case.sequence(f"cot_{style}") for style in "st"]
    if not all(cotangents):
        return
    torch.autograd.backward([*refined[0], *refined[1]], [*cotangents[0], *cotangents[1]])
    inputs = {f"x_s.{i}": x for i, x in enumerate(source)} | {f"x_t.{i}": x for i, x in enumerate(target)}
    check_gradients(case, module, rename, inputs)


def check_level(case: Case) -> None:
    config = case.meta["module"]
    settings = NeckConfig(reduction=config.get("r", 8), min_width=config.get("L", 8))
    module = DisentangledLevel(config["in_channels"], settings, universal=config["type"] == "DS2Neck")
    check_neck(case, module, rename_neck_level)


def check_levels(case: Case) -> None:
    config = case.meta["module"]
    check_neck(case, DisentangledNeck(plain(config["in_channels"]), NeckConfig(**neck_values(config))), rename_neck)


def check_discriminator(case: Case) -> None:
    """Softmax, logits, logits at image size, losses in both roles, and gradients of a weighted sum of losses."""
    config = case.meta["module"]
    gan = gan_values(config["gan_loss"])
    weight = gan.pop("weight")
    module = PatchDiscriminator(config["in_channels"], **discriminator_values(config))
    load_exactly(module, rename_discriminator(case.group("state")))
    feature = case.tensors["feature"].requires_grad_()
    softened = spatial_softmax(feature)
    logits = module(softened)
    resized = upsampled(logits, plain(case.meta["image_size"]))
    for key, actual in {"sw_softmax": softened, "disc_out": logits}.items():
        if case.has(key):
            case.check(actual, key)
    if case.has("disc_out_resized"):
        case.check(resized.expand_as(case.tensors["disc_out_resized"]), "disc_out_resized")

    def loss(real: bool, *, for_discriminator: bool) -> Tensor:
        value = gan_loss(resized, real=real, for_discriminator=for_discriminator, **gan)
        return value if for_discriminator else weight * value

    losses = {
        f"loss_{name}{suffix}": loss(real, for_discriminator=bool(suffix))
        for name, real in (("real", True), ("fake", False))
        for suffix in ("", "_is_disc")
    }
    for key, actual in losses.items():
        if case.has(key):
            case.check(actual, key)
    if "grad_objective" in case.meta:
        weighted_sum(case.meta["grad_objective"], losses).backward()
        check_gradients(case, module, rename_discriminator, {"feature": feature})


def weighted_sum(text: str, terms: Mapping[str, Tensor]) -> Tensor:
    """Value of `1000*loss_real + 300*loss_fake (comment)`."""
    parts = re.findall(r"(?:([\d.]+)\s*\*\s*)?([a-z]\w*)", text.partition("(")[0])
    assert parts, f"unknown objective {text!r}"
    assert all(name in terms for _, name in parts), f"unknown objective {text!r}"
    return torch.stack([float(factor or 1) * terms[name] for factor, name in parts]).sum()


def check_gan_loss(case: Case) -> None:
    """Compare the value of every row; the weight applies to generator losses only."""
    for i, row in enumerate(case.meta["values"]):
        values = gan_values(row)
        weight = values.pop("weight")
        for_discriminator = bool(row["is_disc"])
        actual = gan_loss(
            case.tensors[row.get("input", "input")],
            real=bool(row["target_is_real"]),
            for_discriminator=for_discriminator,
            **values,
        )
        case.close(f"row {i}, {values['loss']}", actual if for_discriminator else weight * actual, row["value"], "loss")


def check_spatial_softmax(case: Case) -> None:
    x = case.tensors["x"].requires_grad_()
    out = spatial_softmax(x)
    case.check(out, "out")
    if case.has("grad.x"):
        (out * case.tensors["cot"]).sum().backward()
        case.check(grad_of(x), "grad.x", "grad")


def check_pseudo_labels(case: Case) -> None:
    for entry in case.meta["cases"]:
        tag = entry["tag"]
        config = SelfTrainingConfig(
            confidence=entry["pseudo_threshold"],
            rare_confidence=entry["pseudo_rare_threshold"],
            class_weights=plain(entry["pseudo_class_weight"]),
            missing_class_weights="class_index",
        )
        logits = case.tensors[f"{tag}.pred"]
        actual = pseudo_labels(logits, logits.shape[-2:], None, config)
        labels = case.tensors[f"{tag}.label"]
        case.close(f"{tag}.label", actual.labels.reshape(labels.shape), labels, rtol=0.0, atol=0.0)
        case.check(actual.weights, f"{tag}.weight", "weight")
        case.close(f"{tag} ratio", actual.ratio, entry["ratio"], "weight")


class Bag(nn.Module):
    """Module that holds given tensors by name: those in `trained` as parameters, the others as buffers."""

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
    """Averaged parameters after every update; buffers keep their first values."""
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
            label = f"final_buffers.{average}.{name}"
            case.close(label, buffers[name.replace(".", "/")], expected, rtol=0.0, atol=0.0)


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
    """Eval and train logits, cross-entropy with and without pixel weights, accuracy, gradients, averages after."""
    config = case.meta["module"]
    maps = [x.requires_grad_() for x in case.sequence("x")]
    head = build_decoder(decoder_config(config), [level.shape[1] for level in maps], config["num_classes"])
    load_exactly(head, rename_decoder(case.group("state")))
    head.eval()
    case.check(head(maps), "logits_eval")
    if not case.has("logits_train"):
        return
    head.train()
    logits = head(maps)
    case.check(logits, "logits_train")
    labels = case.tensors["label"].reshape(-1, *case.tensors["label"].shape[-2:]).long()
    loss = check_loss(config)
    by_class = None if loss["class_weight"] is None else torch.tensor(plain(loss["class_weight"]))
    pixel_weights = {"loss_ce": None, "loss_ce_weighted": case.tensors.get("pixel_weight")}
    losses = {
        key: loss["loss_weight"]
        * cross_entropy(logits, labels, class_weights=by_class, pixel_weights=weights, divisor="all")
        for key, weights in pixel_weights.items()
        if case.has(key)
    }
    for key, value in losses.items():
        case.check(value, key, "loss")
    if case.has("acc_seg"):
        accuracy = pixel_accuracy(logits, labels).reshape(case.tensors["acc_seg"].shape)
        case.close("acc_seg", accuracy, case.tensors["acc_seg"], rtol=1e-5, atol=1e-5)
    if "objective" in case.meta:
        weighted_sum(case.meta["objective"], losses).backward()
        used = {f"x.{i}": x for i, x in enumerate(maps) if x.grad is not None}
        recorded = {key for key in case.tensors if key.startswith("grad.x.")}
        assert not recorded or {f"grad.{key}" for key in used} == recorded
        check_gradients(case, head, rename_decoder, used)
    case.check_named(head.state_dict(), rename_decoder(case.group("state_after")), "forward")


def check_backbone(case: Case) -> None:
    """Maps, gradients of sum(map * cotangent), and norms of the gradients of parameters."""
    backbone = make_backbone(case.meta["module"])
    load_exactly(backbone, rename_backbone(case.group("state")))
    if has_batch_norm(backbone) and not case.group("state_after"):
        backbone.eval()
    x = case.tensors["x"].requires_grad_()
    maps = backbone(x)
    assert case.check_maps(maps, "out")
    case.check_named(backbone.state_dict(), rename_backbone(case.group("state_after")), "forward")
    cotangents = case.sequence("cot")
    if not cotangents:
        return
    torch.autograd.backward(list(maps), cotangents)
    check_gradients(case, backbone, rename_backbone, {"x": x})
    found = gradients(backbone)
    for name, expected in case.meta.get("param_grad_norms", {}).items():
        # renaming splits a packed projection in two tensors, whose gradients add up to the recorded norm
        names = rename_backbone({name: case.tensors[f"state.{name}"]})
        case.close(f"gradient norm of {name}", norm(found[ours] for ours in names), expected, "param_grad_norms")


DRIVERS: Drivers = {
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
    "MixVisionTransformer": check_backbone,
    "ResNetV1c": check_backbone,
}
