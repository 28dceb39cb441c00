"""Checkpoints in the authors' names, and MiT weights in the names of four libraries."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from rsseg.backbones.backbone import create_backbone
from rsseg.backbones.loading import mit_to_timm
from rsseg.cli import run
from rsseg.config import BackboneConfig
from rsseg.errors import WeightsError
from rsseg.inference.network import load_segmenter
from rsseg.methods.dasegnet.importer import import_checkpoint, rename_tensors, unread_neck_levels
from rsseg.methods.dasegnet.network import build_segmenter
from tests.conftest import rgb_task
from tests.unit.dasegnet_models import make_recipe

MIT = {"name": "mit_b0", "weights": "random"}
State = dict[str, Tensor]


def mit_state() -> State:
    torch.manual_seed(0)
    backbone = create_backbone(BackboneConfig(**MIT), rgb_task(), load_weights=False)
    return {name.removeprefix("body.network."): tensor for name, tensor in backbone.state_dict().items()}


def renamed(state: State, rules: list[tuple[str, str]]) -> State:
    result = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result


def with_stage_zero_embedding(state: State) -> State:
    return renamed(state, [(r"^patch_embed\.", "stages.0.embed."), (r"\.downsample\.", ".embed.")])


def to_mmseg(state: State) -> State:
    """Written from the library's module tree: [embedding, blocks, norm] per stage, packed projections, 1x1 convs."""
    state = dict(state)
    for name in [name for name in state if ".attn.q." in name]:
        query, key_value = state.pop(name), state.pop(name.replace(".q.", ".kv."))
        state[name.replace(".attn.q.", ".attn.attn.in_proj_")] = torch.cat([query, key_value])
    for name in state:
        if re.search(r"mlp\.fc[12]\.weight", name):
            state[name] = state[name][..., None, None]
    rules = [
        (r"^stages\.(\d)\.embed\.proj", r"layers.\1.0.projection"),
        (r"^stages\.(\d)\.embed\.norm", r"layers.\1.0.norm"),
        (r"^stages\.(\d)\.norm\.", r"layers.\1.2."),
        (r"^stages\.(\d)\.blocks\.(\d+)\.", r"layers.\1.1.\2."),
        (r"\.attn\.proj\.", ".attn.attn.out_proj."),
        (r"\.mlp\.fc1\.", ".ffn.layers.0."),
        (r"\.mlp\.dwconv\.", ".ffn.layers.1."),
        (r"\.mlp\.fc2\.", ".ffn.layers.4."),
    ]
    return renamed(with_stage_zero_embedding(state), rules)


def to_nvlabs(state: State) -> State:
    state = with_stage_zero_embedding(state)
    state = renamed(state, [(r"\.mlp\.dwconv\.", ".mlp.dwconv.dwconv.")])
    for stage in range(4):
        rules = [
            (rf"^stages\.{stage}\.embed\.", f"patch_embed{stage + 1}."),
            (rf"^stages\.{stage}\.blocks\.", f"block{stage + 1}."),
            (rf"^stages\.{stage}\.norm\.", f"norm{stage + 1}."),
        ]
        state = renamed(state, rules)
    return state | {"head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}


def split_key_value(state: State, key: str, value: str) -> State:
    state = dict(state)
    for name in [name for name in state if ".attn.kv." in name]:
        both = state.pop(name).chunk(2)
        state[name.replace(".attn.kv.", key)], state[name.replace(".attn.kv.", value)] = both
    return state


def to_hub(state: State) -> State:
    state = split_key_value(state, ".attention.self.key.", ".attention.self.value.")
    rules = [
        (r"^stages\.(\d)\.embed\.proj", r"patch_embeddings.\1.proj"),
        (r"^stages\.(\d)\.embed\.norm", r"patch_embeddings.\1.layer_norm"),
        (r"^stages\.(\d)\.norm\.", r"layer_norm.\1."),
        (r"^stages\.(\d)\.blocks\.(\d+)\.norm", r"block.\1.\2.layer_norm_"),
        (r"^stages\.(\d)\.blocks\.(\d+)\.", r"block.\1.\2."),
        (r"\.attn\.q\.", ".attention.self.query."),
        (r"\.attn\.sr\.", ".attention.self.sr."),
        (r"\.attn\.norm\.", ".attention.self.layer_norm."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc(\d)\.", r".mlp.dense\1."),
        (r"\.mlp\.dwconv\.", ".mlp.dwconv.dwconv."),
        (r"^", "segformer.encoder."),
    ]
    return renamed(with_stage_zero_embedding(state), rules) | {"classifier.weight": torch.zeros(1000, 256)}


def to_transformers_5(state: State) -> State:
    state = split_key_value(state, ".attention.k_proj.", ".attention.v_proj.")
    rules = [
        (r"\.embed\.proj", ".patch_embeddings.proj"),
        (r"\.embed\.norm", ".patch_embeddings.layer_norm"),
        (r"^stages\.(\d)\.norm\.", r"stages.\1.layer_norm."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.q\.", ".attention.q_proj."),
        (r"\.attn\.sr\.", ".attention.sequence_reduction.sequence_reduction."),
        (r"\.attn\.norm\.", ".attention.sequence_reduction.layer_norm."),
        (r"\.attn\.proj\.", ".attention.o_proj."),
        (r"\.mlp\.dwconv\.", ".mlp.dwconv.dwconv."),
        (r"^", "segformer."),
    ]
    return renamed(with_stage_zero_embedding(state), rules)


LAYOUTS = [dict, to_mmseg, to_nvlabs, to_hub, to_transformers_5]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_mit_weights_of_any_library_become_timms(layout: Callable[[State], State]) -> None:
    state = mit_state()
    result = mit_to_timm(layout(state))
    assert set(result) == set(state)
    assert all(torch.equal(result[name], tensor) for name, tensor in state.items())


def test_student_starts_from_a_file_in_the_hubs_names(tmp_path: Path) -> None:
    state = mit_state()
    save_file({name: tensor.contiguous() for name, tensor in to_hub(state).items()}, tmp_path / "mit.safetensors")
    config = BackboneConfig(name="mit_b0", weights=str(tmp_path / "mit.safetensors"))
    loaded = create_backbone(config, rgb_task()).state_dict()
    assert all(torch.equal(loaded[f"body.network.{name}"], tensor) for name, tensor in state.items())


def to_authors(name: str, tensor: Tensor) -> State:
    """Our segmenter's tensor under the authors' name, for a MiT with SegFormer decoders."""
    style = {"source": "s", "target": "t"}
    if found := re.fullmatch(r"decoder_(source|target)\.(.+)", name):
        rest = found[2]
        for ours, theirs in (
            ("projections.", "convs."),
            ("fusion.", "fusion_conv."),
            ("classifier.conv.", "conv_seg."),
        ):
            rest = rest.replace(ours, theirs)
        return {f"decode_head_{style[found[1]]}.{rest}": tensor}
    level, rest = re.fullmatch(r"neck\.levels\.(\d)\.(.+)", name).groups()  # type: ignore[union-attr]
    for ours, theirs in (
        ("distinct.squeeze", "fc"),
        ("distinct.weigh_source", "fcs.0"),
        ("distinct.weigh_target", "fcs.1"),
        ("universal.common", "conv.conv"),
        ("universal.reduce_source", "conv_s.conv"),
        ("universal.reduce_target", "conv_t.conv"),
    ):
        rest = rest.replace(ours, theirs)
    return {f"dsk_neck.dsk_neck{int(level) + 1}.{rest}": tensor}


def authors_checkpoint(state: State) -> State:
    authors: State = {}
    for ours, theirs in (("backbone_source", "backbone_s"), ("backbone_target", "backbone_t")):
        prefix = f"{ours}.body.network."
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        authors |= {f"{theirs}.{name}": tensor for name, tensor in to_mmseg(own).items()}
    for name, tensor in state.items():
        if not name.startswith("backbone"):
            authors |= to_authors(name, tensor)
    authors |= {
        f"cross_EMA_decoder_s.{n.removeprefix('decode_head_s.')}": t
        for n, t in list(authors.items())
        if n.startswith("decode_head_s.")
    }
    return authors | {"discriminator_s.discriminator.0.conv.bias": torch.zeros(4)}


def test_authors_checkpoint_becomes_a_model_file_with_the_same_logits(tmp_path: Path) -> None:
    recipe, task = make_recipe(backbone=MIT), rgb_task()
    torch.manual_seed(0)
    segmenter = build_segmenter(recipe, task).eval()
    source = tmp_path / "authors.pth"
    torch.save({"state_dict": authors_checkpoint(segmenter.state_dict()), "meta": {"iter": 1}}, source)
    header = import_checkpoint(source, recipe, task, output=tmp_path / "model.safetensors")
    assert header.training == {"imported_from": "authors.pth", "weights": "student"}
    loaded = load_segmenter(tmp_path / "model.safetensors")
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(images), segmenter(images))


def to_authors_deeplab(name: str, tensor: Tensor) -> State:
    """Our tensor under the authors' name, for a ResNetV1c with DeepLabV3+ decoders."""
    rules = [
        (r"^backbone_(s|t)\w+\.body\.network\.", r"backbone_\1."),
        (r"^(backbone_.\.)conv1\.", r"\1stem."),
        (r"^(backbone_.\.)bn1\.", r"\1stem.7."),
        (r"^decoder_(s|t)\w+\.", r"decode_head_\1."),
        (r"\.classifier\.conv\.", ".conv_seg."),
        (r"\.pool\.", ".image_pool.1."),
        (r"\.branches\.0\.", ".aspp_modules.0."),
        (r"\.branches\.", ".aspp_modules."),
        (r"\.refine\.", ".sep_bottleneck."),
        (r"\.low\.", ".c1_bottleneck."),
        (r"(aspp_modules\.[1-3]|sep_bottleneck\.\d)\.depthwise\.", r"\1.depthwise_conv.conv."),
        (r"(aspp_modules\.[1-3]|sep_bottleneck\.\d)\.bn\.", r"\1.depthwise_conv.bn."),
        (r"(aspp_modules\.[1-3]|sep_bottleneck\.\d)\.pointwise\.", r"\1.pointwise_conv."),
    ]
    return to_authors(name, tensor) if name.startswith("neck") else renamed({name: tensor}, rules)


def test_authors_resnet_checkpoint_fills_the_network_and_unread_neck_levels_are_left_out() -> None:
    resnet = {"name": "resnet50_v1c_d8", "weights": "random"}
    recipe = make_recipe(backbone=resnet, decoder={"type": "deeplabv3plus", "channels": 8})
    with torch.device("meta"):
        wanted = build_segmenter(recipe, rgb_task()).state_dict()
    authors = {k: v for name, tensor in wanted.items() for k, v in to_authors_deeplab(name, tensor).items()}
    assert "decode_head_t.aspp_modules.3.depthwise_conv.bn.weight" in authors
    assert "backbone_s.stem.7.running_var" in authors
    unread = "dsk_neck.dsk_neck2.fc.weight"  # DeepLabV3+ reads the first level and the last
    found = rename_tensors(authors | {unread: torch.zeros(1)}).segmenter
    assert {name: tensor.shape for name, tensor in found.items() if name in wanted} == {
        name: tensor.shape for name, tensor in wanted.items()
    }
    assert (
        unread_neck_levels(found, wanted) == found.keys() - wanted.keys() == {"neck.levels.1.distinct.squeeze.weight"}
    )


def test_command_imports_a_checkpoint_that_info_and_eval_understand(
    rgb_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(backbone=MIT, data={"path": str(rgb_dataset), "augment": {"crop_size": 64}})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    authors = authors_checkpoint(build_segmenter(recipe, rgb_task()).state_dict())
    torch.save({"state_dict": authors, "optimizer": {"backbone_s": {}}}, tmp_path / "authors.pth")
    command = ["weights", "import", str(tmp_path / "authors.pth"), "--method", "dasegnet", "--data", str(rgb_dataset)]
    command += ["--recipe", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / "model.safetensors")]
    assert run(command) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "model.safetensors")
    assert run(command) == 2  # it exists
    assert run(["eval", "--model", str(tmp_path / "model.safetensors"), "--json"]) == 0
    (tmp_path / "authors.pth").write_bytes(b"not a checkpoint")
    capsys.readouterr()
    assert run([*command, "--overwrite"]) == 5
    assert "not a readable checkpoint" in " ".join(capsys.readouterr().err.split())


def test_checkpoint_with_other_classes_is_refused(tmp_path: Path) -> None:
    recipe, task = make_recipe(backbone=MIT), rgb_task()
    authors = authors_checkpoint(build_segmenter(recipe, task).state_dict())
    authors["decode_head_s.conv_seg.weight"] = torch.zeros(6, 8, 1, 1)
    torch.save(authors, tmp_path / "authors.pth")
    with pytest.raises(WeightsError, match="has 6 classes, tiny has 3"):
        import_checkpoint(tmp_path / "authors.pth", recipe, task, output=tmp_path / "m.safetensors")


def test_foreign_tensor_is_named() -> None:
    with pytest.raises(WeightsError, match=r"'unet\.conv\.weight' is not a tensor of ST-DASegNet"):
        rename_tensors({"unet.conv.weight": torch.zeros(1)})


def test_checkpoint_without_a_part_names_the_first_missing_tensor(tmp_path: Path) -> None:
    recipe, task = make_recipe(backbone=MIT), rgb_task()
    authors = authors_checkpoint(build_segmenter(recipe, task).state_dict())
    kept = {name: tensor for name, tensor in authors.items() if not name.startswith("dsk_neck")}
    torch.save(kept, tmp_path / "authors.pth")
    with pytest.raises(WeightsError, match=r"neck\.levels\.0"):
        import_checkpoint(tmp_path / "authors.pth", recipe, task, output=tmp_path / "m.safetensors")
