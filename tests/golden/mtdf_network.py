"""Golden cases of the network: DPT head, translators, fusion, backbones and the whole student."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rsseg.backbones.bodies import resample_positions
from rsseg.backbones.table import ZooEntry
from rsseg.backbones.zoo import assemble
from rsseg.checkpoint import load_into
from rsseg.config import BackboneConfig
from rsseg.layers.blocks import resize
from rsseg.layers.dpt import DPTHead
from rsseg.layers.losses import cross_entropy
from rsseg.methods.mtdf.fixmatch import complementary_masks
from rsseg.methods.mtdf.importer import rename_tensors
from rsseg.methods.mtdf.network import MTDFSegmenter
from tests.golden.harness import Case, Handler
from tests.golden.mtdf_parts import (
    CLIP_INPUT,
    compare,
    dinov2,
    gradients,
    make_student,
    make_task,
    make_translators,
    map_to_tokens,
    recorded_backbone,
    recorded_teacher,
    tokens_to_map,
)


def dpt_head(case: Case) -> None:
    hyper = case.meta["hyper_parameters"]
    grid = (hyper["patch_h"], hyper["patch_w"])
    head = _head(hyper, hyper["in_channels"], case.group("param"))
    seen: dict[str, Tensor] = {}
    for level in range(4):
        _remember(head.lateral[level], seen, f"layer{level + 1}_rn")
        _remember(head.fuse[level], seen, f"path{level + 1}")
    taps = [case.tensors[f"in.tap{i}"].requires_grad_() for i in range(4)]
    logits = head([tokens_to_map(tap, grid) for tap in taps])
    case.check(logits, "out.logits")
    for key in case.group("out"):
        if key in seen:
            case.check(seen[key], f"out.{key}")
    if "out.logits_upsampled" in case.tensors:
        upsampled = resize(logits, (14 * grid[0], 14 * grid[1]), align_corners=True)
        case.check(upsampled, "out.logits_upsampled")
    (logits * case.tensors["in.cotangent"]).sum().backward()
    for i, tap in enumerate(taps):
        case.check(_grad(tap), f"grad.in.tap{i}", "grad")
    compare(gradients(head), _head_names(case.group("grad.param")), **case.tolerance("grad"), summed=True)


def translator_distill(case: Case) -> None:
    hyper = case.meta["hyper_parameters"]
    translators = torch.nn.ModuleDict(
        {
            name: type(translator)(
                student_channels=hyper["student_dim"],
                teacher_channels=hyper[f"{name}_dim"],
                hidden=hyper["hidden"],
                project=False,
            )
            for name, translator in make_translators(hyper, hyper["student_dim"], hyper["hidden"]).items()
        }
    )
    weights = rename_tensors(case.group("param"))
    load_into(translators, {name.removeprefix("translators."): tensor for name, tensor in weights.items()}, case.name)
    losses = []
    inputs = {"dino": case.tensors["in.student_feature"], "clip": case.tensors["in.student_feature_224"]}
    for name, tokens in inputs.items():
        row = (1, tokens.shape[1])
        translated = translators[name](tokens_to_map(tokens.requires_grad_(), row))
        case.check(map_to_tokens(translated), f"out.translated_{name}")
        teacher = recorded_teacher(case.tensors[f"in.teacher_{name}"], row)
        target = teacher(torch.zeros(tokens.shape[0], 3, 14, 14), teacher.frozen.module)
        losses.append(teacher.loss(translated, target))
        case.check(losses[-1], f"out.loss_{name}")
    loss = torch.stack(losses).mean()
    case.check(loss, "out.loss")
    loss.backward()
    case.check(_grad(inputs["dino"]), "grad.in.student_feature", "grad")
    case.check(_grad(inputs["clip"]), "grad.in.student_feature_224", "grad")
    expected = rename_tensors(case.group("grad.param"))
    compare({f"translators.{k}": v for k, v in gradients(translators).items()}, expected, **case.tolerance("grad"))


def fusion(case: Case) -> None:
    hyper = case.meta["hyper_parameters"]
    grid = (hyper["patch_h"], hyper["patch_w"])
    own, dino, clip = hyper["weights"]
    full, small = case.tensors["in.tap3"].requires_grad_(), case.tensors["in.student_224"].float().requires_grad_()

    def maps(images: Tensor) -> tuple[Tensor, ...]:
        if images.shape[-1] == CLIP_INPUT:
            return (tokens_to_map(small, hyper["clip_grid"]),)
        return (tokens_to_map(full, grid),)

    width = hyper["student_dim"]
    student = MTDFSegmenter(
        recorded_backbone(maps, [width]),
        _LastMap(),  # type: ignore[arg-type]  # shows what would reach the head
        make_task(2),
        translators=make_translators(hyper, width, hyper["hidden"]),
        fusion_weights={"dino": dino, "clip": clip},
        student_weight=own,
    )
    load_into(student, rename_tensors(case.group("param")), case.name)
    images = torch.zeros(hyper["batch"], 3, *grid)  # a pixel per token, so that the fused map is not resized
    output = student.forward_translated(images)
    case.check(map_to_tokens(output.logits), "out.fused")
    case.check(map_to_tokens(student(images)), "out.fused")  # translator and projection multiplied out

    teachers = {
        "dino": recorded_teacher(case.tensors["in.teacher_dino"], grid),
        "clip": recorded_teacher(case.tensors["in.teacher_clip"], hyper["clip_grid"], input_size=CLIP_INPUT),
    }
    distill = torch.stack(
        [t.loss(output.translated[name], t(images, student.backbone)) for name, t in teachers.items()]
    ).mean()
    case.check(distill, "out.distill_loss")

    loss = (map_to_tokens(output.logits) * case.tensors["in.cotangent"]).sum()
    loss.backward(retain_graph=True)
    tolerance = case.tolerance("grad")
    case.check(_grad(full), "gradfused.in.tap3", "grad")
    case.check(_grad(small), "gradfused.in.student_224", "grad")
    compare(gradients(student), rename_tensors(case.group("gradfused.param")), **tolerance)
    student.zero_grad()
    distill.backward()
    found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    compare(found, rename_tensors(case.group("graddistill.param")), **tolerance)


def dinov2_taps(case: Case) -> None:
    hyper = case.meta["hyper_parameters"]
    backbone = dinov2(hyper, image_size=hyper["img_size"])
    weights = {f"backbone.{name}": tensor for name, tensor in case.group("param").items()}
    load_into(backbone, _below(rename_tensors(weights), "backbone."), case.name)
    table = case.tensors["param.pos_embed"]
    last = len(hyper["taps"]) - 1
    for height, width in hyper["sizes"]:
        size, grid = f"{height}x{width}", (height // 14, width // 14)
        resampled = resample_positions(table, grid, prefix=1, mode="dinov2")
        case.check(resampled, f"out.{size}.pos_embed")
        images = case.tensors[f"in.{size}"].float().requires_grad_()
        taps = [map_to_tokens(tap) for tap in backbone(images)]
        for i, tap in enumerate(taps):
            case.check(tap, f"out.{size}.tap{i}")
        assert not torch.allclose(taps[last], case.tensors[f"negative.{size}.last_without_norm"], atol=1e-2)
        if f"grad.{size}.input" in case.tensors:
            backbone.zero_grad()
            cotangents = [case.tensors[f"in.{size}.cotangent{i}"] for i in range(len(taps))]
            sum((tap * c).sum() for tap, c in zip(taps, cotangents, strict=True)).backward()  # type: ignore[union-attr]
            case.check(_grad(images), f"grad.{size}.input", "grad")
            expected = {f"backbone.{name}": grad for name, grad in case.group(f"grad.{size}.param").items()}
            compare(gradients(backbone), _below(rename_tensors(expected), "backbone."), **case.tolerance("grad"))


def clip_patch(case: Case) -> None:
    hyper = case.meta["hyper_parameters"]
    entry = ZooEntry(
        name="clip",
        timm_name="vit_large_patch14_clip_quickgelu_224",
        kind="vit",
        millions=0,
        strides=(hyper["patch_size"],),
        out_indices=(hyper["layers"] - 1,),
        arguments={
            "img_size": hyper["input_resolution"],
            "patch_size": hyper["patch_size"],
            "embed_dim": hyper["width"],
            "depth": hyper["layers"],
            "num_heads": hyper["heads"],
        },
    )
    config = BackboneConfig(name="clip", out_norm="none", statistics="data")
    backbone = assemble(entry, config, make_task(2), load_weights=False)
    load_into(backbone.body.network, _clip_tower(case.group("param")), case.name)
    tokens = map_to_tokens(backbone(case.tensors["in.image"].float())[-1])
    case.check(tokens, "out.patch_tokens")
    assert not torch.allclose(tokens, case.tensors["negative.patch_after_ln_post"], atol=1e-2)


def comp_dropout(case: Case) -> None:
    hyper = case.meta["hyper_parameters"]
    grid = (hyper["patch_h"], hyper["patch_w"])
    maps = tuple(tokens_to_map(case.tensors[f"in.tap{i}"], grid) for i in range(4))
    given = case.tensors["in.dropout_mask"]
    student = MTDFSegmenter(
        recorded_backbone(lambda _: maps, [hyper["dim"]] * 4),
        _head(hyper, hyper["dim"], case.group("param"), prefix=""),
        make_task(hyper["nclass"]),
        translators={},
        fusion_weights={},
    )
    images = torch.zeros(len(given), 3, 14 * grid[0], 14 * grid[1])
    case.check(student.forward_translated(images, given).logits, "out.logits")
    pairs = hyper["batch_pairs"]
    for masks in (given, complementary_masks(pairs, hyper["dim"])):
        assert (masks[:pairs] + masks[pairs:] == 2).all()
        assert int((masks[:pairs] == 1).all(dim=1).sum()) == case.meta["scalars"]["pairs_kept"]
        assert set(masks.unique().tolist()) <= {0.0, 1.0, 2.0}


def model(case: Case) -> None:
    hyper, scalars = case.meta["hyper_parameters"], case.meta["scalars"]
    student = make_student(hyper, case.group("param"))
    images = case.tensors["in.x"].float()
    seen: dict[str, Tensor] = {}
    student.head.register_forward_pre_hook(lambda _, inputs: seen.update(enumerate(inputs[0])))  # type: ignore[arg-type]
    output = student.forward_translated(images)
    for i in range(4):
        case.check(map_to_tokens(seen[i]), f"out.head_in{i}")  # type: ignore[index]
    case.check(output.logits, "out.logits")
    case.check(student(images), "out.logits")
    clip_input = resize(images[:1], (CLIP_INPUT, CLIP_INPUT), align_corners=True)[..., ::8, ::8]
    case.check(clip_input, "out.x_clip_input")

    grid = (hyper["height"] // 14, hyper["width"] // 14)
    teachers = {
        "dino": recorded_teacher(case.tensors["in.teacher_dino"], grid),
        "clip": recorded_teacher(case.tensors["in.teacher_clip"], (16, 16), input_size=CLIP_INPUT),
    }
    errors = [t.loss(output.translated[name], t(images, student.backbone)) for name, t in teachers.items()]
    distill, ce = torch.stack(errors).mean(), cross_entropy(output.logits, case.tensors["in.labels"].long())
    case.check(distill, "out.distill_loss")
    case.check(ce, "out.ce")
    (ce + distill).backward()
    found, tolerance = gradients(student), case.meta["tolerance"]
    expected = rename_tensors(case.group("grad"))
    compare(found, expected, rtol=tolerance["grad_rtol"], atol=tolerance["grad_atol"])
    norms = rename_tensors({name: torch.tensor(value) for name, value in scalars["grad_norms"].items()})
    assert set(norms) == set(found)
    actual = {name: grad.norm() for name, grad in found.items()}
    compare(actual, norms, rtol=tolerance["grad_rtol"], atol=tolerance["grad_atol"])


class _LastMap(torch.nn.Module):
    """Stands for a head: returns the last map."""

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        return maps[-1]


def _head(hyper: Mapping[str, object], width: int, state: Mapping[str, Tensor], prefix: str = "head.") -> DPTHead:
    head = DPTHead(
        [width] * 4,
        [14] * 4,
        hyper["nclass"],  # type: ignore[arg-type]
        widths=hyper["out_channels"],  # type: ignore[arg-type]
        features=hyper["features"],  # type: ignore[arg-type]
    )
    load_into(head, _head_names(state, prefix), "golden")
    return head


def _head_names(state: Mapping[str, Tensor], prefix: str = "head.") -> dict[str, Tensor]:
    return _below(rename_tensors({prefix + name: tensor for name, tensor in state.items()}), "head.")


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _remember(module: torch.nn.Module, seen: dict[str, Tensor], name: str) -> None:
    module.register_forward_hook(lambda _module, _inputs, output: seen.update({name: output}))


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _clip_tower(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's names of the image tower -> timm's; the last norm and the projection make no patch token."""
    parts = (
        ("transformer.resblocks.", "blocks."),
        ("ln_1", "norm1"),
        ("ln_2", "norm2"),
        ("attn.in_proj_", "attn.qkv."),
        ("attn.out_proj", "attn.proj"),
        ("c_fc", "fc1"),
        ("c_proj", "fc2"),
        ("conv1", "patch_embed.proj"),
        ("ln_pre", "norm_pre"),
    )
    renamed = {}
    for name, tensor in state.items():
        if name == "proj" or name.startswith("ln_post"):
            continue
        for theirs, ours in parts:
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    renamed["cls_token"] = renamed.pop("class_embedding")[None, None]
    renamed["pos_embed"] = renamed.pop("positional_embedding")[None]
    return renamed


HANDLERS: dict[str, Handler] = {
    "dpt_head": dpt_head,
    "translator_distill": translator_distill,
    "fusion": fusion,
    "dinov2": dinov2_taps,
    "clip_patch": clip_patch,
    "comp_dropout": comp_dropout,
    "model": model,
}
