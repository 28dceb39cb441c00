"""KTDA's assembled models: a recipe from the case's settings, weights by the importer."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rsseg.data.streams import Samples
from rsseg.methods.base import StepOutput
from rsseg.methods.ktda.importer import rename_tensors
from rsseg.methods.ktda.method import KTDAMethod, assemble_method
from rsseg.methods.ktda.network import KTDASegmenter, assemble_segmenter
from rsseg.methods.ktda.recipe import KTDARecipe
from tests.golden.builders import load_exactly, make_task, norm, optimizer_options, per_level, total, unnormalized
from tests.golden.case import Case
from tests.golden.harness import Drivers
from tests.golden.ktda_generated import generate_parameters, published_method
from tests.golden.ktda_networks import (
    aux_config,
    decoder_config,
    distillation_config,
    fmm_config,
    load_backbone,
    own_name,
    student_body,
    teacher_body,
)
from tests.golden.settings import Settings, plain

PARTS = {
    "data_preprocessor": None,
    "backbone": "segmenter.student",
    "teach_backbone": None,
    "fam": "segmenter.fam",
    "neck": "segmenter.neck",
    "fmm": "segmenter.fmm",
    "decode_head": "segmenter.decoder",
    "auxiliary_head": "aux_heads",
}
"""The reference's parts -> ours that train."""


def whole_model(case: Case) -> None:
    """Whatever is recorded of: maps, logits and prediction in eval mode; losses, gradients and their norms of the first
    step; gradient norms of single losses; the losses of further steps."""
    method = loaded_method(case)
    check_eval(case, method)
    check_losses_and_gradients(case, method)
    if "grad_norm_by_loss" in case.meta:
        check_gradients_by_loss(case, loaded_method(case))
    steps = len(case.meta.get("trajectory", ()))
    if steps:
        check_trajectory(case, loaded_method(case))
    else:
        plain(case.meta.get("optimiser"))  # nothing is optimized
    if case.recorded("after") and passes_before_averages(case) > steps:
        method = loaded_method(case)
        for _ in range(passes_before_averages(case)):
            step_output(case, method)
        check_buffers(case, method)


def check_eval(case: Case, method: KTDAMethod) -> None:
    """Maps at every stage, logits at both resolutions, and the prediction."""
    method.eval()
    segmenter, images = method.segmenter, image_of(case)
    with torch.no_grad():
        run = segmenter.run(images)
        full = segmenter.to_size(run.logits, images.shape[-2:])
        made: dict[str, Callable[[], Sequence[Tensor]]] = {
            "out.student": lambda: segmenter.student(images),
            "out.fam": lambda: aligned_maps(segmenter, images),
            "out.fused": lambda: run.aligned,
            "out.neck": lambda: segmenter.neck(run.aligned) if segmenter.neck else run.aligned,
            "out.feat": lambda: run.features,
            "out.fmm": lambda: run.features,
            "out.teacher": lambda: teacher_maps(case, method, images),
            "out.aux_logits": lambda: [head(run.features) for head in method.aux_heads],
            "out.eval_logits": lambda: [run.logits],
            "out.logits": lambda: [run.logits],
            "out.eval_logits_full": lambda: [full],
            "out.logits_full": lambda: [full],
        }
        for prefix, make in made.items():
            if case.has(prefix):
                (only,) = make()
                case.check(only, prefix)
            elif case.recorded(prefix):
                case.check_maps(make(), prefix)
    for key in ("out.pred", "out.eval_pred"):
        if key in case.tensors:
            case.check_classes(key, full.argmax(dim=1), case.tensors[key])


def aligned_maps(segmenter: KTDASegmenter, images: Tensor) -> Sequence[Tensor]:
    """FAM's maps before any fusion; without FAM the student's."""
    levels = list(segmenter.student(images))
    return segmenter.fam(levels, images.shape[-2:]) if segmenter.fam else levels


def teacher_maps(case: Case, method: KTDAMethod, images: Tensor) -> Sequence[Tensor]:
    """Maps of the method's teacher, or of a teacher that the settings describe but do not use."""
    if method.distillation:
        return method.distillation.teacher_maps(images)
    hyper = case.meta.get("hyper", {})
    if not hyper.get("teach_backbone") or "out.teacher.0" not in case.tensors:
        return ()
    teacher = unnormalized(teacher_body(hyper["teach_backbone"]), patch=hyper["teach_backbone"]["patch_size"]).eval()
    load_backbone(teacher, rename_tensors(case.group("sd")).teacher)
    return teacher(images)


def check_losses_and_gradients(case: Case, method: KTDAMethod) -> None:
    """Losses, and gradients of their sum."""
    sections = [key for key in case.meta if key.startswith("losses")]
    trains = len(image_of(case)) > 1 or any("train" in key for key in sections)
    evaluated = [key for key in sections if "eval" in key or not trains]
    if evaluated:
        with torch.no_grad():
            output = step_output(case, method, train=False)
        for key in evaluated:
            check_losses(case, key, output, case.meta[key], "losses")
    trained = [key for key in sections if key not in evaluated]
    recorded = case.recorded("grad.sd")
    if not (trained or recorded or "grad_norm_total_loss" in case.meta):
        return
    output = step_output(case, method)
    for key in trained:
        check_losses(case, key, output, case.meta[key], "losses")
    total(output.losses).backward()
    for part, expected in case.meta.get("grad_norm_total_loss", {}).items():
        check_norm(case, method, part, expected, "total")
    found = _full_names(method, grads=True)
    for name in recorded:
        case.check(found.get(own_name(name)), f"grad.sd.{name}", "grad")


def check_gradients_by_loss(case: Case, method: KTDAMethod) -> None:
    output = step_output(case, method)
    for key, norms in case.meta["grad_norm_by_loss"].items():
        method.zero_grad(set_to_none=True)
        loss_of(output, key).backward(retain_graph=True)
        for part, expected in norms.items():
            check_norm(case, method, part, expected, key)


def check_trajectory(case: Case, method: KTDAMethod) -> None:
    """Losses before each step of the optimizer, batch norm's averages on the way, and eval logits after the last."""
    optimizer = optimizer_of(case.meta["optimiser"], method)
    steps = case.meta["trajectory"]
    if "steps" in case.meta["optimiser"]:
        assert len(steps) == case.meta["optimiser"]["steps"]
    passes = passes_before_averages(case) if case.recorded("after") else 0
    for number, expected in enumerate(steps):
        output = step_output(case, method)
        if number + 1 == passes:
            check_buffers(case, method)
        check_losses(case, f"step {number}", output, expected, "trajectory")
        optimizer.zero_grad()
        total(output.losses).backward()
        optimizer.step()
    if case.has("out.eval_logits_after_steps"):
        method.eval()
        with torch.no_grad():
            logits = method.segmenter.run(image_of(case)).logits
        case.check(logits, "out.eval_logits_after_steps", "logits_after_steps")


def passes_before_averages(case: Case) -> int:
    """Number of forward passes in batch norm's recorded averages, by their counters; 1 without counters."""
    counts = []
    for prefix in ("sd", "after"):
        keys = [f"{prefix}.{name}" for name in case.recorded(prefix) if name.endswith("num_batches_tracked")]
        found = {
            int(case.tensors[k]) if k in case.tensors else int(next(iter(case.statistics[k].values()))) for k in keys
        }
        assert len(found) <= 1, f"{case.name}: {prefix} has several counts {found}"
        counts.append(found.pop() if found else None)
    return 1 if counts[1] is None else counts[1] - (counts[0] or 0)


def check_buffers(case: Case, method: KTDAMethod) -> None:
    """Batch norm's averages after a pass."""
    state = _full_names(method)
    for name in case.recorded("after"):
        case.check(state.get(own_name(name)), f"after.{name}")


def _full_names(method: KTDAMethod, *, grads: bool = False) -> Mapping[str, Tensor]:
    """State or gradients by the names that `own_name` gives."""
    tensors = {n: p.grad for n, p in method.named_parameters()} if grads else method.state_dict()
    return {name.removeprefix("segmenter."): t for name, t in tensors.items() if t is not None}


def check_losses(case: Case, label: str, output: StepOutput, expected: Settings, what: str) -> None:
    heads = sum(name.startswith("aux") for name in output.losses)
    for key, value in expected.items():
        if key.endswith(".acc_seg"):
            name = key.removesuffix(".acc_seg")
            # the original divides the accuracy of each of several auxiliary heads by their number too
            actual = output.logs["acc"] if name == "decode" else output.logs[f"{name}_acc"] / heads
        else:
            actual = loss_of(output, key)
        case.close(f"{label} {key}", actual, value, what)


def check_norm(case: Case, method: KTDAMethod, part: str, expected: float | None, what: str) -> None:
    """L2 norm of a part's gradient; None: it has none."""
    ours = PARTS[part]
    found = [
        parameter.grad
        for name, parameter in method.named_parameters()
        if ours and name.startswith(f"{ours}.") and parameter.grad is not None
    ]
    if expected is None:
        assert not found, f"{part} has a gradient"
        case.comparison.count += 1
    else:
        case.close(f"gradient norm of {part}, {what}", norm(found), expected, "grad_norm")


def loss_of(output: StepOutput, key: str) -> Tensor:
    """The loss that the reference has under a key; `loss` is the sum of all."""
    if key == "loss":
        return total(output.losses)
    ours = {"decode.loss_ce": "seg", "distill_loss": "distill"}.get(key, key.removesuffix(".loss_ce"))
    return output.losses[ours]


def step_output(case: Case, method: KTDAMethod, *, train: bool = True) -> StepOutput:
    method.train(train)
    images, masks = image_of(case), label_of(case)
    samples = Samples(images=images, valid=torch.ones_like(masks, dtype=torch.bool), masks=masks)
    return method({"labeled": samples}, 0)


def image_of(case: Case) -> Tensor:
    """Recorded, or made by the case's rule."""
    if case.generator is not None and "in.image" not in case.tensors:
        return case.generator.input("image", plain(case.meta["input_shape"])).to(torch.get_default_dtype())
    return case.tensors["in.image"]


def label_of(case: Case) -> Tensor:
    if case.generator is not None and "in.label" not in case.tensors:
        shape = plain(case.meta["input_shape"])
        return case.generator.input("label", [shape[0], *shape[2:]]).long()
    return case.tensors["in.label"].reshape(-1, *case.tensors["in.label"].shape[-2:]).long()


def optimizer_of(settings: Settings, method: KTDAMethod) -> torch.optim.Optimizer:
    """The stated AdamW over the method's own parameter groups, at a constant rate."""
    for key, value in {
        "type": "AdamW",
        "same_batch": True,
        "no_decay": "parameters whose name contains the substring norm",
    }.items():
        settings.expect(key, value)
    options = optimizer_options(settings)
    groups = [
        {
            "params": list(group.params),
            "weight_decay": options["weight_decay"] if group.weight_decay is None else group.weight_decay,
        }
        for group in method.param_groups()["main"]
    ]
    return torch.optim.AdamW(groups, **options)


def loaded_method(case: Case) -> KTDAMethod:
    """The method that the case's settings describe, or the published one that it names, with the case's weights."""
    method = described_method(case) if "hyper" in case.meta else published_method(case)
    tensors = rename_tensors(case.group("sd"))
    if not case.group("sd"):
        generate_parameters(case, method)
        return method
    load_backbone(method.segmenter, tensors.segmenter)
    load_exactly(method.aux_heads, tensors.aux_heads)
    if method.distillation:
        load_backbone(method.distillation.teacher.module, tensors.teacher)
    return method


def described_method(case: Case) -> KTDAMethod:
    hyper = case.meta["hyper"]
    recipe, task = recipe_of(case), make_task(hyper["decode_head"]["num_classes"])
    student = unnormalized(student_body(hyper["backbone"]))
    teacher = None
    if recipe.teacher:
        teacher = unnormalized(teacher_body(hyper["teach_backbone"]), patch=hyper["teach_backbone"]["patch_size"])
    segmenter = assemble_segmenter(recipe, task, student, teacher.info if teacher else None)
    return assemble_method(recipe, segmenter, teacher)


def recipe_of(case: Case) -> KTDARecipe:
    """The case's settings as a recipe; the backbones are built beside it."""
    hyper = case.meta["hyper"]
    hyper.expect("type", "DistillEncoderDecoder")
    plain([hyper.get("data_preprocessor"), hyper.get("train_cfg")])  # recorded images are normalized and padded already
    if hyper.get("test_cfg"):
        hyper["test_cfg"].expect("mode", "whole")
    aux = hyper.get("auxiliary_head") or []
    heads = aux if isinstance(aux, list) else [aux]
    fam, neck, fmm = hyper.get("fam"), hyper.get("neck"), hyper.get("fmm")
    for part, names in ((fam, ("FAM",)), (neck, ("MultiLevelNeck",))):
        if part:
            part.expect("type", *names)
            plain(part["in_channels"])  # strict loading checks the widths
    if fmm:
        plain(fmm["in_channels"])
    for head in (hyper["decode_head"], *heads):
        plain(head["in_channels"])
        head.expect("align_corners", hyper["decode_head"].get("align_corners", False))
        assert head["num_classes"] == hyper["decode_head"]["num_classes"]
    widths = hyper["decode_head"]["in_channels"]
    count = len(widths) if isinstance(widths, list) else 1
    hyper["decode_head"].expect("in_index", list(range(count)), 0)
    distills = hyper.get("student_training", True) and hyper.get("teach_backbone")
    if not distills and hyper.get("teach_backbone"):
        plain(hyper["teach_backbone"])
    side = image_of(case).shape[-1]
    return KTDARecipe.model_validate(
        {
            "method": "ktda",
            "name": case.name,
            "data": {"path": "unused", "augment": {"crop_size": side}},
            "student": {"name": "convnext_base"},
            "teacher": {"name": "vit_base_patch14_dinov2"} if distills else None,
            "fam": fam and {"grid": fam["output_size"], "width": per_level(plain(fam["out_channels"]), 1)[0]},
            "fuse": hyper.get("fuse", False),
            "neck": neck and {"scales": plain(neck["scales"]), "width": neck["out_channels"]},
            "fmm": fmm and fmm_config(fmm, case.meta.get("layernorm_eps", 1e-5)),
            "decoder": decoder_config(hyper["decode_head"]),
            "aux": [aux_config(head, level=head["in_index"]) for head in heads],
            "distillation": distillation_config(hyper),
            "trainer": {"batch_size": max(len(image_of(case)), 2)},  # batch norm is the case's own concern
        }
    )


DRIVERS: Drivers = {"DistillEncoderDecoder (whole model)": whole_model}
