"""Golden cases of the training step: unsupervised loss, average, schedule and three whole steps."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rsseg.checkpoint import load_into
from rsseg.config import OptimizerConfig, ScheduleConfig
from rsseg.data.streams import Samples
from rsseg.layers.ema import Ema
from rsseg.layers.losses import cross_entropy
from rsseg.methods.mtdf.fixmatch import PseudoLabels, cutmix, pseudo_label_loss
from rsseg.methods.mtdf.importer import rename_tensors
from rsseg.methods.mtdf.method import MTDFMethod, Settings, ema_ratio
from rsseg.recipe import load_recipe
from rsseg.task import IGNORE_INDEX
from rsseg.training.optimizers import build_optimizers, lr_at
from tests.golden.harness import Case, Handler
from tests.golden.mtdf_parts import CLIP_INPUT, compare, make_student, recorded_teacher

PUBLISHED = "loveda-1pct"
"""All published recipes have the same optimizer."""


def unsup(case: Case) -> None:
    hyper, mix = case.meta["hyper_parameters"], case.tensors["in.cutmix_box"].bool()
    predictions = case.tensors["in.pred_labelled_then_strong"].requires_grad_()
    labeled, strong = predictions.split([hyper["batch_labelled"], hyper["batch_unlabelled"]])
    valid = case.tensors["in.ignore_mask"] != IGNORE_INDEX
    weak = PseudoLabels.of(case.tensors["in.pred_u_w"], valid)
    case.check(weak.confident_ratio(hyper["conf_thresh"]), "out.mask_ratio")
    case.check(cutmix(case.tensors["in.img_u_s"], mix), "out.img_u_s_mixed")
    mixed = weak.mixed(mix)
    case.check(mixed.labels, "out.pseudo_label_mixed")
    case.check(mixed.confidence, "out.conf_mixed")
    assert torch.equal(mixed.valid, case.tensors["out.ignore_mixed"] != IGNORE_INDEX)

    loss_x = cross_entropy(labeled, case.tensors["in.mask_x"])
    loss_u = pseudo_label_loss(strong, mixed, threshold=hyper["conf_thresh"])
    case.check(loss_x, "out.loss_x")
    case.check(loss_u, "out.loss_u_s")
    loss = (loss_x + loss_u + case.tensors["in.dis_loss"]) / 3
    case.check(loss, "out.loss")
    loss.backward()
    assert predictions.grad is not None
    case.check(predictions.grad, "grad.pred_labelled_then_strong", "grad")


def ema(case: Case) -> None:
    hyper = case.meta["hyper_parameters"]
    source = _holder(case.group("start"))
    average = Ema(source, recipe_decay())
    for n, iteration in enumerate(hyper["iterations"]):
        load_into(source, case.group(f"model.{n}"), case.name)
        ratio = ema_ratio(iteration, recipe_decay())
        torch.testing.assert_close(ratio, case.meta["scalars"]["ratios"][n], rtol=1e-12, atol=0)
        average.update(source, decay=ratio)
        compare(average.module.state_dict(), case.group(f"ema.{n}"), **case.tolerance("forward"))


def schedule(case: Case) -> None:
    hyper = case.meta["hyper_parameters"]
    config = _published_schedule(power=hyper["power"])
    for step, (backbone, other) in enumerate(case.tensors["out.lr_used"].tolist()):
        rate = lr_at(config, hyper["lr"], step, hyper["total_iters"])
        torch.testing.assert_close((rate, rate * hyper["lr_multi"]), (backbone, other), **case.tolerance("lr"))
        torch.testing.assert_close(
            ema_ratio(step, recipe_decay()), float(case.tensors["out.ema_ratio"][step]), **case.tolerance("lr")
        )


def trajectory(case: Case) -> None:
    for optimizer in case.meta["hyper_parameters"]["optimizers"]:
        _three_steps(case, optimizer)


def _three_steps(case: Case, name: str) -> None:
    """The recorded steps with one optimizer: losses before each, weights and average after the last."""
    hyper, tolerance = case.meta["hyper_parameters"], case.meta["tolerance"]
    method = _method(case)
    config = OptimizerConfig(
        name=name,  # type: ignore[arg-type]
        lr=hyper["lr_backbone"],
        schedule=_published_schedule(power=hyper["poly_power"]),
        **hyper["optimizers"][name],
    )
    optimizer = build_optimizers(method, {"main": config})["main"]
    batch = _batch(case)
    for step, expected in enumerate(case.meta["scalars"][name]["steps"]):
        rate = lr_at(config.schedule, config.lr, step, hyper["total_iters"])
        for group, lr in zip(optimizer.param_groups, expected["lr_used"], strict=True):
            group["lr"] = rate * group["lr_scale"]
            torch.testing.assert_close(group["lr"], lr, rtol=1e-10, atol=0)
        output = method.training_step(batch, step)
        loss = torch.stack(list(output.losses.values())).sum()
        found = {
            "loss_x": 3 * output.losses["seg"],
            "loss_u_s": 3 * output.losses["pseudo"],
            "dis_loss": 3 * output.losses["distill"],
            "loss": loss,
            "mask_ratio": output.logs["confident_ratio"],
        }
        for key, value in found.items():
            rtol = tolerance["later_steps_rtol"][key] if step else tolerance["step0_rtol"]
            torch.testing.assert_close(float(value), expected[key], rtol=rtol, atol=0, msg=lambda t, k=key: f"{k}: {t}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_optimizer_step(step)
    assert method.average is not None
    for network, part in ((method.student, "student"), (method.average.module, "ema")):
        expected_end = rename_tensors(case.group(f"end_{name}.{part}"))
        actual = dict(network.state_dict())
        if name == "adamw":
            expected_end, actual = (_without_key_bias(t, hyper["embed_dim"]) for t in (expected_end, actual))
        atol = tolerance[f"{name}_param_atol"]
        compare(actual, expected_end, rtol=tolerance["param_rtol"], atol=atol)


def _method(case: Case) -> MTDFMethod:
    hyper = case.meta["hyper_parameters"]
    grid = (hyper["height"] // 14, hyper["width"] // 14)
    teachers = {
        "dino": recorded_teacher(case.tensors["in.teacher_dino"], grid),
        "clip": recorded_teacher(case.tensors["in.teacher_clip"], (16, 16), input_size=CLIP_INPUT),
    }
    settings = Settings(
        labeled_weight=1 / 3,
        pseudo_weight=1 / 3,
        distill_weight=1 / 3,
        confidence=hyper["conf_thresh"],
        ema_decay=recipe_decay(),
        head_lr_scale=hyper["lr_other"] / hyper["lr_backbone"],
    )
    method = MTDFMethod(make_student(hyper, case.group("start")), teachers, settings)
    method.train()
    return method


def _batch(case: Case) -> Mapping[str, Samples]:
    labeled, weak, strong = (case.tensors[f"in.{name}"].float() for name in ("img_x", "img_u_w", "img_u_s"))
    everywhere = torch.ones(labeled.shape[0], *labeled.shape[2:], dtype=torch.bool)
    return {
        "labeled": Samples(labeled, everywhere, masks=case.tensors["in.mask_x"].long()),
        "unlabeled": Samples(
            weak,
            case.tensors["in.ignore_mask"] != IGNORE_INDEX,
            strong=strong[:, None],
            mix=case.tensors["in.cutmix_box"].bool()[:, None],
        ),
    }


def _without_key_bias(state: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """Leave out what AdamW makes of a gradient that is zero but for rounding."""
    return {
        name: torch.cat([tensor[:width], tensor[2 * width :]]) if name.endswith("qkv.bias") else tensor
        for name, tensor in state.items()
    }


def recipe_decay() -> float:
    """The published cap of the average's ratio."""
    return float(_recipe().ema_decay)


def _published_schedule(*, power: float) -> ScheduleConfig:
    return _recipe().optimizers["main"].schedule.model_copy(update={"power": power})  # type: ignore[no-any-return]


def _recipe() -> Any:
    return load_recipe(PUBLISHED)


def _holder(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module with the given tensors; those named `buf` become buffers."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if part not in dict(owner.named_children()):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        if leaf.startswith("buf"):
            owner.register_buffer(leaf, tensor.clone())
        else:
            owner.register_parameter(leaf, nn.Parameter(tensor.clone()))
    return root


HANDLERS: dict[str, Handler] = {"unsup": unsup, "ema": ema, "schedule": schedule, "trajectory": trajectory}
