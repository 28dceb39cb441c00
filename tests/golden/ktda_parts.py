"""Golden cases of KTDA's networks and modules, one at a time."""

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rsseg.backbones.bodies import resample_positions
from rsseg.layers.blocks import resize
from rsseg.layers.losses import cross_entropy, pixel_accuracy
from rsseg.methods.ktda.method import distillation_loss, make_aux_head
from rsseg.methods.ktda.network import FeatureAlignment, MultiLevelNeck, fused, make_decoder, make_fmm
from rsseg.methods.ktda.recipe import DistillationConfig
from tests.golden.builders import check_loss, grad_of, gradients, load_exactly, per_level, unnormalized
from tests.golden.case import Case
from tests.golden.harness import Drivers
from tests.golden.ktda_networks import (
    aux_config,
    decoder_config,
    distillation_config,
    fmm_config,
    load_backbone,
    own_names,
    student_body,
    student_names,
    teacher_body,
    teacher_names,
)
from tests.golden.settings import Settings, plain

Rename = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
Forward = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def convnext(case: Case) -> None:
    hyper = case.meta["hyper"]
    backbone = unnormalized(student_body(hyper), bands=hyper.get("in_channels", 3))
    tensors = student_names(case.group("sd"))
    load_backbone(backbone, tensors)
    check_backbone(case, backbone, student_names)


def vision_transformer(case: Case) -> None:
    hyper = case.meta["hyper"]
    patch, bands = hyper.get("patch_size", 16), hyper.get("in_channels", 3)
    backbone = unnormalized(teacher_body(hyper), patch=patch, bands=bands).eval()
    tensors = teacher_names(case.group("sd"))
    load_backbone(backbone, tensors)
    images = check_backbone(case, backbone, teacher_names)
    check_loaded_positions(case, backbone, tensors, images)


def check_backbone(case: Case, backbone: nn.Module, rename: Rename) -> list[Tensor]:
    """Maps of every image batch, `out.<batch>.<map>` or `out.<map>` of a single one, and gradients; returns the images.

    Any of the maps may be recorded: of a teacher the last one alone is used.
    """
    images = [image.requires_grad_() for image in case.sequence("in")]
    outputs = [backbone(image) for image in images]
    compared = sum(case.check_maps(maps, f"out.{j}") for j, maps in enumerate(outputs))
    if len(images) == 1 and not compared:
        compared = case.check_maps(outputs[0], "out")
    assert compared, f"{case.name}: no map is recorded"
    check_backward(case, backbone, [level for maps in outputs for level in maps], images, rename)
    return images


def check_loaded_positions(
    case: Case, backbone: nn.Module, tensors: Mapping[str, Tensor], images: list[Tensor]
) -> None:
    """Compare a checkpoint's position table after loading, and maps with it."""
    if "in.ckpt_pos_embed" not in case.tensors:
        return
    rows, columns = case.meta["fixed_grid_from_img_size"]
    table = resample_positions(case.tensors["in.ckpt_pos_embed"], (rows, columns), prefix=1, mode="bicubic")
    case.check(table, "out.loaded_pos_embed")
    load_backbone(backbone, {**tensors, **teacher_names({"pos_embed": table})})
    case.check_maps(backbone(images[0]), "out.loaded")


def fam(case: Case) -> None:
    hyper = case.meta["hyper"]
    hyper.expect("type", "FAM")
    widths = per_level(plain(hyper["out_channels"]), len(hyper["in_channels"]))
    module = FeatureAlignment(plain(hyper["in_channels"]), widths, grid=hyper["output_size"])
    check_module(case, module, "fam", lambda maps: module(maps, (0, 0)))


def neck(case: Case) -> None:
    hyper = case.meta["hyper"]
    hyper.expect("type", "MultiLevelNeck")
    module = MultiLevelNeck(plain(hyper["in_channels"]), hyper["out_channels"], scales=plain(hyper["scales"]))
    check_module(case, module, "neck", module)


def fmm(case: Case) -> None:
    hyper = case.meta["hyper"]
    module = make_fmm(fmm_config(hyper, case.meta.get("layernorm_eps", 1e-5)), plain(hyper["in_channels"]))
    check_module(case, module, "fmm", module)


def decode_head(case: Case) -> None:
    hyper = case.meta["hyper"]
    module = make_decoder(decoder_config(hyper, case.kind), plain(hyper["in_channels"]), hyper["num_classes"])
    check_head(case, module, "decode_head", plain(hyper["in_index"]))


def fcn_head(case: Case) -> None:
    hyper = case.meta["hyper"]
    head = make_aux_head(aux_config(hyper, level=0), [hyper["in_channels"]], hyper["num_classes"])
    check_head(case, head, "auxiliary_head", [hyper["in_index"]])


def check_module(case: Case, module: nn.Module, prefix: str, forward: Forward) -> None:
    """Outputs for the case's inputs, and gradients of sum(out * cot) if there are cotangents."""
    load_exactly(module, own_names(case.group("sd"), prefix))
    inputs = [level.requires_grad_() for level in case.sequence("in")]
    outputs = forward(inputs)
    assert case.check_maps(outputs, "out")
    check_backward(case, module, outputs, inputs, lambda tensors: own_names(tensors, prefix))


def _has_cotangents(case: Case) -> bool:
    return any(key.startswith("cot.") for key in case.tensors)


def check_backward(
    case: Case, module: nn.Module, outputs: Sequence[Tensor], inputs: Sequence[Tensor], rename: Rename
) -> None:
    """Gradients of sum(output * cotangent) for inputs and parameters."""
    if not _has_cotangents(case):
        return
    torch.autograd.backward(list(outputs), case.sequence("cot"))
    check_gradients(case, module, dict(enumerate(inputs)), rename)


def check_gradients(case: Case, module: nn.Module, inputs: Mapping[int, Tensor], rename: Rename) -> None:
    """Compare recorded gradients of parameters and inputs."""
    recorded = rename(case.group("grad.sd"))
    case.check_named(gradients(module), recorded)
    for i, level in inputs.items():
        if case.has(f"grad.in.{i}"):
            case.check(grad_of(level), f"grad.in.{i}", "grad")


def check_head(case: Case, head: nn.Module, prefix: str, levels: Sequence[int]) -> None:
    """Eval and train logits, cross-entropy, accuracy, gradients, and batch norm's averages after one pass."""
    load_exactly(head, own_names(case.group("sd"), prefix))
    hyper = case.meta["hyper"]
    inputs = {i: case.tensors[f"in.{i}"].requires_grad_() for i in levels}
    label = case.tensors["in.label"].squeeze(1).long()
    corners = hyper.get("align_corners", False)
    head.eval()
    logits = head(list(inputs.values()))
    case.check(logits, "out.eval_logits")
    if case.has("out.eval_logits_resized"):
        case.check(resize(logits, label.shape[-2:], align_corners=corners), "out.eval_logits_resized")
    if not case.has("out.train_logits"):
        return
    head.train()
    logits = head(list(inputs.values()))
    case.check(logits, "out.train_logits")
    logits = resize(logits, label.shape[-2:], align_corners=corners)
    loss = check_loss(hyper)["loss_weight"] * cross_entropy(logits, label, divisor="all")
    case.check(loss.reshape(1), "out.loss_ce")
    case.check(pixel_accuracy(logits, label).reshape(1), "out.acc_seg")
    loss.backward()
    if case.group("grad.sd"):
        check_gradients(case, head, inputs, lambda tensors: own_names(tensors, prefix))
    case.check_named(head.state_dict(), own_names(case.group("after"), prefix), "forward")


def distill_loss(case: Case) -> None:
    """Loss and gradients for every combination of settings, the terms along each axis, and an overflow."""
    for name, combo in case.meta["combos"].items():
        student = [level.requires_grad_() for level in case.sequence("in.student")]
        loss = distillation_loss(*_combined(combo, student, case.sequence("in.teacher")), distillation_config(combo))
        case.check(loss.reshape(1), f"out.{name}")
        if "loss" in combo:
            case.close(f"{name} loss", loss, combo["loss"])
        for i, gradient in enumerate(torch.autograd.grad(loss, student)):
            if case.has(f"grad.{name}.student.{i}"):
                case.check(gradient, f"grad.{name}.student.{i}", "grad")
        assert not combo.unread(), f"{case.name}: unknown settings {combo.unread()}"
    check_axes(case)
    check_overflow(case)


def check_axes(case: Case) -> None:
    """KL along each axis and the squared error, level by level."""
    for level, terms in case.meta.get("per_level_terms_T1_float64", {}).items():
        student, teacher = (case.tensors[f"in.{who}.{level.removeprefix('level')}"] for who in ("student", "teacher"))
        for name, expected in terms.items():
            kl = name.startswith("kl_")
            config = DistillationConfig(
                alpha=1 if kl else 0, kl_axis=name.removeprefix("kl_") if kl else "width", alpha_zero_halving=False
            )
            case.close(f"{level} {name}", distillation_loss([student.detach()], [teacher], config), expected)


def check_overflow(case: Case) -> None:
    """Where the original gives NaN, ours is the exact value."""
    if "overflow" not in case.meta:
        return
    found = re.search(r"multiplied by ([\d.]+), alpha ([\d.]+), T ([\d.]+)", case.meta["overflow"]["description"])
    assert found, f"{case.name}: the overflow is described in an unknown way"
    factor, alpha, temperature = map(float, found.groups())
    student, teacher = ([factor * level for level in case.sequence(f"in.{who}")] for who in ("student", "teacher"))
    with torch.no_grad():
        loss = distillation_loss(student, teacher, DistillationConfig(alpha=alpha, temperature=temperature))
    case.close("overflow", loss, case.meta["overflow"]["log_softmax_float64"])


def _combined(
    combo: Settings, student: Sequence[Tensor], teacher: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return ([fused(student)], [fused(teacher)]) if combo.get("fuse") else (student, teacher)


DRIVERS: Drivers = {
    "mmpretrain.ConvNeXt": convnext,
    "mmpretrain.VisionTransformer": vision_transformer,
    "FAM": fam,
    "FMM": fmm,
    "MultiLevelNeck": neck,
    "UPerHead": decode_head,
    "SegformerHead": decode_head,
    "FCNHead": fcn_head,
    "DistillEncoderDecoder.calculate_diltill_loss": distill_loss,
}
