"""KTDA's published networks with parameters that a case's rules make from the reference's names."""

import re
from collections.abc import Collection, Iterable

import torch
from torch import nn

from rsseg.backbones.backbone import Backbone, create_backbone
from rsseg.config import BackboneConfig
from rsseg.methods.ktda.method import KTDAMethod, assemble_method
from rsseg.methods.ktda.network import assemble_segmenter
from rsseg.methods.ktda.recipe import KTDARecipe
from rsseg.recipe import load_recipe
from rsseg.task import Task
from tests.golden.builders import as_precise, make_task
from tests.golden.case import Case
from tests.golden.ktda_networks import own_name

CLASSES = {"grass": 5, "cloud": 4}
"""Published data set, which is also the name of our recipe -> its number of classes."""

_BLOCK = r"student\.body\.network\.stages\.(\d+)\.blocks\.(\d+)\."
_REFERENCE = (
    (r"student\.body\.network\.stem\.(.+)", r"backbone.downsample_layers.0.\1"),
    (r"student\.body\.network\.stages\.(\d+)\.downsample\.(.+)", r"backbone.downsample_layers.\1.\2"),
    (_BLOCK + r"conv_dw\.(.+)", r"backbone.stages.\1.\2.depthwise_conv.\3"),
    (_BLOCK + r"mlp\.fc([12])\.(.+)", r"backbone.stages.\1.\2.pointwise_conv\3.\4"),
    (_BLOCK + r"mlp\.grn\.weight", r"backbone.stages.\1.\2.grn.gamma"),
    (_BLOCK + r"mlp\.grn\.bias", r"backbone.stages.\1.\2.grn.beta"),
    (_BLOCK + r"(.+)", r"backbone.stages.\1.\2.\3"),
    (r"student\.body\.norms\.(\d)\.(.+)", r"backbone.norm\1.\2"),
    (r"teacher\.body\.network\.(cls_token|pos_embed)", r"teach_backbone.\1"),
    (r"teacher\.body\.network\.patch_embed\.proj\.(.+)", r"teach_backbone.patch_embed.projection.\1"),
    (r"teacher\.body\.network\.blocks\.(\d+)\.norm([12])\.(.+)", r"teach_backbone.layers.\1.ln\2.\3"),
    (r"teacher\.body\.network\.blocks\.(\d+)\.(attn\..+)", r"teach_backbone.layers.\1.\2"),
    (r"teacher\.body\.network\.blocks\.(\d+)\.ls1\.gamma", r"teach_backbone.layers.\1.attn.gamma1.weight"),
    (r"teacher\.body\.network\.blocks\.(\d+)\.ls2\.gamma", r"teach_backbone.layers.\1.ffn.gamma2.weight"),
    (r"teacher\.body\.network\.blocks\.(\d+)\.mlp\.fc1\.(.+)", r"teach_backbone.layers.\1.ffn.layers.0.0.\2"),
    (r"teacher\.body\.network\.blocks\.(\d+)\.mlp\.fc2\.(.+)", r"teach_backbone.layers.\1.ffn.layers.1.\2"),
    (r"teacher\.body\.network\.norm\.(.+)", r"teach_backbone.ln1.\1"),
    (r"fam\.projections\.(.+)", r"fam.convert.\1"),
    (r"neck\.laterals\.(\d+)\.(.+)", r"neck.lateral_convs.\1.conv.\2"),
    (r"neck\.convs\.(\d+)\.(.+)", r"neck.convs.\1.conv.\2"),
    (r"fmm\.stacks\.(\d+\.\d+)\.(qkv|proj)\.(.+)", r"fmm.adapters.\1.attn.\2.\3"),
    (r"fmm\.stacks\.(\d+\.\d+)\.(fc[12])\.(.+)", r"fmm.adapters.\1.mlp.\2.\3"),
    (r"fmm\.stacks\.(\d+\.\d+)\.(.+)", r"fmm.adapters.\1.\2"),
    (r"decoder\.pools\.(\d+)\.(.+)", r"decode_head.psp_modules.\1.1.\2"),
    (r"decoder\.pyramid\.(.+)", r"decode_head.bottleneck.\1"),
    (r"decoder\.laterals\.(.+)", r"decode_head.lateral_convs.\1"),
    (r"decoder\.smooths\.(.+)", r"decode_head.fpn_convs.\1"),
    (r"decoder\.fusion\.(.+)", r"decode_head.fpn_bottleneck.\1"),
    (r"decoder\.projections\.(.+)", r"decode_head.convs.\1"),
    (r"decoder\.classifier\.conv\.(.+)", r"decode_head.conv_seg.\1"),
    (r"aux_heads\.(\d+)\.head\.convs\.(.+)", r"auxiliary_head.\1.convs.\2"),
    (r"aux_heads\.(\d+)\.head\.join\.(.+)", r"auxiliary_head.\1.conv_cat.\2"),
    (r"aux_heads\.(\d+)\.head\.classifier\.conv\.(.+)", r"auxiliary_head.\1.conv_seg.\2"),
)  # fmt: skip
"""Our names -> the reference's; each result is checked with the importer, which goes the other way."""


def reference_names(own: Collection[str]) -> dict[str, str]:
    """Our names of all tensors of a network -> the reference's."""
    transformer = any(name.startswith("fmm.") and ".qkv." in name for name in own)
    pyramid = any(name.startswith("decoder.pools.") for name in own)
    several = any(name.startswith("aux_heads.1.") for name in own)
    found = {}
    for name in own:
        pattern, replacement = next(rule for rule in _REFERENCE if re.fullmatch(rule[0], name))
        reference = re.sub(pattern, replacement, name)
        if not transformer:
            reference = re.sub(r"^(fmm\..+)\.mlp\.(fc[12])", r"\1.\2", reference)
        if not pyramid:
            reference = reference.replace("decode_head.fpn_bottleneck.", "decode_head.fusion_conv.")
        if not several:
            reference = reference.replace("auxiliary_head.0.", "auxiliary_head.")
        assert own_name(reference) == name, f"{name} was taken for {reference}"
        found[name] = reference
    return found


def generate_parameters(case: Case, method: KTDAMethod) -> None:
    """Fill the whole method, batch norm's averages and counters included, by the case's rules."""
    parts: list[tuple[str, nn.Module]] = [("", method.segmenter), ("aux_heads.", method.aux_heads)]
    if method.distillation:
        parts.append(("teacher.", method.distillation.teacher.module))
    fill(case, parts)


def fill(case: Case, parts: Iterable[tuple[str, nn.Module]]) -> None:
    """Fill modules, given with the prefix of their tensors' names in a whole model."""
    assert case.generator is not None, f"{case.name} stores no parameters and has no rule for them"
    states = {prefix: module.state_dict() for prefix, module in parts}
    references = reference_names([prefix + name for prefix, state in states.items() for name in state])
    made = {}
    for prefix, state in states.items():
        for name, tensor in state.items():
            reference = references[prefix + name]
            tensor.copy_(made.setdefault(reference, case.generator.parameter(reference, tensor)))
            for key in (reference, f"sd.{reference}"):
                if key in case.statistics:
                    case.check(tensor, key)
    for key, expected in case.meta.get("self_check", {}).items():
        name, _, end = key.partition("[:")
        values = made.get(name)
        if values is None:
            values = case.generator.input(name, case.meta["input_shape"])
        case.close(f"self check of {key}", values.flatten()[: int(end.rstrip("]"))], torch.tensor(expected), rtol=1e-6)


def published_recipe(case: Case) -> tuple[KTDARecipe, Task]:
    """The packaged recipe that the case's module, description or name mentions, for images that are normalized."""
    text = f"{case.kind} {case.detail} {case.name} {case.meta.get('note', '')}".lower()
    (name,) = [name for name in CLASSES if name in text]
    recipe = load_recipe(name)
    update = {"statistics": "data", "weights": "random", "drop_path": 0.0}
    decoder = recipe.decoder.model_copy(update={"dropout": 0.0})
    return recipe.model_copy(
        update={
            "student": recipe.student.model_copy(update=update),
            "teacher": recipe.teacher.model_copy(update=update),
            "decoder": decoder,
            "aux": tuple(aux.model_copy(update={"dropout": 0.0}) for aux in recipe.aux),
        }
    ), make_task(CLASSES[name])


def published_backbone(config: BackboneConfig, task: Task) -> Backbone:
    return as_precise(create_backbone(config, task, load_weights=False))


def published_method(case: Case) -> KTDAMethod:
    """The whole published method with untrained weights; recorded steps have neither dropout nor stochastic depth."""
    recipe, task = published_recipe(case)
    student, teacher = (published_backbone(config, task) for config in (recipe.student, recipe.teacher))
    segmenter = assemble_segmenter(recipe, task, student, teacher.info)
    return assemble_method(recipe, segmenter, teacher)
