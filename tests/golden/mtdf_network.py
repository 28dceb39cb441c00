"""RS-MTDF's golden cases of the network: DPT head, translators, fusion, backbones and the whole student."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rsseg.backbones.backbone import assemble
from rsseg.backbones.bodies import resample_positions
from rsseg.backbones.zoo import ZooEntry
from rsseg.checkpoint import load_into
from rsseg.config import BackboneConfig
from rsseg.layers.blocks import resize
from rsseg.layers.decoders import DPTHead
from rsseg.layers.losses import cross_entropy
from rsseg.methods.mtdf.importer import rename_tensors
from rsseg.methods.mtdf.method import complementary_masks
from rsseg.methods.mtdf.network import MTDFSegmenter
from tests.golden.builders import as_precise, grad_of, gradients, make_task, norm
from tests.golden.case import Case
from tests.golden.harness import Drivers
from tests.golden.mtdf_parts import (
    CLIP_GRID,
    CLIP_INPUT,
    PATCH,
    check_sizes,
    compare_scalars,
    dinov2,
    grid_of,
    make_head,
    make_student,
    make_translators,
    map_to_tokens,
    recorded_backbone,
    recorded_teacher,
    recorded_teachers,
    tokens_to_map,
)
from tests.golden.settings import Settings, plain


def dpt_head(case: Case) -> None:
    """Logits, the maps on the way, and gradients of sum(logits * cotangent)."""
    hyper = case.meta["hyper_parameters"]
    grid = grid_of(hyper)
    head = _loaded_head(case, hyper, hyper["in_channels"])
    seen: dict[str, Tensor] = {}
    for level in range(4):
        _remember(head.lateral[level], seen, f"layer{level + 1}_rn")
        _remember(head.fuse[level], seen, f"path{level + 1}")
    taps = [case.tensors[f"in.tap{i}"].requires_grad_() for i in range(4)]
    check_sizes(hyper, batch=len(taps[0]))
    logits = head([tokens_to_map(tap, grid) for tap in taps])
    case.check(logits, "out.logits")
    for key in seen:
        if case.has(f"out.{key}"):
            case.check(seen[key], f"out.{key}")
    if case.has("out.logits_upsampled"):
        upsampled = resize(logits, (PATCH * grid[0], PATCH * grid[1]), align_corners=True)
        case.check(upsampled, "out.logits_upsampled")
    if "in.cotangent" not in case.tensors:
        return
    (logits * case.tensors["in.cotangent"]).sum().backward()
    for i, tap in enumerate(taps):
        if case.has(f"grad.in.tap{i}"):
            case.check(grad_of(tap), f"grad.in.tap{i}", "grad")
    case.check_named(gradients(head), _head_names(case.group("grad.param")))


def translator_distill(case: Case) -> None:
    """Predicted maps, both errors and their mean, and its gradients."""
    hyper = case.meta["hyper_parameters"]
    made = make_translators(hyper, hyper["student_dim"], hyper["hidden"], project=False)
    translators = nn.ModuleDict(made)
    weights = rename_tensors(case.group("param"))
    load_into(translators, {name.removeprefix("translators."): tensor for name, tensor in weights.items()}, case.name)
    inputs = {"dino": case.tensors["in.student_feature"], "clip": case.tensors["in.student_feature_224"]}
    check_sizes(hyper, batch=len(inputs["dino"]), tokens=inputs["dino"].shape[1], tokens_224=inputs["clip"].shape[1])
    losses: dict[str, Tensor] = {}
    for name, tokens in inputs.items():
        row = (1, tokens.shape[1])
        translated = made[name](tokens_to_map(tokens.requires_grad_(), row))
        case.check(map_to_tokens(translated), f"out.translated_{name}")
        teacher = recorded_teacher(case.tensors[f"in.teacher_{name}"], row)
        target = teacher(torch.zeros(tokens.shape[0], 3, PATCH, PATCH), teacher.frozen.module)
        losses[f"loss_{name}"] = teacher.loss(translated, target)
    losses["loss"] = torch.stack(list(losses.values())).mean()
    for key, loss in losses.items():
        case.check(loss, f"out.{key}")
    compare_scalars(case, losses)
    if not any(key.startswith("grad.") for key in case.tensors):
        return
    losses["loss"].backward()
    for name, key in (("dino", "student_feature"), ("clip", "student_feature_224")):
        case.check(grad_of(inputs[name]), f"grad.in.{key}", "grad")
    found = {f"translators.{name}": grad for name, grad in gradients(translators).items()}
    case.check_named(found, rename_tensors(case.group("grad.param")))


def fusion(case: Case) -> None:
    """The fused last map, the distillation loss, and gradients of either."""
    hyper = case.meta["hyper_parameters"]
    grid, width = grid_of(hyper), hyper["student_dim"]
    hyper.expect("align_corners", True)
    hyper.expect("clip_grid", list(CLIP_GRID))
    own, dino, clip = plain(hyper["weights"])
    full, small = (case.tensors[key].requires_grad_() for key in ("in.tap3", "in.student_224"))
    check_sizes(hyper, batch=len(full))

    def maps(images: Tensor) -> tuple[Tensor, ...]:
        at_clip_size = tuple(images.shape[-2:]) == (CLIP_INPUT, CLIP_INPUT)
        return (tokens_to_map(small, CLIP_GRID) if at_clip_size else tokens_to_map(full, grid),)

    student = MTDFSegmenter(
        recorded_backbone(maps, [width]),
        _LastMap(),  # type: ignore[arg-type]  # shows what would reach the head
        make_task(2),
        translators=make_translators(hyper, width, hyper["hidden"]),
        fusion_weights={"dino": dino, "clip": clip},
        student_weight=own,
    )
    load_into(student, rename_tensors(case.group("param")), case.name)
    images = torch.zeros(len(full), 3, *grid)  # a pixel per token, so that the fused map is not resized
    output = student.forward_translated(images)
    case.check(map_to_tokens(output.logits), "out.fused")
    case.check(map_to_tokens(student(images)), "out.fused")  # translator and projection multiplied out
    teachers = recorded_teachers(case, grid)
    errors = [t.loss(output.translated[name], t(images, student.backbone)) for name, t in teachers.items()]
    distill = torch.stack(errors).mean()
    case.check(distill, "out.distill_loss")
    compare_scalars(case, {"distill_loss": distill})

    if recorded := case.group("gradfused.param"):
        (map_to_tokens(output.logits) * case.tensors["in.cotangent"]).sum().backward(retain_graph=True)
        case.check(grad_of(full), "gradfused.in.tap3", "grad")
        case.check(grad_of(small), "gradfused.in.student_224", "grad")
        case.check_named(gradients(student), rename_tensors(recorded))
        student.zero_grad()
    if recorded := case.group("graddistill.param"):
        distill.backward()
        case.check_named(gradients(student, missing="leave out"), rename_tensors(recorded))


def dinov2_maps(case: Case) -> None:
    """Compare position tables, maps and gradients at several image sizes; any subset of the maps may be recorded."""
    hyper = case.meta["hyper_parameters"]
    backbone = dinov2(hyper, image_size=hyper["img_size"])
    hyper.expect("native_grid", hyper["img_size"] // PATCH)
    load_into(backbone, _backbone_names(case.group("param")), case.name)
    classes: list[Tensor] = []  # the class token does not leave a backbone; it is taken from the last block
    network = backbone.body.network
    network.blocks[-1].register_forward_hook(lambda _module, _inputs, tokens: classes.append(tokens[:, 0]))
    last = hyper["depth"] - 1
    compared = 0
    check_sizes(hyper, batch=len(next(tensor for key, tensor in case.tensors.items() if key.startswith("in."))))
    for height, width in hyper["sizes"]:
        size, grid = f"{height}x{width}", (height // PATCH, width // PATCH)
        if case.has(f"out.{size}.pos_embed"):
            resampled = resample_positions(case.tensors["param.pos_embed"], grid, prefix=1, mode="dinov2")
            case.check(resampled, f"out.{size}.pos_embed")
        images = case.tensors[f"in.{size}"].requires_grad_()
        maps = [map_to_tokens(level) for level in backbone(images)]
        for i, tokens in enumerate(maps):
            if case.has(f"out.{size}.tap{i}"):
                case.check(tokens, f"out.{size}.tap{i}")
                compared += 1
        if case.has(f"out.{size}.cls_last") and last in plain(hyper["taps"]):
            case.check(network.norm(classes[-1]), f"out.{size}.cls_last")
        if case.has(f"negative.{size}.last_without_norm"):
            case.check_differs(maps[-1], f"negative.{size}.last_without_norm")
        if case.has(f"grad.{size}.input"):
            backbone.zero_grad()
            parts = [(maps[i] * c).sum() for i, c in _numbered(case, f"in.{size}.cotangent").items()]
            torch.stack(parts).sum().backward()
            case.check(grad_of(images), f"grad.{size}.input", "grad")
            case.check_named(gradients(backbone), _backbone_names(case.group(f"grad.{size}.param")))
    assert compared, f"{case.name}: no map is recorded"


def clip_patch(case: Case) -> None:
    """Patch tokens of the last block, before the last norm and the projection."""
    hyper = case.meta["hyper_parameters"]
    hyper.expect("activation", "QuickGELU")
    hyper.expect("ln_eps", 1e-5)
    tensors = case.group("param")
    if "output_dim" in hyper and "proj" in tensors:
        assert tensors["proj"].shape[-1] == hyper["output_dim"]
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
    backbone = as_precise(assemble(entry, config, make_task(2), load_weights=False))
    load_into(backbone.body.network, _clip_tower(tensors), case.name)
    check_sizes(hyper, batch=len(case.tensors["in.image"]))
    tokens = map_to_tokens(backbone(case.tensors["in.image"])[-1])
    case.check(tokens, "out.patch_tokens")
    for key in case.group("negative"):
        recorded = case.tensors[f"negative.{key}"]
        if recorded.shape == tokens.shape:
            case.check_differs(tokens, f"negative.{key}")


def comp_dropout(case: Case) -> None:
    """Compare logits under recorded channel masks, and check the rules of our own masks."""
    hyper = case.meta["hyper_parameters"]
    grid, pairs, width = grid_of(hyper), hyper["batch_pairs"], hyper["dim"]
    hyper.expect("dropout_prob", 0.5)
    maps = tuple(tokens_to_map(case.tensors[f"in.tap{i}"], grid) for i in range(4))
    given = case.tensors["in.dropout_mask"]
    check_sizes(hyper, batch=len(given))
    student = MTDFSegmenter(
        recorded_backbone(lambda _: maps, [width] * 4),
        _loaded_head(case, hyper, width, prefix=""),
        make_task(hyper["nclass"]),
        translators={},
        fusion_weights={},
    )
    images = torch.zeros(len(given), 3, PATCH * grid[0], PATCH * grid[1])
    case.check(student.forward_translated(images, given).logits, "out.logits")
    for masks in (given, complementary_masks(pairs, width)):
        assert (masks[:pairs] + masks[pairs:] == 2).all()
        assert int((masks[:pairs] == 1).all(dim=1).sum()) == case.meta["scalars"]["pairs_kept"]
        assert set(masks.unique().tolist()) <= {0.0, 1.0, 2.0}


def model(case: Case) -> None:
    """The whole student: what reaches the head, logits, losses; gradients and their norms, whichever are recorded."""
    hyper, scalars = case.meta["hyper_parameters"], case.meta["scalars"]
    student = make_student(hyper, case.group("param"))
    images = case.tensors["in.x"]
    check_sizes(hyper, batch=len(images), height=images.shape[-2], width=images.shape[-1])
    seen: dict[int, Tensor] = {}
    student.head.register_forward_pre_hook(lambda _, inputs: seen.update(enumerate(inputs[0])))
    output = student.forward_translated(images)
    for i in range(4):
        if case.has(f"out.head_in{i}"):
            case.check(map_to_tokens(seen[i]), f"out.head_in{i}")
    case.check(output.logits, "out.logits")
    case.check(student(images), "out.logits")
    if case.has("out.x_clip_input"):
        small = resize(images[:1], (CLIP_INPUT, CLIP_INPUT), align_corners=True)
        step = CLIP_INPUT // case.tensors["out.x_clip_input"].shape[-1]
        case.check(small[..., ::step, ::step], "out.x_clip_input")
    teachers = recorded_teachers(case, grid_of(hyper))
    errors = [t.loss(output.translated[name], t(images, student.backbone)) for name, t in teachers.items()]
    losses = {
        "distill_loss": torch.stack(errors).mean(),
        "ce": cross_entropy(output.logits, case.tensors["in.labels"].long()),
    }
    for key, loss in losses.items():
        if case.has(f"out.{key}"):
            case.check(loss, f"out.{key}")
    compare_scalars(case, {"ce": losses["ce"], "distill": losses["distill_loss"]})
    torch.stack(list(losses.values())).sum().backward()
    found = gradients(student)
    case.check_named(found, rename_tensors(case.group("grad")))
    if "grad_norms" in scalars:
        norms = rename_tensors({name: torch.tensor(value) for name, value in scalars["grad_norms"].items()})
        assert set(norms) == set(found)
        actual = {name: torch.tensor(norm([grad])) for name, grad in found.items()}
        case.check_named(actual, norms, "grad")


class _LastMap(nn.Module):
    """Head that returns the last map."""

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        return maps[-1]


def _loaded_head(case: Case, hyper: Settings, width: int, prefix: str = "head.") -> DPTHead:
    head = make_head(hyper, width)
    load_into(head, _head_names(case.group("param"), prefix), case.name)
    return head


def _head_names(state: Mapping[str, Tensor], prefix: str = "head.") -> dict[str, Tensor]:
    return _below(rename_tensors({prefix + name: tensor for name, tensor in state.items()}), "head.")


def _backbone_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _below(rename_tensors({f"backbone.{name}": tensor for name, tensor in state.items()}), "backbone.")


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _numbered(case: Case, prefix: str) -> dict[int, Tensor]:
    """Tensors `prefix0`, `prefix1`, ..., of which some may be absent."""
    keys = [key for key in case.tensors if key.startswith(prefix) and key.removeprefix(prefix).isdigit()]
    return {int(key.removeprefix(prefix)): case.tensors[key] for key in keys}


def _remember(module: nn.Module, seen: dict[str, Tensor], name: str) -> None:
    module.register_forward_hook(lambda _module, _inputs, output: seen.update({name: output}))


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
        name = name.removeprefix("visual.")
        if name == "proj" or name.startswith("ln_post"):
            continue
        for theirs, ours in parts:
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    renamed["cls_token"] = renamed.pop("class_embedding")[None, None]
    renamed["pos_embed"] = renamed.pop("positional_embedding")[None]
    return renamed


DRIVERS: Drivers = {
    "dpt_head": dpt_head,
    "translator_distill": translator_distill,
    "fusion": fusion,
    "dinov2": dinov2_maps,
    "clip_patch": clip_patch,
    "comp_dropout": comp_dropout,
    "model": model,
}
