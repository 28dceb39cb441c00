"""What a Backbone does with images, options and weights."""

import copy
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from rsseg.backbones.backbone import Backbone, create_backbone
from rsseg.backbones.loading import Source, load_pretrained
from rsseg.backbones.timm_adapter import Architecture, build_pyramid, build_vit
from rsseg.backbones.zoo import ZOO
from rsseg.config import BackboneConfig
from rsseg.errors import DataError, RecipeError, WeightsError
from rsseg.layers.ema import Frozen
from tests.golden.harness import GOLDENS
from tests.unit.backbone_tasks import task_of

RGB = task_of("red", "green", "blue")
REAL_WEIGHTS = GOLDENS.parent / "weights"


def untrained(name: str, **options: object) -> Backbone:
    torch.manual_seed(0)
    config = BackboneConfig.model_validate({"name": name, "weights": "random"} | options)
    return create_backbone(config, RGB).eval()


def save_complete_network(path: Path, name: str, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """A file as the hub has it: timm's names, head included."""
    torch.manual_seed(1)
    tensors = timm.create_model(ZOO[name].timm_name, num_classes=1000, **ZOO[name].arguments).state_dict()
    tensors = {key: torch.rand_like(value) for key, value in tensors.items()} | changes
    save_file(tensors, path)
    return tensors


@pytest.fixture
def real_weights() -> Path:
    if not REAL_WEIGHTS.is_dir():
        pytest.skip(f"no weights in {REAL_WEIGHTS}")
    return REAL_WEIGHTS


def test_images_in_scaled_units_are_normalized_by_the_backbones_own_statistics() -> None:
    backbone = untrained("convnext_mini")
    pixels = torch.tensor([124.0, 116.0, 104.0]) / 255
    flat = pixels.reshape(1, 3, 1, 1).expand(1, 3, 32, 32)
    assert backbone.normalize(flat).abs().max() < 0.02
    torch.testing.assert_close(backbone(flat), backbone.forward_normalized(backbone.normalize(flat)))


def test_statistics_are_not_stored_with_the_weights() -> None:
    assert not {"mean", "std"} & set(untrained("convnext_mini").state_dict())


def test_statistics_of_the_data_are_taken_if_the_recipe_says_so() -> None:
    task = task_of("nir", "red", mean=(0.4, 0.1), std=(0.2, 0.05))
    config = BackboneConfig(name="convnext_mini", weights="random", statistics="data")
    info = create_backbone(config, task).info
    assert (info.mean, info.std) == ((0.4, 0.1), (0.2, 0.05))


def test_statistics_of_the_data_must_have_been_measured() -> None:
    with pytest.raises(DataError, match="rsseg dataset stats"):
        create_backbone(BackboneConfig(name="convnext_mini", weights="random", statistics="data"), RGB)


def test_vit_pads_right_and_bottom_with_zeros_after_normalization() -> None:
    backbone = untrained("vit_mini_patch8")
    image = torch.rand(1, 3, 20, 30)
    padded = torch.zeros(1, 3, 24, 32)
    padded[..., :20, :30] = backbone.normalize(image)
    torch.testing.assert_close(backbone(image), backbone.forward_normalized(padded), rtol=0, atol=0)


def test_vit_refuses_other_sizes_if_told_to() -> None:
    with pytest.raises(RecipeError, match=r"20 x 30 .* patch of 8"):
        untrained("vit_mini_patch8", pad="error")(torch.rand(1, 3, 20, 30))


@pytest.mark.parametrize("name", ["convnext_mini", "vit_mini_patch8"])
def test_maps_come_in_the_order_of_out_indices(name: str) -> None:
    image = torch.rand(1, 3, 64, 64)
    ordered = untrained(name)(image)
    backbone = untrained(name, out_indices=[3, 1])
    swapped = backbone(image)
    torch.testing.assert_close(swapped, (ordered[3], ordered[1]), rtol=0, atol=0)
    assert backbone.info.channels == tuple(tap.shape[1] for tap in swapped)
    assert backbone.info.strides == tuple(64 // tap.shape[2] for tap in swapped)


@pytest.mark.parametrize("name", ["convnext_mini", "vit_mini_patch8"])
def test_stages_above_the_highest_tap_are_left_out(name: str) -> None:
    names = " ".join(untrained(name, out_indices=[0, 1]).state_dict())
    assert "blocks.1" in names or "stages.1" in names
    assert "network.blocks.2" not in names
    assert "network.stages.2" not in names


@pytest.mark.parametrize("out_indices", [[4], [0, 0], []])
def test_out_indices_that_do_not_exist_or_repeat_are_refused(out_indices: list[int]) -> None:
    with pytest.raises(RecipeError, match="0 to 3"):
        untrained("convnext_mini", out_indices=out_indices)


def test_out_norm_chooses_which_vit_maps_pass_the_final_norm() -> None:
    image = torch.rand(1, 3, 32, 32)
    plain = untrained("vit_mini_patch8", out_norm="none")
    raw = plain(image)
    last, every = untrained("vit_mini_patch8", out_norm="last")(image), untrained("vit_mini_patch8")(image)
    assert "body.network.norm.weight" not in plain.state_dict()
    torch.testing.assert_close(last[:3], raw[:3], rtol=0, atol=0)
    normed = torch.nn.functional.layer_norm(raw[3].permute(0, 2, 3, 1), (64,), eps=1e-6).permute(0, 3, 1, 2)
    torch.testing.assert_close(last[3], normed)
    torch.testing.assert_close(every[3], normed)
    assert not torch.allclose(every[0], raw[0])


def test_a_pyramids_norms_act_on_the_returned_copy_only() -> None:
    image = torch.rand(1, 3, 64, 64)
    raw = untrained("convnext_mini", out_norm="none")(image)
    normed = untrained("convnext_mini")(image)
    for plain, tap in zip(raw, normed, strict=True):
        shape = (plain.shape[1],)
        expected = torch.nn.functional.layer_norm(plain.permute(0, 2, 3, 1), shape, eps=1e-6).permute(0, 3, 1, 2)
        torch.testing.assert_close(tap, expected)


def test_network_without_final_norm_refuses_out_norm() -> None:
    with torch.device("meta"), pytest.raises(RecipeError, match="no final norm"):
        untrained("samvit_base_patch16", out_norm="last")


@pytest.mark.parametrize("options", [{"pos_embed": "dinov2"}, {"image_size": 64}, {"pos_embed_round_trip": True}])
@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "convnext_mini"])
def test_network_without_position_table_refuses_its_options(name: str, options: dict[str, object]) -> None:
    with torch.device("meta"), pytest.raises(RecipeError, match="no position table"):
        untrained(name, **({"image_size": 64} | options))


def test_frozen_stages_take_the_stem_along_but_not_the_norms() -> None:
    backbone = untrained("convnext_mini", frozen_stages=2).train()
    frozen = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    parts = {".".join(name.split(".")[2:4]).removesuffix(".weight").removesuffix(".bias") for name in frozen}
    assert parts == {"stem.0", "stem.1", "stages.0", "stages.1"}


def test_frozen_batch_norm_keeps_its_statistics_in_train_mode() -> None:
    backbone = untrained("resnet18", frozen_stages=1).train()
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    backbone(torch.rand(2, 3, 64, 64))
    changed = {name for name, buffer in backbone.named_buffers() if not torch.equal(buffer, before[name])}
    assert changed
    assert all(
        name.startswith(("body.network.layer2", "body.network.layer3", "body.network.layer4")) for name in changed
    )


def test_frozen_blocks_take_embeddings_along_and_the_final_norm_with_the_last() -> None:
    def trainable(stages: int) -> set[str]:
        backbone = untrained("vit_mini_patch8", frozen_stages=stages)
        return {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}

    assert all(name.startswith(("body.network.blocks.3", "body.network.norm")) for name in trainable(3))
    assert "body.network.norm.weight" in trainable(3)
    assert trainable(4) == set()


def test_drop_path_acts_in_training_only() -> None:
    backbone = untrained("convnext_mini", drop_path=0.9)
    image = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(backbone(image), backbone(image), rtol=0, atol=0)
    backbone.train()
    assert not torch.equal(backbone(image)[3], backbone(image)[3])


def test_half_precision_network_returns_float32_close_to_the_full_one() -> None:
    image = torch.rand(1, 3, 32, 32)
    full, half = untrained("vit_mini_patch8"), untrained("vit_mini_patch8", dtype="bfloat16")
    assert next(half.parameters()).dtype == torch.bfloat16
    maps = half(image)
    assert all(m.dtype == torch.float32 for m in maps)
    torch.testing.assert_close(maps[3], full(image)[3], rtol=0.1, atol=0.1)


def test_copies_are_independent_and_a_frozen_one_has_no_graph() -> None:
    backbone = untrained("convnext_mini", frozen_stages=1)
    twin = copy.deepcopy(backbone)
    torch.nn.init.zeros_(twin.body.network.stem[0].weight)
    image = torch.rand(1, 3, 32, 32)
    assert not torch.equal(twin(image)[0], backbone(image)[0])
    assert all(not tap.requires_grad for tap in Frozen(backbone)(image))


def test_vit_equals_timms_own_forward_at_another_size() -> None:
    torch.manual_seed(0)
    arguments = {"img_size": 56, "embed_dim": 32, "depth": 3, "num_heads": 2}
    name = "vit_small_patch14_reg4_dinov2"
    body = build_vit(Architecture(name, arguments=arguments), out_indices=(0, 2), out_norm="all").body.eval()
    network = timm.create_model(name, dynamic_img_size=True, num_classes=0, **arguments).eval()
    network.load_state_dict(body.network.state_dict())
    image = torch.rand(2, 3, 42, 70)
    expected = network.forward_intermediates(image, indices=[0, 2], norm=True, intermediates_only=True)
    for tap, map_of_timm in zip(body(image), expected, strict=True):
        torch.testing.assert_close(tap, map_of_timm)


def test_attention_never_builds_the_token_by_token_matrix() -> None:
    for name in ("vit_mini_patch8", "vit_small_patch16_dinov3", "samvit_base_patch16", "mit_b0"):
        with torch.device("meta"):
            backbone = create_backbone(BackboneConfig(name=name), RGB, load_weights=False)
        kinds = [module.fused_attn for module in backbone.modules() if type(module).__name__.endswith("Attention")]
        assert kinds
        assert all(kinds)


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError, match="convnext_base"):
        create_backbone(BackboneConfig(name="convnext_bse"), RGB)


def test_complete_network_of_timm_loads_and_its_last_norm_starts_the_last_levels(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    tensors = save_complete_network(file, "convnext_mini")
    backbone = create_backbone(BackboneConfig(name="convnext_mini", weights=str(file)), RGB)
    state = backbone.state_dict()
    torch.testing.assert_close(state["body.network.stem.0.weight"], tensors["stem.0.weight"])
    torch.testing.assert_close(state["body.norms.3.weight"], tensors["head.norm.weight"])
    assert state["body.norms.0.weight"].eq(1).all()
    assert backbone.weights is not None
    assert len(backbone.weights.sha256) == 64


def test_first_convolution_is_adapted_to_the_bands_by_name(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    kernel = save_complete_network(file, "convnext_mini")["stem.0.weight"]
    task = task_of("blue", "NIR", "Green", "red")
    adapted = create_backbone(BackboneConfig(name="convnext_mini", weights=str(file)), task).state_dict()
    expected = torch.stack([kernel[:, 2], kernel.mean(dim=1), kernel[:, 1], kernel[:, 0]], dim=1) * 3 / 4
    torch.testing.assert_close(adapted["body.network.stem.0.weight"], expected)


def test_permuted_colors_give_the_same_features(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_complete_network(file, "convnext_mini")
    config = BackboneConfig(name="convnext_mini", weights=str(file))
    image = torch.rand(1, 3, 32, 32)
    straight = create_backbone(config, RGB).eval()(image)
    reverse = create_backbone(config, task_of("blue", "green", "red")).eval()(image.flip(1))
    torch.testing.assert_close(straight, reverse, rtol=1e-4, atol=1e-4)


def test_half_precision_file_becomes_float32(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_complete_network(file, "vit_mini_patch8")
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    backbone = create_backbone(BackboneConfig(name="vit_mini_patch8", weights=str(file)), RGB)
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}


def test_position_table_is_relaid_at_load_only_for_the_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    stored = save_complete_network(file, "vit_mini_patch8")["pos_embed"]
    options = {"name": "vit_mini_patch8", "weights": str(file), "image_size": 28, "pos_embed": "bicubic"}
    kept = create_backbone(BackboneConfig.model_validate(options), RGB)
    torch.testing.assert_close(kept.state_dict()["body.network.pos_embed"], stored)
    relaid = create_backbone(BackboneConfig.model_validate(options | {"pos_embed_round_trip": True}), RGB)
    assert relaid.state_dict()["body.network.pos_embed"].shape == (1, 1 + 4 * 4, 64)
    image = torch.rand(1, 3, 28, 28)
    torch.testing.assert_close(kept.eval()(image), relaid.eval()(image), rtol=1e-4, atol=1e-4)
    large = torch.rand(1, 3, 64, 64)
    assert not torch.allclose(kept(large)[0], relaid(large)[0], atol=1e-3)


def test_weights_that_do_not_fit_name_the_first_missing_and_unexpected_tensor(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    tensors = save_complete_network(file, "convnext_mini", alien=torch.zeros(1))
    del tensors["stem.0.bias"]
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=r"no 'stem\.0\.bias' and an unknown 'alien' \(1 missing, 1 unexpected\)"):
        create_backbone(BackboneConfig(name="convnext_mini", weights=str(file)), RGB)


def test_weights_of_another_width_name_both_shapes(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_complete_network(file, "convnext_mini", **{"stem.1.weight": torch.zeros(7)})
    with pytest.raises(WeightsError, match=r"'stem\.1\.weight' has the shape \(7,\).* needs \(16,\)"):
        create_backbone(BackboneConfig(name="convnext_mini", weights=str(file)), RGB)


def test_damaged_file_is_a_weights_error(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"not a tensor file")
    with pytest.raises(WeightsError, match="cannot be read"):
        create_backbone(BackboneConfig(name="convnext_mini", weights=str(file)), RGB)


def test_swin_file_in_its_authors_names_loads_like_timms(tmp_path: Path) -> None:
    tiny = {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 1, 2, 2), "strict_img_size": False}
    architecture = Architecture("swin_tiny_patch4_window7_224", arguments=tiny)
    torch.manual_seed(0)
    tensors = timm.create_model(architecture.name, num_classes=1000, **tiny).state_dict()
    authors = {
        re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name): tensor
        for name, tensor in tensors.items()
    }
    authors |= {f"head.{leaf}": authors.pop(f"head.fc.{leaf}") for leaf in ("weight", "bias")}
    save_file(authors, tmp_path / "w.safetensors")
    built = build_pyramid(architecture, levels=(0, 3), out_norm="all")
    source = Source(tmp_path / "w.safetensors", architecture, first_conv=built.first_conv, final_norm="norm")
    load_pretrained(built.body, source, RGB.bands)
    state = built.body.network.state_dict()
    assert all(torch.equal(state[name], tensors[name]) for name in state)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "vit_small_patch14_dinov2"])
def test_real_weights_load_and_give_finite_maps(name: str, real_weights: Path) -> None:
    config = BackboneConfig(name=name, weights=str(real_weights / f"{name}.safetensors"))
    backbone = create_backbone(config, RGB).eval()
    with torch.no_grad():
        maps = backbone(torch.rand(1, 3, 64, 64))
    assert all(torch.isfinite(tap).all() and tap.std() > 0.05 for tap in maps)
