"""Golden cases of ST-DASegNet's whole network and of whole training steps."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rsseg.config import EvalConfig
from rsseg.data.streams import Batch, Samples
from rsseg.inference.predict import predict_image
from rsseg.layers.losses import pixel_accuracy
from rsseg.methods.base import ParamGroup
from rsseg.methods.dasegnet.build import assemble_method
from rsseg.methods.dasegnet.importer import rename_tensors, unread_neck_levels
from rsseg.methods.dasegnet.method import DASegNetMethod, Passes
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
    assert set(renamed) == set(own)
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
    method = make_method(case, {})
    net = method.segmenter.eval()
    images = image_of(case.tensors["img_u8"])
    test = case.meta["segmentor"]["test_cfg"]
    with torch.no_grad():
        (view,) = net.styles(images)
        for level, (source, target) in enumerate(zip(view.source, view.target, strict=True)):
            check_close(case, source, f"feat_s.{level}")
            check_close(case, target, f"feat_t.{level}")
        check_close(case, net(images), "logits")
    known = {"img_u8", "logits"}
    for key in case.tensors:
        if key.startswith(("state.", "feat_")) or key in known:
            continue
        check_inference(case, net, images, key, test)


def check_inference(case: Case, net: DASegNet, images: Tensor, key: str, test: Mapping[str, Any]) -> None:
    """Slide windows, probabilities and labels, with one scale or several, where a case records them."""
    raise AssertionError(f"{case.name}: no rule for the output {key!r}")


def check_close(case: Case, actual: Tensor, key: str) -> None:
    case.check(actual, key, "logits")


def check_train_steps(case: Case) -> None:
    settings = case.meta["optimizers"]
    method = make_method(case, settings).train()
    optimizers = make_optimizers(method, settings)
    for step, expected in enumerate(case.meta["steps"]):
        if step:
            method.after_optimizer_step(step - 1)
        batch = batch_of(case, step)
        before = snapshot(method)
        passes = method.passes(batch)
        output = method.losses_of(passes, batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.stack(list(output.losses.values())).sum().backward()
        norms = {name: norm(grads(module).values()) for name, module in modules(method).items()}
        for optimizer in optimizers:
            optimizer.step()
        check_logs(case, logs_of(method, passes, output.losses, output.logs, batch), expected["log_vars"])
        check_pseudo(case, passes, step, expected)
        check_norms(case, norms, expected["grad_norm"], "grad_norm")
        check_norms(case, constant_part(case, method, parameter_norms(method)), expected["param_norm"], "param_norm")
        del before
    check_final(case, method)


def batch_of(case: Case, step: int) -> Batch:
    def samples(images: str, masks: Tensor | None) -> Samples:
        maps = image_of(case.tensors[f"step{step}.{images}"])
        return Samples(maps, torch.ones(maps.shape[0], *maps.shape[2:], dtype=torch.bool), masks)

    masks = case.tensors[f"step{step}.gt_u8"].squeeze(1).long()
    return {"source": samples("img_u8", masks), "target": samples("B_img_u8", None)}
