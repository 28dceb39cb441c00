"""Options that no packaged recipe sets: each changes a run."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from rsseg.config import EvalConfig
from rsseg.errors import RecipeError
from rsseg.inference.image import predict_image
from rsseg.methods.dasegnet.adversarial import gan_loss
from rsseg.methods.dasegnet.recipe import DecoderConfig, NeckConfig
from rsseg.methods.registry import method_for
from rsseg.recipe import Recipe, recipe_from_dict
from rsseg.training.progress import Progress, StepReport
from rsseg.training.run import plan, train
from rsseg.training.step import build_optimizers
from tests.conformance.cases import make_case, recipe_files
from tests.conftest import rgb_task
from tests.toys import ConvSegmenter, make_task
from tests.training.recipes import tiny_recipe
from tests.unit.dasegnet_models import BATCH_NORM, make_method


class Losses(Progress):
    def __init__(self) -> None:
        self.seen: list[float] = []
        self.deterministic: set[bool] = set()

    def on_step(self, report: StepReport) -> None:
        self.seen.append(sum(report.losses.values()))
        self.deterministic.add(torch.are_deterministic_algorithms_enabled())


@pytest.mark.parametrize("wanted", [False, True])
def test_deterministic_kernels_are_asked_for_during_a_run_only(rgb_dataset: Path, tmp_path: Path, wanted: bool) -> None:
    trainer = {"steps": 1, "log_every": 1, "monitor": "last", "deterministic": wanted}
    losses = Losses()
    train(tiny_recipe(rgb_dataset, trainer=trainer), output=tmp_path, progress=losses)
    assert losses.deterministic == {wanted}
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "demo-supervised",
            {"trainer": {"sharding": "full", "amp_dtype": "fp16"}},
            "Set trainer.amp_dtype: bf16",
        ),
        ("demo-supervised", {"trainer": {"sharding": "full"}, "tune": "frozen"}, "not for tune: frozen"),
        (
            "demo-supervised",
            {"trainer": {"sharding": "full", "batch_size": "auto"}},
            "Give a number with trainer.sharding: full",
        ),
        (
            "dasegnet-single",
            {"trainer": {"sharding": "full"}, "single": {"tune": "frozen"}},
            "not for single.tune: frozen",
        ),
    ],
)
def test_sharding_names_what_it_cannot_be_combined_with(
    tmp_path: Path, name: str, values: dict[str, Any], message: str
) -> None:
    case = make_case({path.stem: path for path in recipe_files()}[name], tmp_path)
    given = case.recipe.model_dump(mode="json", exclude_unset=True)
    trainer = given["trainer"] | values.pop("trainer")
    with pytest.raises(RecipeError, match=message):
        plan(recipe_from_dict(given | values | {"trainer": trainer}, "test"))


def test_eps_betas_and_momentum_reach_the_optimizer(rgb_dataset: Path) -> None:
    def built(**values: object) -> torch.optim.Optimizer:
        recipe: Recipe = tiny_recipe(rgb_dataset, optimizers={"main": values})
        return build_optimizers(method_for(recipe, rgb_task()), recipe.optimizers)["main"]

    assert built(eps=1e-3, betas=[0.5, 0.6]).param_groups[0].items() >= {"eps": 1e-3, "betas": (0.5, 0.6)}.items()
    assert built(name="sgd", momentum=0.3).param_groups[0]["momentum"] == 0.3


def test_auxiliary_heads_follow_their_configuration(rgb_dataset: Path) -> None:
    aux = [
        {"level": 1, "channels": 8},
        {"level": 1, "channels": 8, "num_convs": 2, "concat_input": True, "dropout": 0.5},
    ]
    plain, rich = method_for(tiny_recipe(rgb_dataset, aux=aux), rgb_task()).aux_heads  # type: ignore[misc]
    assert (len(plain.head.convs), len(rich.head.convs)) == (1, 2)
    assert plain.head.join is None
    assert rich.head.join is not None
    assert rich.head.classifier.dropout.p == 0.5


def test_sizes_of_neck_and_deeplab_decoder_follow_the_recipe() -> None:
    neck = NeckConfig(reduction=4, min_width=30).model_dump()
    decoder = DecoderConfig(
        type="deeplabv3plus", channels=8, dilations=(1, 3), low_channels=5, dropout=0.5
    ).model_dump()
    net = make_method(backbone=BATCH_NORM, neck=neck, decoder=decoder).segmenter
    assert [level.distinct.squeeze.out_features for level in net.neck.levels.values()] == [30, 32]  # type: ignore[union-attr]
    head = net.decoder_source
    assert [
        getattr(branch, "depthwise", branch.conv if hasattr(branch, "conv") else None).dilation
        for branch in head.branches
    ] == [(1, 1), (3, 3)]  # type: ignore[union-attr]
    assert head.low.conv.out_channels == 5  # type: ignore[union-attr]
    assert head.classifier.dropout.p == 0.5  # type: ignore[union-attr]


@pytest.mark.parametrize(("loss", "expected"), [("lsgan", 4.0), ("l1", 2.0), ("vanilla", 3.0486)])
def test_each_adversarial_loss_measures_the_distance_to_its_target(loss: str, expected: float) -> None:
    value = gan_loss(torch.full((1, 1, 2, 2), 3.0), real=loss != "vanilla", loss=loss)  # type: ignore[arg-type]
    assert value.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("mode", ["tiled", "resized"])
def test_flip_averages_the_probabilities_of_image_and_mirror_image(mode: Literal["tiled", "resized"]) -> None:
    network = ConvSegmenter(make_task())
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)).numpy()
    found = predict_image(network, image, None, EvalConfig(mode=mode, tile=32, flip=True), device="cpu")
    with torch.inference_mode():
        views = [network(torch.from_numpy(image)[None]), network(torch.from_numpy(image)[None].flip(-1)).flip(-1)]
    mean = sum(view.softmax(dim=1) for view in views)
    assert (found == mean[0].argmax(0).numpy()).all()  # type: ignore[union-attr]
    assert (found != views[0][0].argmax(0).numpy()).any()
