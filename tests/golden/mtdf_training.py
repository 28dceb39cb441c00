"""RS-MTDF's golden cases of the training step: unsupervised loss, average, schedule and whole steps."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from rsseg.checkpoint import load_into
from rsseg.config import OptimizerConfig, ScheduleConfig
from rsseg.data.streams import Samples
from rsseg.layers.blocks import cutmix
from rsseg.layers.ema import Ema
from rsseg.layers.losses import cross_entropy
from rsseg.methods.mtdf.importer import rename_tensors
from rsseg.methods.mtdf.method import MTDFMethod, PseudoLabels, ema_ratio, pseudo_label_loss
from rsseg.methods.mtdf.recipe import MTDFRecipe
from rsseg.recipe import load_recipe
from rsseg.task import IGNORE_INDEX
from rsseg.training.step import build_optimizers, lr_at
from tests.golden.builders import grad_of, norm, total
from tests.golden.case import Case
from tests.golden.harness import Drivers
from tests.golden.mtdf_parts import check_sizes, compare_scalars, grid_of, make_student, recorded_teachers
from tests.golden.settings import Settings, plain

PUBLISHED = "loveda-1pct"
"""All published recipes have the same optimizer."""


def unsup(case: Case) -> None:
    """Mixed views and labels, the losses, and the gradient of their mean."""
    hyper, mix = case.meta["hyper_parameters"], case.tensors["in.cutmix_box"].bool()
    check_boxes(hyper, mix)
    predictions = case.tensors["in.pred_labelled_then_strong"].requires_grad_()
    labeled, strong = predictions.split([hyper["batch_labelled"], hyper["batch_unlabelled"]])
    check_sizes(hyper, classes=labeled.shape[1], height=labeled.shape[-2], width=labeled.shape[-1])
    valid = case.tensors["in.ignore_mask"] != IGNORE_INDEX
    check_padding(hyper, valid)
    weak = PseudoLabels.of(case.tensors["in.pred_u_w"], valid)
    ratio = weak.confident_ratio(hyper["conf_thresh"])
    case.check(ratio, "out.mask_ratio")
    case.check(cutmix(case.tensors["in.img_u_s"], mix), "out.img_u_s_mixed")
    mixed = weak.mixed(mix)
    case.close("out.pseudo_label_mixed", mixed.labels, case.tensors["out.pseudo_label_mixed"], rtol=0.0, atol=0.0)
    case.check(mixed.confidence, "out.conf_mixed")
    ignored = case.tensors["out.ignore_mixed"] == IGNORE_INDEX
    case.close("out.ignore_mixed", ~mixed.valid, ignored, rtol=0.0, atol=0.0)

    loss_x = cross_entropy(labeled, case.tensors["in.mask_x"].long())
    loss_u = pseudo_label_loss(strong, mixed, threshold=hyper["conf_thresh"])
    loss = (loss_x + loss_u + case.tensors["in.dis_loss"]) / 3
    losses = {"loss_x": loss_x, "loss_u_s": loss_u, "loss": loss}
    for key, value in losses.items():
        case.check(value, f"out.{key}")
    compare_scalars(case, {**losses, "mask_ratio": ratio})
    if case.has("grad.pred_labelled_then_strong"):
        loss.backward()
        case.check(grad_of(predictions), "grad.pred_labelled_then_strong", "grad")


def check_boxes(hyper: Settings, mix: Tensor) -> None:
    """Fail unless the stated boxes are those of the map."""
    if "boxes_y_x_h_w" not in hyper:
        return
    stated = torch.zeros_like(mix)
    for sample, box in zip(stated, hyper["boxes_y_x_h_w"], strict=True):
        if box is not None:
            y, x, height, width = box
            sample[y : y + height, x : x + width] = True
    assert torch.equal(stated, mix)


def check_padding(hyper: Settings, valid: Tensor) -> None:
    """Fail unless the stated padding, rows at the bottom and columns at the right, is that of the map."""
    if "padding_bottom_right" not in hyper:
        return
    height, width = valid.shape[-2:]
    for sample, (bottom, right) in zip(valid, hyper["padding_bottom_right"], strict=True):
        assert not sample[height - bottom :].any()
        assert not sample[:, width - right :].any()


def ema(case: Case) -> None:
    """The average after every recorded update, with the ratio that the case's rule gives."""
    hyper = case.meta["hyper_parameters"]
    source = _holder(case.group("start"))
    decay = published_decay()
    if "rule" in hyper:
        found = re.match(r"r=min\(1-1/\(iter\+1\),([\d.]+)\);", hyper["rule"].replace(" ", ""))
        assert found, f"{case.name}: unknown rule {hyper['rule']!r}"
        decay = float(found[1])
    average = Ema(source, decay)
    for n, iteration in enumerate(hyper["iterations"]):
        load_into(source, case.group(f"model.{n}"), case.name)
        ratio = ema_ratio(iteration, decay)
        case.close(f"ratio {n}", ratio, case.meta["scalars"]["ratios"][n], rtol=1e-12, atol=0.0)
        average.update(source, decay=ratio)
        state = average.module.state_dict()
        for name, expected in case.group(f"ema.{n}").items():
            case.close(f"ema.{n}.{name}", state[name], expected)


def schedule(case: Case) -> None:
    """Learning rates in use, and the average's ratio after each step."""
    hyper = case.meta["hyper_parameters"]
    config = published_schedule(power=hyper["power"])
    used = case.tensors["out.lr_used"]
    steps = range(len(used))
    rates = torch.tensor(
        [lr_at(config, hyper["lr"], step, hyper["total_iters"]) for step in steps], dtype=torch.float64
    )
    case.check(torch.stack([rates, rates * hyper["lr_multi"]], dim=1), "out.lr_used", "lr")
    if case.has("out.ema_ratio"):
        ratios = [ema_ratio(step, published_decay()) for step in steps]
        case.check(torch.tensor(ratios, dtype=torch.float64), "out.ema_ratio", "lr")


def trajectory(case: Case) -> None:
    """The recorded steps, once with each optimizer."""
    for optimizer in case.meta["hyper_parameters"]["optimizers"]:
        _check_steps(case, optimizer)


def _check_steps(case: Case, name: str) -> None:
    """Losses before each step, weights and average after the last."""
    hyper, tolerance = case.meta["hyper_parameters"], case.meta["tolerance"]
    method = _method(case)
    config = OptimizerConfig(
        name=name,  # type: ignore[arg-type]
        lr=hyper["lr_backbone"],
        schedule=published_schedule(power=hyper["poly_power"]),
        **plain(hyper["optimizers"][name]),
    )
    optimizer = build_optimizers(method, {"main": config})["main"]
    batch = _batch(case)
    start = case.group("start")
    unused = [tensor for key, tensor in start.items() if not rename_tensors({key: tensor})]
    for step, expected in enumerate(case.meta["scalars"][name]["steps"]):
        rate = lr_at(config.schedule, config.lr, step, hyper["total_iters"])
        for group, lr in zip(optimizer.param_groups, expected["lr_used"], strict=True):
            group["lr"] = rate * group["lr_scale"]
            case.close(f"{name} step {step} rate", group["lr"], lr, rtol=1e-10, atol=0.0)
        output = method.training_step(batch, step)
        loss = total(output.losses)
        found = {
            "loss_x": 3 * output.losses["seg"],
            "loss_u_s": 3 * output.losses["pseudo"],
            "dis_loss": 3 * output.losses["distill"],
            "loss": loss,
            "mask_ratio": output.logs["confident_ratio"],
        }
        for key, value in found.items():
            rtol = tolerance["later_steps_rtol"][key] if step else tolerance["step0_rtol"]
            case.close(f"{name} step {step} {key}", value, expected[key], rtol=rtol, atol=0.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_optimizer_step(step)
        assert method.average is not None
        after = {
            "ema_ratio": ema_ratio(step, published_decay()),
            "student_param_norm": norm([*method.student.parameters(), *unused]),
            "ema_param_norm": norm([*method.average.module.parameters(), *unused]),
        }
        for key in after.keys() & set(expected):
            case.close(f"{name} step {step} {key}", after[key], expected[key], rtol=tolerance["param_rtol"], atol=0.0)
    assert method.average is not None
    for network, part in ((method.student, "student"), (method.average.module, "ema")):
        expected_end = rename_tensors(case.group(f"end_{name}.{part}"))
        actual = dict(network.state_dict())
        if name.startswith("adam"):
            expected_end, actual = (_without_key_bias(t, hyper["embed_dim"]) for t in (expected_end, actual))
        for key, tensor in expected_end.items():
            case.close(
                f"end_{name}.{part} {key}",
                actual[key],
                tensor,
                atol=tolerance[f"{name}_param_atol"],
                rtol=tolerance["param_rtol"],
            )


def _method(case: Case) -> MTDFMethod:
    hyper = case.meta["hyper_parameters"]
    recipe = MTDFRecipe(
        method="mtdf",
        name="golden",
        data={"path": "unused"},
        student={"name": "vit_small_patch14_dinov2"},
        confidence=hyper["conf_thresh"],
        ema_decay=published_decay(),
        head_lr_scale=hyper["lr_other"] / hyper["lr_backbone"],
    )
    student = make_student(hyper, case.group("start"))
    method = MTDFMethod(recipe, student, recorded_teachers(case, grid_of(hyper)))
    method.train()
    return method


def _batch(case: Case) -> Mapping[str, Samples]:
    hyper = case.meta["hyper_parameters"]
    hyper.expect("ignore_index", IGNORE_INDEX)
    plain(hyper.get("iterations_per_epoch"))  # the schedule goes by `total_iters`
    labeled, weak, strong = (case.tensors[f"in.{name}"] for name in ("img_x", "img_u_w", "img_u_s"))
    check_sizes(hyper, batch_labelled=len(labeled), batch_unlabelled=len(weak))
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
    """Drop the key biases: their true gradient is zero, and Adam amplifies its rounding errors."""
    return {
        name: torch.cat([tensor[:width], tensor[2 * width :]]) if name.endswith("qkv.bias") else tensor
        for name, tensor in state.items()
    }


def published_decay() -> float:
    """Published upper bound of the average's ratio."""
    return float(_recipe().ema_decay)


def published_schedule(*, power: float) -> ScheduleConfig:
    return _recipe().optimizers["main"].schedule.model_copy(update={"power": power})  # type: ignore[no-any-return]


@cache
def _recipe() -> Any:
    return load_recipe(PUBLISHED)


def _holder(tensors: Mapping[str, Tensor]) -> nn.Module:
    """Module that holds the given tensors; `buf...`, running averages and counters are buffers."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if part not in dict(owner.named_children()):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        if leaf.startswith(("buf", "running_", "num_batches")) or not tensor.is_floating_point():
            owner.register_buffer(leaf, tensor.clone())
        else:
            owner.register_parameter(leaf, nn.Parameter(tensor.clone()))
    return root


DRIVERS: Drivers = {"unsup": unsup, "ema": ema, "schedule": schedule, "trajectory": trajectory}
