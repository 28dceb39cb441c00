"""KTDA's parts and whole models against the original implementation."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rsseg.layers.blocks import resize
from rsseg.layers.losses import cross_entropy, pixel_accuracy
from rsseg.methods.ktda.distillation import distillation_loss
from rsseg.methods.ktda.importer import rename_tensors
from rsseg.methods.ktda.method import make_aux_head
from rsseg.methods.ktda.network import make_decoder, make_fmm
from rsseg.methods.ktda.parts import FeatureAlignment, MultiLevelNeck, fused
from rsseg.methods.ktda.recipe import AuxConfig, DecoderConfig, DistillationConfig, FmmConfig
from tests.golden.harness import Case, Handler

FMM_TYPES = {"mlp": "mlp", "vitBlock": "vit_block"}
DECODER_TYPES = {"UPerHead": "upernet", "SegformerHead": "segformer"}


def fam(case: Case) -> None:
    hyper = case.meta["hyper"]
    widths = per_level(hyper["out_channels"], len(hyper["in_channels"]))
    module = FeatureAlignment(hyper["in_channels"], widths, grid=hyper["output_size"])
    check_module(case, module, "fam", lambda maps: module(maps, (0, 0)))


def neck(case: Case) -> None:
    hyper = case.meta["hyper"]
    module = MultiLevelNeck(hyper["in_channels"], hyper["out_channels"], scales=hyper["scales"])
    check_module(case, module, "neck", module)


def fmm(case: Case) -> None:
    hyper = case.meta["hyper"]
    config = fmm_config(hyper, case.meta.get("layernorm_eps", 1e-5))
    module = make_fmm(config, hyper["in_channels"])
    check_module(case, module, "fmm", module)


def decode_head(case: Case) -> None:
    hyper = case.meta["hyper"]
    module = make_decoder(decoder_config(hyper), hyper["in_channels"], hyper["num_classes"])
    check_head(case, module, "decode_head", hyper["in_index"])


def fcn_head(case: Case) -> None:
    hyper = case.meta["hyper"]
    head = make_aux_head(aux_config(hyper, level=0), [hyper["in_channels"]], hyper["num_classes"])
    check_head(case, head, "auxiliary_head", [hyper["in_index"]])


def distill_loss(case: Case) -> None:
    for name, combo in case.meta["combos"].items():
        student = [level.requires_grad_() for level in case.sequence("in.student")]
        loss = distillation_loss(*combined(combo, student, case.sequence("in.teacher")), distillation_config(combo))
        case.check(loss.reshape(1), f"out.{name}")
        for i, gradient in enumerate(torch.autograd.grad(loss, student)):
            case.check(gradient, f"grad.{name}.student.{i}", "grad")
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
            actual = float(distillation_loss([student.detach()], [teacher], config))
            assert actual == pytest.approx(expected, rel=case.tolerance("forward")["rtol"]), (level, name)


def check_overflow(case: Case) -> None:
    """Where the original gives NaN, ours is the exact value."""
    if "overflow" not in case.meta:
        return
    student = [80 * level for level in case.sequence("in.student")]
    teacher = [80 * level for level in case.sequence("in.teacher")]
    with torch.no_grad():
        loss = distillation_loss(student, teacher, DistillationConfig(alpha=0.5, temperature=1.0))
    assert float(loss) == pytest.approx(case.meta["overflow"]["log_softmax_float64"], rel=1e-5)


def combined(
    combo: Mapping[str, Any], student: Sequence[Tensor], teacher: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return ([fused(student)], [fused(teacher)]) if combo.get("fuse") else (student, teacher)


def check_module(case: Case, module: nn.Module, prefix: str, forward: Any) -> None:
    """Outputs for the case's inputs, and gradients of sum(out * cot) for inputs and parameters."""
    module.load_state_dict(own_names(case.group("sd"), prefix))
    inputs = [level.requires_grad_() for level in case.sequence("in")]
    outputs = forward(inputs)
    for i, output in enumerate(outputs):
        case.check(output, f"out.{i}")
    total = sum((output * cotangent).sum() for output, cotangent in zip(outputs, case.sequence("cot"), strict=True))
    total.backward()
    check_gradients(case, module, prefix, dict(enumerate(inputs)))


def check_head(case: Case, head: nn.Module, prefix: str, levels: Sequence[int]) -> None:
    """Eval and train logits, cross-entropy, accuracy, gradients, and batch norm's averages after one pass."""
    head.load_state_dict(own_names(case.group("sd"), prefix))
    hyper = case.meta["hyper"]
    inputs = {i: case.tensors[f"in.{i}"].requires_grad_() for i in levels}
    label = case.tensors["in.label"].squeeze(1).long()
    corners = hyper.get("align_corners", False)
    head.eval()
    logits = head(list(inputs.values()))
    case.check(logits, "out.eval_logits")
    case.check(resize(logits, label.shape[-2:], align_corners=corners), "out.eval_logits_resized")
    head.train()
    logits = head(list(inputs.values()))
    case.check(logits, "out.train_logits")
    weight = hyper["loss_decode"].get("loss_weight", 1.0)
    loss = weight * cross_entropy(logits, label, divisor="all", align_corners=corners)
    case.check(loss.reshape(1), "out.loss_ce")
    case.check(pixel_accuracy(logits, label, align_corners=corners).reshape(1), "out.acc_seg")
    loss.backward()
    check_gradients(case, head, prefix, inputs)
    check_buffers(case, head.state_dict(), own_names(case.group("after"), prefix))


def check_gradients(case: Case, module: nn.Module, prefix: str, inputs: Mapping[int, Tensor]) -> None:
    parameters = dict(module.named_parameters())
    expected = {name: own_name(name, prefix) for name in case.group("grad.sd")}
    assert expected, f"{case.name} has no gradients of parameters"
    for theirs, ours in expected.items():
        case.check(parameters[ours].grad, f"grad.sd.{theirs}", "grad")
    for i, level in inputs.items():
        if f"grad.in.{i}" in case.tensors:
            case.check(level.grad, f"grad.in.{i}", "grad")


def check_buffers(case: Case, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, **case.tolerance("forward"), msg=lambda text, name=name: f"{case.name} {name}: {text}"
        )


def own_names(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A part's tensors under our names, by the importer's renaming of whole checkpoints."""
    return {own_name(name, prefix): tensor for name, tensor in tensors.items()}


def own_name(name: str, prefix: str) -> str:
    renamed = rename_tensors({f"{prefix}.{name}": torch.empty(0)})
    (full,) = (*renamed.segmenter, *renamed.aux_heads)
    return full.partition(".")[2]


def per_level(value: int | Sequence[int], levels: int) -> list[int]:
    return [value] * levels if isinstance(value, int) else list(value)


def fmm_config(hyper: Mapping[str, Any], norm_eps: float) -> FmmConfig:
    return FmmConfig(
        type=FMM_TYPES[hyper.get("model_type", "mlp")],
        depth=hyper.get("mlp_nums", 1),
        rank_dim=hyper.get("rank_dim", 4),
        heads=hyper.get("num_heads", 8),
        norm_eps=norm_eps,
    )


def decoder_config(hyper: Mapping[str, Any]) -> DecoderConfig:
    return DecoderConfig(
        type=DECODER_TYPES[hyper["type"]] if "type" in hyper else "upernet" if "pool_scales" in hyper else "segformer",
        channels=hyper["channels"],
        pool_scales=hyper.get("pool_scales", (1, 2, 3, 6)),
        dropout=hyper.get("dropout_ratio", 0.1),
        align_corners=hyper.get("align_corners", False),
    )


def aux_config(hyper: Mapping[str, Any], *, level: int) -> AuxConfig:
    return AuxConfig(
        level=level,
        channels=hyper["channels"],
        num_convs=hyper.get("num_convs", 2),
        concat_input=hyper.get("concat_input", True),
        dropout=hyper.get("dropout_ratio", 0.1),
        weight=hyper["loss_decode"].get("loss_weight", 1.0),
    )


def distillation_config(hyper: Mapping[str, Any]) -> DistillationConfig:
    return DistillationConfig(alpha=hyper.get("alpha", 0.5), temperature=hyper.get("temperature", 1.0))


HANDLERS: dict[str, Handler] = {
    "FAM": fam,
    "FMM": fmm,
    "MultiLevelNeck": neck,
    "UPerHead": decode_head,
    "SegformerHead": decode_head,
    "FCNHead": fcn_head,
    "DistillEncoderDecoder.calculate_diltill_loss": distill_loss,
}
