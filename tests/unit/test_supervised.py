"""Plain supervised training: every decoder on every kind of backbone, frozen and adapted backbones, rates."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from rsseg.backbones.backbone import create_backbone
from rsseg.cli import run
from rsseg.config import BackboneConfig
from rsseg.data.streams import Batch, Samples
from rsseg.errors import RecipeError
from rsseg.methods.plain_recipe import DecoderConfig
from rsseg.methods.registry import import_checkpoint
from rsseg.methods.supervised.method import SupervisedMethod, build_method, build_segmenter
from rsseg.methods.supervised.recipe import SupervisedRecipe
from tests.conftest import rgb_task

TASK = rgb_task()
PYRAMID = {"name": "convnext_mini", "weights": "random"}
VIT = {"name": "vit_mini_patch8", "weights": "random"}
SMALL: Mapping[str, dict[str, Any]] = {
    "segformer": {"channels": 8},
    "upernet": {"channels": 8},
    "dpt": {"channels": 8, "widths": [4, 4, 8, 8]},
    "deeplabv3plus": {"channels": 8, "dilations": [1, 2]},
    "linear": {},
}


def recipe_of(backbone: dict[str, Any] = VIT, decoder: str = "segformer", **changes: Any) -> SupervisedRecipe:
    values = {
        "method": "supervised",
        "name": "tiny",
        "data": {"path": "unused", "augment": {"crop_size": 32}},
        "backbone": backbone,
        "decoder": {"type": decoder, **SMALL[decoder]},
        "trainer": {"batch_size": 2},
    }
    return SupervisedRecipe.model_validate(values | changes)


def method_of(*args: Any, **changes: Any) -> SupervisedMethod:
    torch.manual_seed(0)
    return build_method(recipe_of(*args, **changes), TASK)


def batch_of(side: int = 32) -> Batch:
    draw = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, side, side, generator=draw)
    masks = torch.randint(0, 3, (2, side, side), generator=draw)
    return {"labeled": Samples(images, torch.ones_like(masks, dtype=torch.bool), masks)}


def train(method: SupervisedMethod, steps: int = 3, lr: float = 0.1) -> None:
    method.train()
    optimizer = torch.optim.SGD([p for group in method.param_groups()["main"] for p in group.params], lr)
    for step in range(steps):
        optimizer.zero_grad()
        method(batch_of(), step).losses["seg"].backward()
        optimizer.step()


@pytest.mark.parametrize("decoder", SMALL)
@pytest.mark.parametrize("backbone", [PYRAMID, VIT], ids=["pyramid", "vit"])
def test_every_decoder_takes_every_kind_of_backbone(backbone: dict[str, Any], decoder: str) -> None:
    method = method_of(backbone, decoder)
    method.training_step(batch_of(), 0).losses["seg"].backward()
    assert [name for name, p in method.named_parameters() if p.grad is None] == []
    logits = method.deployable().eval().predict_logits(torch.rand(1, 3, 40, 56))
    assert logits.shape == (1, 3, 40, 56)


def test_decoder_that_does_not_fit_names_both_sides() -> None:
    with pytest.raises(RecipeError, match=r"'dpt' does not fit resnet50_v1c_d8.*\(4, 8, 8, 8\)"):
        build_segmenter(recipe_of({"name": "resnet50_v1c_d8", "weights": "random"}, "dpt"), TASK)
    with pytest.raises(RecipeError, match=r"'upernet' does not fit vit_mini_patch8.*2 maps"):
        build_segmenter(recipe_of(VIT | {"out_indices": [1, 3]}, "upernet"), TASK)


def test_one_image_per_batch_is_refused_where_a_norm_would_see_one_value() -> None:
    with pytest.raises(ValueError, match=r"'upernet' needs two images"):
        recipe_of(VIT, "upernet", trainer={"batch_size": 1})


def test_linear_head_classifies_the_stack_of_normalized_maps() -> None:
    head = method_of(PYRAMID, "linear").network.decoder.eval()
    maps = [torch.rand(1, c, 16 >> i, 16 >> i) for i, c in enumerate((16, 32, 64, 96))]
    up = [
        torch.nn.functional.interpolate(n(m), (16, 16), mode="bilinear") for n, m in zip(head.norms, maps, strict=True)
    ]
    weight = torch.cat([conv.weight for conv in head.classifiers], dim=1)
    expected = torch.nn.functional.conv2d(torch.cat(up, dim=1), weight, head.classifiers[0].bias)
    torch.testing.assert_close(head(maps), expected)


def test_frozen_backbone_stays_and_is_not_in_the_state() -> None:
    method = method_of(tune="frozen")
    before = {name: tensor.clone() for name, tensor in method.deployable().backbone.state_dict().items()}
    train(method)
    after = method.deployable().state_dict()
    assert all(torch.equal(after[f"backbone.{name}"], tensor) for name, tensor in before.items())
    assert {name.split(".")[1] for name in method.state_dict()} == {"decoder"}
    assert not method.network.frozen.module.training


def test_lora_trains_few_values_and_ships_a_plain_network() -> None:
    method = method_of(tune="lora", lora={"rank": 2})
    plain = build_segmenter(recipe_of(tune="lora"), TASK)
    before = {name: tensor.clone() for name, tensor in method.deployable().state_dict().items()}
    train(method)
    shipped = method.deployable()
    assert shipped.state_dict().keys() == plain.state_dict().keys()
    assert not any("backbone" in name for name in method.state_dict())
    changed = {name for name, tensor in shipped.state_dict().items() if not torch.equal(tensor, before[name])}
    of_backbone = {name for name in changed if name.startswith("backbone.")}
    assert {name.split(".")[-2] for name in of_backbone} == {"qkv", "proj", "fc1", "fc2"}
    assert {name.split(".")[-1] for name in of_backbone} == {"weight"}


def test_merged_weights_compute_what_training_computed() -> None:
    method = method_of(tune="lora", lora={"rank": 2, "targets": ["qkv", "fc2"]})
    train(method)
    batch = batch_of()
    method.eval()
    trained = method(batch, 0).losses["seg"]
    merged = torch.nn.functional.cross_entropy(
        method.deployable().eval()(batch["labeled"].images), batch["labeled"].masks
    )
    torch.testing.assert_close(trained, merged)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_checkpointing_gives_the_same_gradients_and_keeps_fewer_activations(tune: str) -> None:
    kept: list[int] = []
    gradients: list[dict[str, torch.Tensor]] = []
    for checkpoint in (False, True):
        method = method_of(VIT | {"checkpoint": checkpoint, "drop_path": 0.2}, tune=tune, lora={"rank": 2}).train()
        with torch.no_grad():
            for name, parameter in method.named_parameters():
                if name.endswith(".up"):
                    parameter.fill_(0.1)
        kept.append(0)

        def count(tensor: torch.Tensor) -> torch.Tensor:
            kept[-1] += tensor.numel()
            return tensor

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = method(batch_of(), 0).losses["seg"]
        loss.backward()
        gradients.append({name: p.grad for name, p in method.named_parameters() if p.grad is not None})
    assert kept[1] < kept[0]
    assert gradients[0].keys() == gradients[1].keys()
    torch.testing.assert_close(gradients[1], gradients[0])


def test_average_of_a_checkpointed_network_has_adapters_of_its_own() -> None:
    network = method_of(VIT | {"checkpoint": True}, tune="lora").network
    average = copy.deepcopy(network)
    again = average.frozen.module.body.again_in
    assert again.func.__self__ is average.adapters
    assert again.args[0] is average.frozen.module


def test_checkpointing_a_convolutional_backbone_is_refused() -> None:
    with pytest.raises(RecipeError, match="not for convnext_mini"):
        method_of(PYRAMID | {"checkpoint": True})


def test_merged_copy_moves_with_its_method() -> None:
    method = method_of(tune="lora").to(torch.float64)
    assert {p.dtype for p in method.deployable().parameters()} == {torch.float64}


def test_lora_on_a_convolutional_backbone_is_an_error_of_the_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rgb_dataset: Path
) -> None:
    recipe = recipe_of(PYRAMID, tune="lora", data={"path": str(rgb_dataset), "augment": {"crop_size": 32}})
    file = tmp_path / "r.yaml"
    file.write_text(recipe.model_dump_json())
    assert run(["train", "--recipe", str(file), "--dry-run"]) == 3
    assert "convnext_mini is a pyramid" in " ".join(capsys.readouterr().err.split())


def test_unknown_linear_layer_names_those_there_are() -> None:
    with pytest.raises(RecipeError, match=r"lora\.targets: vit_mini_patch8: no linear layer is called 'q'.*'qkv'"):
        method_of(tune="lora", lora={"targets": ["q"]})


def test_rates_fall_towards_the_input_and_the_head_has_its_own() -> None:
    method = method_of(layer_decay=0.5, head_lr_scale=10.0)
    rate = {id(p): group.lr_scale for group in method.param_groups()["main"] for p in group.params}
    network = method.network.backbone.body.network
    assert rate[id(network.pos_embed)] == 0.5**4
    assert [rate[id(block.attn.qkv.weight)] for block in network.blocks] == [0.125, 0.25, 0.5, 1.0]
    assert rate[id(network.norm.weight)] == 1.0
    assert {rate[id(p)] for p in method.network.decoder.parameters()} == {10.0}


SEVERAL_KINDS = """
convnext_mini mobilenetv3_small_100 pvt_v2_b0 swin_tiny_patch4_window7_224 tiny_vit_5m_224 resnet18
tf_efficientnet_lite0 vit_mini_patch8 vit_small_patch16_dinov3 samvit_base_patch16
"""


@pytest.mark.parametrize("name", SEVERAL_KINDS.split())
def test_every_parameter_of_a_backbone_has_one_depth(name: str) -> None:
    with torch.device("meta"):
        backbone = create_backbone(BackboneConfig(name=name, weights="random"), TASK, load_weights=False)
    found = [id(p) for parameters in backbone.parameters_by_depth() for p in parameters]
    assert sorted(found) == sorted(id(p) for p in backbone.parameters())


def test_vectors_do_not_decay() -> None:
    (group,) = [g for g in method_of().param_groups()["main"] if g.weight_decay == 0.0]
    assert {p.ndim for p in group.params} == {1}


def test_rates_by_depth_need_a_backbone_that_trains() -> None:
    with pytest.raises(ValueError, match="tune is 'lora'"):
        recipe_of(tune="lora", layer_decay=0.8)


def test_there_is_nothing_to_import(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no published checkpoints"):
        import_checkpoint(tmp_path / "x.pth", recipe_of(), TASK, output=tmp_path / "y")


def test_options_of_the_decoders_reach_them() -> None:
    shown = {"type": "upernet", "channels": 8, "pool_scales": [2], "dropout": 0.5}
    upernet = build_method(
        recipe_of(PYRAMID).model_copy(update={"decoder": DecoderConfig(**shown)}), TASK
    ).network.decoder
    assert (upernet.pool_scales, upernet.classifier.dropout.p) == ((2,), 0.5)
    dpt = method_of(decoder="dpt").network.decoder
    assert [projection.out_channels for projection in dpt.project] == [4, 4, 8, 8]
