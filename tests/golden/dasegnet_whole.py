"""Golden cases of ST-DASegNet's whole network and of whole training steps."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rsseg.config import EvalConfig
from rsseg.data.streams import Batch, Samples
from rsseg.inference.blend import Tile, blend_logits
from rsseg.inference.image import predict_image
from rsseg.inference.predict import Compute, predict_tile_logits
from rsseg.inference.tiling import plan_tiles
from rsseg.layers.losses import pixel_accuracy
from rsseg.methods.base import StepOutput
from rsseg.methods.dasegnet.importer import rename_tensors, unread_neck_levels
from rsseg.methods.dasegnet.method import DASegNetMethod, Passes, assemble_method
from rsseg.methods.dasegnet.network import DASegNet, assemble, build_decoder
from tests.golden.dasegnet_build import grads, image_of, make_backbone, make_recipe, make_task
from tests.golden.harness import Case, Handler

OPTIMIZERS = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam, "SGD": torch.optim.SGD}


def make_method(case: Case, optimizers: Mapping[str, Any]) -> DASegNetMethod:
    """The method of a case's settings, with its tensors."""
    segmentor = case.meta["segmentor"]
    recipe = make_recipe(segmentor, optimizers)
    task = make_task(segmentor["decode_head_s"]["num_classes"])
    students = (make_backbone(segmentor["backbone_s"]), make_backbone(segmentor["backbone_t"]))
    segmenter = assemble(recipe, task, students)

    def fresh(part: str) -> nn.Module:
        if part == "backbone_target":
            return make_backbone(segmentor["cross_EMA"]["backbone_EMA"])
        return build_decoder(recipe.decoder, segmenter.decoder_channels, task.num_classes)

    method = assemble_method(recipe, segmenter, fresh)
    load_all(method, case.group("init") or case.group("state"))
    return method


def load_all(method: DASegNetMethod, state: Mapping[str, Tensor]) -> None:
    renamed = our_names(method, state)
    own = method.state_dict()
    assert set(renamed) == set(own), set(renamed) ^ set(own)
    method.load_state_dict({name: tensor.clone() for name, tensor in renamed.items()})


def our_names(method: DASegNetMethod, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' tensors under the names of the whole method's state dict; neck levels that nobody reads left out."""
    tensors = rename_tensors(state)
    unread = unread_neck_levels(tensors.segmenter, method.segmenter.state_dict())
    renamed = {f"segmenter.{name}": tensor for name, tensor in tensors.segmenter.items() if name not in unread}
    renamed |= tensors.discriminators
    for name, tensor in tensors.teacher.items():
        part, _, rest = name.partition(".")
        renamed[f"teacher.averages.{part}.module.{rest}"] = tensor
    return renamed


def check_encode_decode(case: Case) -> None:
    net = make_method(case, {}).segmenter.eval()
    images = image_of(case.tensors["img_u8"])
    with torch.no_grad():
        (view,) = net.styles(images)
        for level, (source, target) in enumerate(zip(view.source, view.target, strict=True)):
            case.check(source, f"feat_s.{level}", "logits")
            case.check(target, f"feat_t.{level}", "logits")
        for key in case.tensors:
            if not key.startswith(("state.", "feat_")) and key != "img_u8":
                check_output(case, net, images, key)


def check_output(case: Case, net: DASegNet, images: Tensor, key: str) -> None:
    """Logits, probabilities or classes of whole images, of slid windows (`slide` in the key), or of several scales."""
    slides = "slide" in key or case.meta["segmentor"]["test_cfg"]["mode"] == "slide"
    window = setting(case.meta, {"crop_size", "stride"}) if slides else None
    if "logits" in key:
        case.check(slide(net, images, window) if window else net(images), key, "logits")
    elif "prob" in key or "softmax" in key:
        logits = slide(net, images, window) if window else net(images)
        case.check(logits.softmax(1), key, "logits")
    elif "pred" in key or "argmax" in key:
        side = window["crop_size"][0] if window else max(images.shape[-2:])
        overlap = side - window["stride"][0] if window else 0
        scales = setting(case.meta, {"img_ratios"})["img_ratios"] if "aug" in key else (1.0,)
        config = EvalConfig(tile=side, overlap=overlap, blend="mean", scales=scales)
        actual = np.stack([predict_image(net, image, None, config, device="cpu") for image in images])
        expected = case.tensors[key].reshape(actual.shape).numpy()
        assert (actual == expected).mean() >= 0.999, key
    else:
        raise AssertionError(f"{case.name}: no rule for the output {key!r}")


def slide(net: DASegNet, images: Tensor, window: Mapping[str, Any]) -> Tensor:
    """Mean logits of windows."""
    tile, stride = window["crop_size"][0], window["stride"][0]
    assert window["crop_size"] == [tile, tile]
    assert window["stride"] == [stride, stride]
    plan = plan_tiles(*images.shape[-2:], tile=tile, overlap=tile - stride)
    maps = []
    for image in images:
        tiles = [
            Tile(row, col, partial(cut, image, top, left, tile))
            for row, top in enumerate(plan.rows.origins)
            for col, left in enumerate(plan.cols.origins)
        ]
        scored = predict_tile_logits(net, tiles, Compute(torch.device("cpu")))
        strips = blend_logits(scored, plan, "mean", net.task.num_classes)
        maps.append(torch.cat([strip.logits for strip in strips]).permute(2, 0, 1))
    return torch.stack(maps)


def cut(image: Tensor, top: int, left: int, side: int) -> Tensor:
    return image[:, top : top + side, left : left + side]


def setting(values: Any, keys: set[str]) -> Mapping[str, Any]:
    """The first mapping below `values` that has all these keys."""
    if isinstance(values, Mapping):
        if keys <= set(values):
            return values
        values = list(values.values())
    if isinstance(values, list):
        for value in values:
            if found := setting(value, keys):
                return found
    return {}


def check_train_steps(case: Case) -> None:
    settings = case.meta["optimizers"]
    method = make_method(case, settings).train()
    optimizers = make_optimizers(method, settings)
    extra = unread_neck_norm(case)
    for step, expected in enumerate(case.meta["steps"]):
        before = {name: copies(module.parameters()) for name, module in modules(method).items()}
        if step:
            method.after_optimizer_step(step - 1)  # the authors average when the next step begins
        batch = batch_of(case, step)
        passes = method.passes(batch)
        output = method.losses_of(passes, batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.stack(list(output.losses.values())).sum().backward()
        gradients = {name: norm(grads(module).values()) for name, module in modules(method).items()}
        for optimizer in optimizers:
            optimizer.step()
        check_pseudo(case, passes, step, expected)
        check_numbers(case, logs_of(method, passes, output, batch), expected["log_vars"], "log_vars")
        check_numbers(case, gradients, expected["grad_norm"], "grad_norm")
        after = {name: list(module.parameters()) for name, module in modules(method).items()}
        norms = {name: norm(values) for name, values in after.items()}
        norms["dsk_neck"] = (norms["dsk_neck"] ** 2 + extra**2) ** 0.5
        check_numbers(case, norms, expected["param_norm"], "param_norm")
        moved = {
            name: norm(new.detach() - old for new, old in zip(values, before[name], strict=True))
            for name, values in after.items()
        }
        check_numbers(case, moved, expected["update_norm"], "update_norm")
        buffers = {name: buffer_norm(module) for name, module in modules(method).items()}
        check_numbers(case, buffers, expected["buffer_norm"], "param_norm")
    check_final(case, method)


def make_optimizers(method: DASegNetMethod, settings: Mapping[str, Any]) -> list[torch.optim.Optimizer]:
    """The method's own parameter groups with the authors' numbers, which are constant here."""
    owner = {id(p): name for name, module in modules(method).items() for p in module.parameters()}
    optimizers = []
    for groups in method.param_groups().values():
        made = []
        for group in groups:
            authors = {owner[id(p)] for p in group.params}
            config = settings[sorted(authors)[0]]
            assert all(settings[name]["lr"] == config["lr"] for name in authors)
            decay = config.get("weight_decay", 0.0) if group.weight_decay is None else group.weight_decay
            made.append({"params": list(group.params), "lr": config["lr"], "weight_decay": decay})
        options = {k: config[k] for k in ("betas", "momentum", "eps") if k in config}
        optimizers.append(OPTIMIZERS[config["type"]](made, **options))
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


def logs_of(method: DASegNetMethod, passes: Passes, output: StepOutput, batch: Batch) -> dict[str, float]:
    """The numbers that the authors log, under their names; `loss` is by mistake the last of the adversarial ones."""
    (lesson,) = passes.lessons
    losses = {name: float(value.detach()) for name, value in output.losses.items()}
    logs = {name: float(value) for name, value in output.logs.items()}
    masks, labels = batch["source"].masks, lesson.pseudo.labels
    assert masks is not None
    return {
        "loss_ce": logs["seg_source"],
        "loss_ce_seg_s2t": logs["seg_target"],
        "loss_ce_seg_t2s": logs["pseudo_source"],
        "loss_ce_seg_t2t": logs["pseudo_target"],
        "acc_seg": float(pixel_accuracy(passes.logits.source, masks)),
        "acc_seg_s2t": float(pixel_accuracy(passes.logits.target, masks)),
        "acc_seg_t2s": float(pixel_accuracy(lesson.logits.source, labels)),
        "acc_seg_t2t": float(pixel_accuracy(lesson.logits.target, labels)),
        "loss_gan_F_t2s_ds_seg": losses["adv_source"],
        "loss_gan_F_s2t_dt_seg": losses["adv_target"],
        "loss_gan_F_s2s_ds": logs["disc_source_real"],
        "loss_gan_F_t2s_ds": logs["disc_source_fake"],
        "loss_gan_F_t2t_dt": logs["disc_target_real"],
        "loss_gan_F_s2t_dt": logs["disc_target_fake"],
        "loss": logs["disc_target_fake"],
    }


def check_pseudo(case: Case, passes: Passes, step: int, expected: Mapping[str, Any]) -> None:
    pseudo = passes.lessons[0].pseudo
    labels = case.tensors[f"step{step}.pseudo_label"].squeeze(1).long()
    same = pseudo.labels == labels
    assert same.float().mean() >= 0.999
    weights = case.tensors[f"step{step}.pseudo_weight"]
    tolerance = case.tolerance("pseudo_weight")
    torch.testing.assert_close(pseudo.weights[same], weights[same], **tolerance)
    torch.testing.assert_close(float(pseudo.ratio), expected["pseudo_ratio"], **tolerance)


def check_numbers(case: Case, actual: Mapping[str, float], expected: Mapping[str, float], what: str) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, **case.tolerance(what), msg=lambda t, n=name: f"{case.name} {what} {n}: {t}"
        )


def check_final(case: Case, method: DASegNetMethod) -> None:
    """The recorded part of the last state; tensors whose true gradient is zero move by rounding noise only."""
    noise = case.meta["final_state_noise"]["tensors"]
    own = method.state_dict()
    for name in case.group("final"):
        allowed = 3 * noise.get(f"final.{name}", 0.0)
        for ours, expected in our_names(method, {name: case.tensors[f"final.{name}"]}).items():
            torch.testing.assert_close(
                own[ours], expected, rtol=1e-3, atol=1e-4 + allowed, msg=lambda t, n=name: f"{case.name} {n}: {t}"
            )


def unread_neck_norm(case: Case) -> float:
    """L2 norm of the neck's levels that the decoder does not read; ours has none of them, theirs never move."""
    if case.meta["segmentor"]["decode_head_s"]["type"] == "SegformerHead":
        return 0.0
    last = len(case.meta["segmentor"]["dsk_neck"]["in_channels"])
    neck = case.group("init.dsk_neck")
    return norm(v for name, v in neck.items() if not name.startswith(("dsk_neck1.", f"dsk_neck{last}.")))


def buffer_norm(module: nn.Module) -> float:
    return norm(buffer for name, buffer in module.named_buffers() if "running" in name)


def norm(tensors: Iterable[Tensor]) -> float:
    return sum(float(tensor.detach().double().square().sum()) for tensor in tensors) ** 0.5


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def batch_of(case: Case, step: int) -> Batch:
    def samples(images: str, masks: Tensor | None) -> Samples:
        maps = image_of(case.tensors[f"step{step}.{images}"])
        return Samples(maps, torch.ones(maps.shape[0], *maps.shape[2:], dtype=torch.bool), masks)

    masks = case.tensors[f"step{step}.gt_u8"].squeeze(1).long()
    return {"source": samples("img_u8", masks), "target": samples("B_img_u8", None)}


HANDLERS: dict[str, Handler] = {"encode_decode": check_encode_decode, "train_step": check_train_steps}
