"""ST-DASegNet's pseudo-labels, losses, sizes and the errors of its recipes."""

from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

from rsseg.errors import DataError, RecipeError
from rsseg.layers.decoders import SeparableASPPHead
from rsseg.layers.losses import cross_entropy
from rsseg.methods.dasegnet.adversarial import PatchDiscriminator, smallest_map
from rsseg.methods.dasegnet.method import check_class_weights, check_crops
from rsseg.methods.dasegnet.network import DisentangledNeck, UniversalExtraction
from rsseg.methods.dasegnet.recipe import DASegNetRecipe, NeckConfig, SelfTrainingConfig
from rsseg.methods.dasegnet.self_training import class_weight_table, pseudo_labels
from rsseg.recipe import RecipeSource as Source
from rsseg.recipe import load_recipe, packaged_recipes, parse_recipe
from rsseg.task import IGNORE_INDEX
from tests.conftest import rgb_task
from tests.unit.dasegnet_models import make_method, make_recipe

PUBLISHED = [
    load_recipe(name)
    for name in packaged_recipes()
    if name.startswith("dasegnet-") and not name.startswith("dasegnet-recommended")
]


def logits_of(*probabilities: float) -> torch.Tensor:
    """Two-class logits (1, 2, 1, n); class 0 has the given probabilities."""
    p = torch.tensor(probabilities)
    return torch.stack([p, 1 - p]).log()[None, :, None]


def test_weights_follow_the_confident_share_and_the_class() -> None:
    config = SelfTrainingConfig(confidence=0.9, rare_confidence=0.7, class_weights=(1.01, 2.01))
    result = pseudo_labels(logits_of(0.95, 0.8, 0.6, 0.05), (1, 4), None, config)
    assert result.labels.tolist() == [[[0, 0, 0, 1]]]
    assert float(result.ratio) == 0.5
    torch.testing.assert_close(result.weights, 0.5 * torch.tensor([[[1.01, 1.01, 0.5, 2.01]]]))


@pytest.mark.parametrize(("rule", "weight"), [("in_place", 0.5), ("table", 0.0)])
def test_class_of_weight_zero_is_taken_for_unsure_only_as_published(rule: str, weight: float) -> None:
    values = {"confidence": 0.9, "rare_confidence": 0.7, "class_weights": [0.0, 2.0], "class_weight_rule": rule}
    config = SelfTrainingConfig.model_validate(values)
    assert pseudo_labels(logits_of(0.95, 0.95), (1, 2), None, config).weights.tolist() == [[[weight, weight]]]


def test_mean_energies_do_not_depend_on_the_size_of_the_map() -> None:
    torch.manual_seed(0)
    maps = torch.randn(2, 1, 16, 6, 6)
    for energies, same in (("sum", False), ("mean", True)):
        dum = UniversalExtraction(16, NeckConfig(energies=energies))  # type: ignore[arg-type]
        for conv in (dum.common, dum.reduce_source, dum.reduce_target):
            conv.weight.data[..., [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0.0  # each pixel by itself
        small, large = dum(*maps), dum(*(torch.cat([m, m], -1) for m in maps))
        assert torch.allclose(small[0], large[0][..., :6], atol=1e-5) == same


def test_without_a_confident_pixel_nothing_is_learned() -> None:
    config = SelfTrainingConfig(confidence=0.99, class_weights=(1.0, 1.0))
    result = pseudo_labels(logits_of(0.9, 0.2), (1, 2), None, config)
    assert result.weights.eq(0).all()
    loss = cross_entropy(logits_of(0.5, 0.5), result.labels, pixel_weights=result.weights, divisor="all")
    assert float(loss) == 0.0


def test_pixels_without_data_are_neither_labeled_nor_counted() -> None:
    valid = torch.tensor([[[True, False, True]]])
    result = pseudo_labels(logits_of(0.99, 0.99, 0.6), (1, 3), valid, SelfTrainingConfig(confidence=0.9))
    assert result.labels.tolist() == [[[0, IGNORE_INDEX, 0]]]
    assert float(result.ratio) == 0.5
    assert float(result.weights[0, 0, 1]) == 0.0


@pytest.mark.parametrize(
    ("weights", "in_place", "expected"),
    [
        ((1.0, 1.5, 1.5), False, [1.0, 1.5, 1.5]),
        ((1.0, 1.5, 1.5), True, [1.5, 1.5, 1.5]),
        ((1.01, 1.51, 1.51), True, [1.01, 1.51, 1.51]),
        ((2.0, 3.0, 1.0, 5.0, 0.5, 1.0), True, [1.0, 1.0, 1.0, 1.0, 0.5, 1.0]),
    ],
)
def test_in_place_replacement_hits_weights_that_equal_a_later_class(
    weights: tuple[float, ...], in_place: bool, expected: list[float]
) -> None:
    assert class_weight_table(weights, len(weights), in_place=in_place) == expected


def test_class_without_a_weight_is_weighted_by_its_index() -> None:
    assert class_weight_table((1.01, 1.51, 1.51), 4, in_place=True)[3] == 3.0


def test_cross_entropy_divides_by_all_pixels_or_by_labeled_ones() -> None:
    logits = torch.zeros(1, 2, 1, 4)
    target = torch.tensor([[[0, 1, IGNORE_INDEX, IGNORE_INDEX]]])
    weights = torch.tensor([2.0, 1.0])
    one = torch.log(torch.tensor(2.0))
    torch.testing.assert_close(cross_entropy(logits, target, class_weights=weights, divisor="all"), 3 * one / 4)
    valid = cross_entropy(logits, target, class_weights=weights, divisor="valid")
    torch.testing.assert_close(valid, 3 * one / 2)
    ignored = torch.full_like(target, IGNORE_INDEX)
    assert float(cross_entropy(logits, ignored, divisor="valid")) == 0.0


@pytest.mark.parametrize(("convs", "side"), [(2, 12), (3, 24)])
def test_smallest_map_is_the_published_one(convs: int, side: int) -> None:
    disc = PatchDiscriminator(2, base_channels=2, convs=convs)
    assert smallest_map(disc.strides) == side
    disc(torch.randn(1, 2, side, side))
    with pytest.raises(RecipeError, match=f"needs {side} x {side} or more"):
        disc(torch.randn(1, 2, side - 1, side - 1))


def test_published_sizes_of_modules() -> None:
    def millions(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        assert millions(PatchDiscriminator(512, convs=2)) == 1_184_193
        assert millions(PatchDiscriminator(2048, convs=3)) == 4_858_817
        neck = DisentangledNeck((64, 128, 320, 512), NeckConfig())
        assert millions(neck) == 3_096_320
        assert neck.out_channels == (64, 128, 320, 576)
        wide = DisentangledNeck((256, 512, 1024, 2048), NeckConfig())
        assert millions(wide) == 49_285_600
        assert millions(SeparableASPPHead(wide.out_channels, 6)) == 18_355_062


def test_too_small_crop_is_refused_before_training_and_the_smallest_is_named() -> None:
    recipe = make_recipe(data={"path": "unset", "augment": {"crop_size": 352}})
    with pytest.raises(RecipeError, match="smallest legal crop_size is 384"):
        check_crops(recipe, stride=32, strides=(2, 2, 1, 1))
    with pytest.raises(RecipeError, match="smallest legal crop_size is 48"):
        make_method(data={"path": "unset", "augment": {"crop_size": 40}})


@pytest.mark.parametrize("key", ["source_decoder_weights", "target_decoder_weights"])
def test_class_weights_of_the_wrong_length_are_refused(key: str) -> None:
    with pytest.raises(RecipeError, match=f"{key} has 2 entries, tiny has 3 classes: .*road"):
        make_method(**{key: [1.0, 2.0]})


def test_missing_pseudo_label_weights_are_refused_unless_their_index_is_wanted() -> None:
    short: dict[str, Any] = {"class_weights": [1.01, 1.51]}
    with pytest.raises(RecipeError, match=r"self_training\.class_weights has 2 entries"):
        make_method(self_training=short)
    make_method(self_training=short | {"missing_class_weights": "class_index"})
    with pytest.raises(RecipeError, match="has 4 entries"):
        make_method(self_training={"class_weights": [1.0] * 4, "missing_class_weights": "class_index"})


def test_deeplab_with_one_image_is_refused() -> None:
    decoder = {"type": "deeplabv3plus", "channels": 8}
    with pytest.raises(RecipeError, match="needs 2 or more images"):
        make_method(decoder=decoder, trainer={"batch_size": 2, "stream_batch_sizes": {"target": 1}})


def test_class_mix_needs_crops_of_one_size() -> None:
    target = {"augment": {"crop_size": 96}}
    data = {"path": "unset", "augment": {"crop_size": 64}, "streams": {"target": target}}
    with pytest.raises(RecipeError, match="same crop_size"):
        make_method(data=data, self_training={"class_mix": True})


def test_teacher_in_eval_mode_needs_averaged_statistics() -> None:
    with pytest.raises(ValidationError, match="needs buffers 'average'"):
        make_recipe(self_training={"teacher": {"mode": "eval"}})


def test_discriminators_need_their_optimizers() -> None:
    with pytest.raises(ValidationError, match=r"needs \['disc_source', 'disc_target', 'main'\]"):
        make_recipe(optimizers={"main": {}})


def test_ablation_by_one_override_drops_the_idle_optimizers() -> None:
    text = yaml.safe_dump(make_recipe().model_dump(mode="json"))
    recipe = parse_recipe(Source("r.yaml", text), ["adversarial=null"])
    assert list(recipe.optimizers) == ["main"]


def test_no_target_images_is_an_error_that_lists_the_splits(rgb_dataset: Any) -> None:
    from rsseg.data.streams import training_batches

    data = {"path": rgb_dataset, "augment": {"crop_size": 64}, "streams": {"target": {"split": "unlabeled"}}}
    method = make_method(data=data)
    with pytest.raises(DataError, match="the split 'unlabeled' is empty"):
        training_batches(method.recipe, method.streams, rgb_task(), device="cpu", start_step=0)


def test_classes_that_do_not_match_between_domains_are_listed(rgb_dataset: Any, color_mask_dataset: Any) -> None:
    from rsseg.data.index import SegmentationIndex
    from rsseg.data.streams import training_batches

    index = SegmentationIndex.load(color_mask_dataset)
    renamed = index.task.classes[0].model_copy(update={"name": "meadow"})
    task = index.task.model_copy(update={"classes": (renamed, *index.task.classes[1:])})
    index.model_copy(update={"task": task}).save(color_mask_dataset)
    data = {"path": rgb_dataset, "augment": {"crop_size": 64}, "streams": {"target": {"path": color_mask_dataset}}}
    method = make_method(data=data)
    with pytest.raises(DataError, match=r"expected field.*lacks field.*also has meadow"):
        training_batches(method.recipe, method.streams, rgb_task(), device="cpu", start_step=0)


@pytest.mark.parametrize("recipe", PUBLISHED, ids=lambda recipe: recipe.name)
def test_published_recipes_have_legal_crops_and_one_weight_per_class(recipe: DASegNetRecipe) -> None:
    assert recipe.adversarial is not None
    strides = (*[2] * recipe.adversarial.convs, 1, 1)
    check_crops(recipe, stride=8 if recipe.backbone.name.startswith("resnet") else 32, strides=strides)
    if recipe.source_decoder_weights is None:
        return
    classes = rgb_task().classes * 3
    count = len(recipe.source_decoder_weights)
    named = tuple(c.model_copy(update={"name": f"{i}", "value": i}) for i, c in enumerate(classes[:count]))
    check_class_weights(recipe, rgb_task().model_copy(update={"classes": named}))
