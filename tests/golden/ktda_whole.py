"""KTDA's assembled models against the original implementation: recipe from the case's JSON, weights by the importer."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rsseg.backbones.timm_adapter import Architecture, Built, build_pyramid, build_vit
from rsseg.backbones.zoo import create_backbone
from rsseg.data.streams import Samples
from rsseg.methods.base import StepOutput
from rsseg.methods.ktda.importer import rename_tensors
from rsseg.methods.ktda.method import KTDAMethod, assemble_method, make_aux_head
from rsseg.methods.ktda.network import assemble_segmenter, build_segmenter
from rsseg.methods.ktda.recipe import KTDARecipe
from rsseg.recipe import load_recipe
from rsseg.task import ClassInfo, Task
from tests.golden.harness import Case, Handler
from tests.golden.ktda_backbones import unnormalized
from tests.golden.ktda_network import (
    aux_config,
    check_buffers,
    decoder_config,
    distillation_config,
    fmm_config,
    per_level,
)

PARTS = {
    "backbone": "segmenter.student",
    "fam": "segmenter.fam",
    "neck": "segmenter.neck",
    "fmm": "segmenter.fmm",
    "decode_head": "segmenter.decoder",
    "auxiliary_head": "aux_heads",
}


def whole_model(case: Case) -> None:
    check_eval(case, loaded_method(case))
    check_train_step(case, loaded_method(case))
    check_gradients_by_loss(case, loaded_method(case))
    check_trajectory(case, loaded_method(case))


def check_eval(case: Case, method: KTDAMethod) -> None:
    """Maps at every stage, logits at both resolutions, and the prediction."""
    method.eval()
    segmenter, images = method.segmenter, case.tensors["in.image"]
    with torch.no_grad():
        run = segmenter.run(images)
        full = segmenter.predict_logits(images)
        aligned = segmenter.fam(list(segmenter.student(images)), images.shape[-2:]) if segmenter.fam else []
        teacher = method.distillation.teacher_maps(images) if method.distillation else ()
    for prefix, maps in (("out.fam", aligned), ("out.teacher", teacher), ("out.feat", run.features)):
        for i, level in enumerate(maps):
            if f"{prefix}.{i}" in case.tensors:
                case.check(level, f"{prefix}.{i}")
    case.check(run.logits, "out.eval_logits")
    case.check(full[..., ::4, ::4], "out.eval_logits_full")
    assert torch.equal(full.argmax(dim=1, keepdim=True), case.tensors["out.pred"].long())


def check_train_step(case: Case, method: KTDAMethod) -> None:
    """Losses and gradients of their sum."""
    output = step_output(case, method)
    check_losses(output, case.meta["losses_train_step0"], rel=case.tolerance("losses")["rtol"])
    sum(output.losses.values()).backward()  # type: ignore[union-attr]
    for part, expected in case.meta["grad_norm_total_loss"].items():
        check_norm(case, method, part, expected)
    parameters = dict(method.named_parameters())
    for name in case.group("grad.sd"):
        case.check(parameters[own_name(name)].grad, f"grad.sd.{name}", "grad")


def check_gradients_by_loss(case: Case, method: KTDAMethod) -> None:
    output = step_output(case, method)
    for key, norms in case.meta.get("grad_norm_by_loss", {}).items():
        method.zero_grad(set_to_none=True)
        output.losses[own_loss(key)].backward(retain_graph=True)
        for part, expected in norms.items():
            check_norm(case, method, part, expected)


def check_trajectory(case: Case, method: KTDAMethod) -> None:
    """Losses before each step of the optimizer, batch norm's averages on the way, and eval logits after the last."""
    optimizer = optimizer_of(case.meta["optimiser"], method)
    after = {own_name(name): value for name, value in case.group("after").items()}
    counts = {name: value for name, value in after.items() if name.endswith("num_batches_tracked")}
    compared = not after
    for expected in case.meta["trajectory"]:
        output = step_output(case, method)
        state = method.state_dict()
        # the recorded averages are those of the pass that their own counter names
        if counts and all(torch.equal(state[name], count) for name, count in counts.items()):
            check_buffers(case, state, after)
            compared = True
        check_losses(output, expected, rel=case.tolerance("trajectory")["rtol"])
        optimizer.zero_grad()
        sum(output.losses.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    method.eval()
    with torch.no_grad():
        logits = method.segmenter.run(case.tensors["in.image"]).logits
    case.check(logits, "out.eval_logits_after_steps", "logits_after_steps")
    assert compared, "no pass has the recorded number of batches"


def check_losses(output: StepOutput, expected: Mapping[str, float], *, rel: float) -> None:
    heads = sum(name.startswith("aux") for name in output.losses)
    for key, value in expected.items():
        if key == "loss":
            actual = float(sum(loss.detach() for loss in output.losses.values()))
        elif key.endswith(".acc_seg"):
            name = key.removesuffix(".acc_seg")
            # the original divides the accuracy of each of several auxiliary heads by their number too
            actual = float(output.logs["acc"] if name == "decode" else output.logs[f"{name}_acc"] / heads)
        else:
            actual = float(output.losses[own_loss(key)].detach())
        assert actual == pytest.approx(value, rel=rel), key


def check_norm(case: Case, method: KTDAMethod, part: str, expected: float | None) -> None:
    gradients = [
        parameter.grad.flatten()
        for name, parameter in method.named_parameters()
        if name.startswith(f"{PARTS.get(part, 'absent')}.") and parameter.grad is not None
    ]
    if expected is None:
        assert not gradients, f"{part} has a gradient"
    else:
        assert float(torch.cat(gradients).norm()) == pytest.approx(expected, rel=case.tolerance("grad_norm")["rtol"])


def own_loss(key: str) -> str:
    return {"decode.loss_ce": "seg", "distill_loss": "distill"}.get(key, key.removesuffix(".loss_ce"))


def own_name(name: str) -> str:
    renamed = rename_tensors({name: torch.empty(0)})
    ours = [f"segmenter.{key}" for key in renamed.segmenter] + [f"aux_heads.{key}" for key in renamed.aux_heads]
    return ours[0]


def step_output(case: Case, method: KTDAMethod) -> StepOutput:
    method.train()
    images, masks = case.tensors["in.image"], case.tensors["in.label"].squeeze(1).long()
    samples = Samples(images=images, valid=torch.ones_like(masks, dtype=torch.bool), masks=masks)
    return method({"labeled": samples}, 0)


def optimizer_of(settings: Mapping[str, Any], method: KTDAMethod) -> torch.optim.Optimizer:
    assert settings["type"] == "AdamW"
    groups = [
        {
            "params": list(group.params),
            "weight_decay": settings["weight_decay"] if group.weight_decay is None else group.weight_decay,
        }
        for group in method.param_groups()["main"]
    ]
    return torch.optim.AdamW(groups, lr=settings["lr"], betas=tuple(settings["betas"]), eps=settings["eps"])


def loaded_method(case: Case) -> KTDAMethod:
    recipe, task = recipe_of(case), task_of(case.meta["hyper"]["decode_head"]["num_classes"])
    hyper = case.meta["hyper"]
    student = unnormalized(student_body(hyper["backbone"]), None)
    teacher = None
    if recipe.teacher:
        teacher = unnormalized(teacher_body(hyper["teach_backbone"]), hyper["teach_backbone"]["patch_size"])
    segmenter = assemble_segmenter(recipe, task, student, teacher.info if teacher else None)
    method = assemble_method(recipe, segmenter, teacher)
    tensors = rename_tensors(case.group("sd"))
    segmenter.load_state_dict(without_unused_stages(tensors.segmenter, segmenter.state_dict()))
    method.aux_heads.load_state_dict(tensors.aux_heads)
    if teacher:
        teacher.load_state_dict(without_unused_stages(tensors.teacher, teacher.state_dict()))
    return method


def without_unused_stages(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what lies behind the last tapped stage or block of a backbone: the original keeps it, ours does not."""
    return {name: tensor for name, tensor in tensors.items() if name in own or "body.network." not in name}


def recipe_of(case: Case) -> KTDARecipe:
    """The case's hyper-parameters as a recipe; the backbones are built beside it."""
    hyper = case.meta["hyper"]
    aux = hyper.get("auxiliary_head") or []
    heads = aux if isinstance(aux, list) else [aux]
    fam, neck, fmm = hyper.get("fam"), hyper.get("neck"), hyper.get("fmm")
    distills = hyper.get("student_training", True) and hyper.get("teach_backbone")
    batch, _, _, side = case.tensors["in.image"].shape
    return KTDARecipe.model_validate(
        {
            "method": "ktda",
            "name": case.name,
            "data": {"path": "unused", "augment": {"crop_size": side}},
            "student": {"name": "convnext_base"},
            "teacher": {"name": "vit_base_patch14_dinov2"} if distills else None,
            "fam": fam and {"grid": fam["output_size"], "width": per_level(fam["out_channels"], 1)[0]},
            "fuse": hyper.get("fuse", False),
            "neck": neck and {"scales": neck["scales"], "width": neck["out_channels"]},
            "fmm": fmm and fmm_config(fmm, case.meta.get("layernorm_eps", 1e-5)),
            "decoder": decoder_config(hyper["decode_head"]),
            "aux": [aux_config(head, level=head["in_index"]) for head in heads],
            "distillation": distillation_config(hyper),
            "trainer": {"batch_size": batch},
        }
    )


def task_of(num_classes: int) -> Task:
    classes = tuple(ClassInfo(name=f"class {i}", value=i, color=(i, i, i)) for i in range(num_classes))
    return Task(name="golden", classes=classes, bands=("red", "green", "blue"), scale=(1.0,) * 3, offset=(0.0,) * 3)


def student_body(hyper: Mapping[str, Any]) -> Built:
    """mmpretrain's ConvNeXt, V1 or V2."""
    arch = hyper["arch"]
    arguments = {"depths": arch["depths"], "dims": arch["channels"]}
    if hyper.get("use_grn"):
        arguments |= {"use_grn": True, "ls_init_value": None}
    levels = hyper["out_indices"]
    architecture = Architecture("convnext_tiny", drop_path=hyper["drop_path_rate"], arguments=arguments)
    built = build_pyramid(architecture, levels=levels, out_norm="all")
    built.body.freeze(hyper.get("frozen_stages", 0))
    return built


def teacher_body(hyper: Mapping[str, Any]) -> Built:
    """mmpretrain's VisionTransformer: the final norm on the last map only, plain bicubic positions."""
    arch = hyper["arch"]
    arguments = {
        "embed_dim": arch["embed_dims"],
        "depth": arch["num_layers"],
        "num_heads": arch["num_heads"],
        "mlp_ratio": arch["feedforward_channels"] / arch["embed_dims"],
        "patch_size": hyper["patch_size"],
    }
    return build_vit(
        Architecture("vit_base_patch14_dinov2", arguments=arguments),
        out_indices=hyper["out_indices"],
        out_norm="last",
        position="bicubic",
        image_size=hyper["img_size"],
    )


def state_dict_keys(case: Case) -> None:
    """Every tensor of a published checkpoint has its place in the networks of the packaged recipe, and none is over."""
    recipe = load_recipe(case.name.removeprefix("state_dict_keys_"))
    stored = {name: torch.empty(shape, device="meta") for name, shape, _ in case.meta["entries"]}
    task = task_of(stored["decode_head.conv_seg.weight"].shape[0])
    with torch.device("meta"):
        segmenter = build_segmenter(recipe, task)
        teacher = create_backbone(recipe.teacher, task, load_weights=False) if recipe.teacher else None
        widths = segmenter.decoder.in_channels
        heads = nn.ModuleList(make_aux_head(aux, widths, task.num_classes) for aux in recipe.aux)
    tensors = rename_tensors(stored)
    assert shapes(tensors.segmenter) == shapes(segmenter.state_dict())
    assert shapes(tensors.aux_heads) == shapes(heads.state_dict())
    assert shapes(tensors.teacher) == (shapes(teacher.state_dict()) if teacher else {})
    assert len(stored) == len(tensors.segmenter) + len(tensors.aux_heads) + len(tensors.teacher)


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


HANDLERS: dict[str, Handler] = {
    "DistillEncoderDecoder (whole model)": whole_model,
    "state_dict_keys": state_dict_keys,
}
