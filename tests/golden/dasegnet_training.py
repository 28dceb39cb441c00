"""ST-DASegNet's golden cases of whole training steps."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rsseg.data.streams import Batch, Samples
from rsseg.layers.losses import pixel_accuracy
from rsseg.methods.base import StepOutput
from rsseg.methods.dasegnet.method import DASegNetMethod, Passes
from tests.golden.builders import gradients, images_of, norm, optimizer_options, total
from tests.golden.case import Case
from tests.golden.dasegnet_build import exempts_norms, make_method, our_names
from tests.golden.harness import Drivers
from tests.golden.settings import Settings

OPTIMIZERS = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam, "SGD": torch.optim.SGD}


def check_train_steps(case: Case) -> None:
    """Whatever is recorded of every step: pseudo-labels, logged numbers, norms of gradients, parameters, updates and
    buffers; and of the state after the last."""
    settings = case.meta["optimizers"]
    assert "schedule" not in case.meta.get("lr", "constant, no schedule").replace("no schedule", "")
    method = make_method(case, settings).train()
    optimizers = make_optimizers(method, settings)
    unread = unread_neck_norm(case)
    for step, expected in enumerate(case.meta["steps"]):
        before = {name: copies(module.parameters()) for name, module in modules(method).items()}
        if step:
            method.after_optimizer_step(step - 1)  # the authors average when the next step begins
        batch = batch_of(case, step)
        passes = method.passes(batch)
        output = method.losses_of(passes, batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        total(output.losses).backward()
        grad_norms = {name: norm(gradients(module).values()) for name, module in modules(method).items()}
        for optimizer in optimizers:
            optimizer.step()
        after = {name: list(module.parameters()) for name, module in modules(method).items()}
        norms = {name: norm(values) for name, values in after.items()}
        norms["dsk_neck"] = (norms["dsk_neck"] ** 2 + unread**2) ** 0.5
        moved = {
            name: norm(new.detach() - old for new, old in zip(values, before[name], strict=True))
            for name, values in after.items()
        }
        buffers = {name: buffer_norm(module) for name, module in modules(method).items()}
        check_pseudo_labels(case, passes, step, expected)
        logged = logs_of(method, passes, output, batch)
        for section, actual, what in (
            ("log_vars", logged, "log_vars"),
            ("grad_norm", grad_norms, "grad_norm"),
            ("param_norm", norms, "param_norm"),
            ("update_norm", moved, "update_norm"),
            ("buffer_norm", buffers, "param_norm"),
        ):
            for name, value in expected.get(section, {}).items():
                case.close(f"step {step} {section} {name}", actual[name], value, what)
        if "loss_returned" in expected:
            returned = output.losses["seg"] + output.losses["pseudo"]
            case.close(f"step {step} loss", returned, expected["loss_returned"], "log_vars")
    check_final(case, method)


def make_optimizers(method: DASegNetMethod, settings: Settings) -> list[torch.optim.Optimizer]:
    """The method's own parameter groups with the authors' numbers, which are constant here."""
    owner = {id(p): name for name, module in modules(method).items() for p in module.parameters()}
    optimizers = []
    for groups in method.param_groups().values():
        made = []
        for group in groups:
            authors = sorted({owner[id(p)] for p in group.params})
            config = settings[authors[0]]
            options = optimizer_options(config)
            assert all(optimizer_options(settings[name]) == options for name in authors), f"{authors} differ"
            for name in authors:
                exempts_norms(settings[name])
                settings[name].expect("type", config["type"])
            decay = options.get("weight_decay", 0.0) if group.weight_decay is None else group.weight_decay
            made.append({"params": list(group.params), **options, "weight_decay": decay})
        kind = config["type"]
        assert len({settings[owner[id(p)]]["type"] for part in made for p in part["params"]}) == 1
        optimizers.append(OPTIMIZERS[kind](made, lr=made[0]["lr"]))
    return optimizers


def modules(method: DASegNetMethod) -> dict[str, nn.Module]:
    """The method's modules under the authors' names."""
    net, teacher = method.segmenter, method.teacher
    assert net.neck is not None
    assert teacher is not None
    assert method.disc_source is not None
    assert method.disc_target is not None
    named: dict[str, nn.Module] = {
        "backbone_s": net.backbone_source,
        "backbone_t": net.backbone_target,
        "decode_head_s": net.decoder_source,
        "decode_head_t": net.decoder_target,
        "discriminator_s": method.disc_source,
        "discriminator_t": method.disc_target,
        "dsk_neck": net.neck,
    }
    if teacher.config.type == "single_t":
        averaged = {"cross_EMA_backbone": "backbone_target", "cross_EMA_decoder": "decoder_target"}
    else:
        averaged = {"cross_EMA_decoder_s": "decoder_source", "cross_EMA_decoder_t": "decoder_target"}
    return named | {theirs: teacher.averaged(part) for theirs, part in averaged.items()}


def logs_of(method: DASegNetMethod, passes: Passes, output: StepOutput, batch: Batch) -> dict[str, Tensor]:
    """Numbers under the names that the authors log; their `loss` is the last adversarial one, a quirk of their code."""
    (pseudo_view,) = passes.pseudo_views
    losses, logs = output.losses, output.logs
    masks, labels = batch["source"].masks, pseudo_view.pseudo.labels
    assert masks is not None
    return {
        "loss_ce": logs["seg_source"],
        "loss_ce_seg_s2t": logs["seg_target"],
        "loss_ce_seg_t2s": logs["pseudo_source"],
        "loss_ce_seg_t2t": logs["pseudo_target"],
        "acc_seg": pixel_accuracy(passes.logits.source, masks),
        "acc_seg_s2t": pixel_accuracy(passes.logits.target, masks),
        "acc_seg_t2s": pixel_accuracy(pseudo_view.logits.source, labels),
        "acc_seg_t2t": pixel_accuracy(pseudo_view.logits.target, labels),
        "loss_gan_F_t2s_ds_seg": losses["adv_source"],
        "loss_gan_F_s2t_dt_seg": losses["adv_target"],
        "loss_gan_F_s2s_ds": logs["disc_source_real"],
        "loss_gan_F_t2s_ds": logs["disc_source_fake"],
        "loss_gan_F_t2t_dt": logs["disc_target_real"],
        "loss_gan_F_s2t_dt": logs["disc_target_fake"],
        "loss": logs["disc_target_fake"],
    }


def check_pseudo_labels(case: Case, passes: Passes, step: int, expected: Settings) -> None:
    """Compare labels, and weights where the labels agree."""
    pseudo = passes.pseudo_views[0].pseudo
    if f"step{step}.pseudo_label" in case.tensors:
        labels = case.tensors[f"step{step}.pseudo_label"].reshape(pseudo.labels.shape).long()
        case.check_classes(f"step{step}.pseudo_label", pseudo.labels, labels)
        same = pseudo.labels == labels
        weights = case.tensors[f"step{step}.pseudo_weight"].reshape(labels.shape)
        case.close(f"step{step}.pseudo_weight", pseudo.weights[same], weights[same], "pseudo_weight")
    if "pseudo_ratio" in expected:
        case.close(f"step {step} pseudo_ratio", pseudo.ratio, expected["pseudo_ratio"], "pseudo_weight")


def check_final(case: Case, method: DASegNetMethod) -> None:
    """The recorded part of the last state; tensors whose true gradient is zero move by rounding noise only."""
    noise: Mapping[str, Any] = case.meta.get("final_state_noise", {}).get("tensors", {})
    own = method.state_dict()
    for name, tensor in case.group("final").items():
        allowed = 3 * noise.get(f"final.{name}", 0.0)
        for ours, expected in our_names(method, {name: tensor}).items():
            case.close(f"final {ours}", own[ours], expected, rtol=1e-3, atol=1e-4 + allowed)


def unread_neck_norm(case: Case) -> float:
    """L2 norm of the neck's levels that the decoder does not read; ours has none of them, theirs never move."""
    if case.meta["segmentor"]["decode_head_s"]["type"] == "SegformerHead":
        return 0.0
    last = len(case.meta["segmentor"]["dsk_neck"]["in_channels"])
    neck = case.group("init.dsk_neck")
    return norm(v for name, v in neck.items() if not name.startswith(("dsk_neck1.", f"dsk_neck{last}.")))


def buffer_norm(module: nn.Module) -> float:
    return norm(buffer for name, buffer in module.named_buffers() if "running" in name)


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def batch_of(case: Case, step: int) -> Batch:
    """The step's images and labels; a case with one batch for all steps has it under step 0."""

    def stored(name: str) -> Tensor:
        key = f"step{step}.{name}"
        return case.tensors[key if key in case.tensors else f"step0.{name}"]

    def samples(images: str, masks: Tensor | None) -> Samples:
        maps = images_of(stored(images))
        return Samples(maps, torch.ones(maps.shape[0], *maps.shape[2:], dtype=torch.bool), masks)

    masks = stored("gt_u8")
    masks = masks.reshape(-1, *masks.shape[-2:]).long()
    return {"source": samples("img_u8", masks), "target": samples("B_img_u8", None)}


DRIVERS: Drivers = {"train_step": check_train_steps}
