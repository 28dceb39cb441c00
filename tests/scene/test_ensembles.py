"""Several models in one pass: the mean of their probabilities, and their disagreement."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch

from rsseg.checkpoint import Calibration, ModelHeader, write_model
from rsseg.cli import run
from rsseg.config import EvalConfig
from rsseg.errors import MachineError, UsageError
from rsseg.inference.blend import PixelOutputs
from rsseg.inference.ensemble import disagreement
from rsseg.inference.image import predict_probabilities
from rsseg.inference.network import AveragedSegmenter
from rsseg.methods.registry import segmenter_for
from rsseg.recipe import RecipeSource, parse_recipe
from rsseg.scene.memory import PreparedNetwork, join_networks, prepare_network
from rsseg.scene.plan import prepare_scene
from rsseg.scene.predict import predict_scene
from rsseg.task import Task, TileHint
from tests.conftest import write_tif
from tests.scene.helpers import RECIPE, StoppingSegmenter, options, random_pixels, read_classes
from tests.toys import ConvSegmenter, SizeSegmenter, StridedSegmenter, make_task


def conv(seed: int, temperature: float | None = None, **changes: Any) -> ConvSegmenter:
    segmenter = ConvSegmenter(make_task(), **changes)
    with torch.no_grad():
        segmenter.conv.weight.normal_(generator=torch.Generator().manual_seed(seed))
    if temperature is not None:
        segmenter.calibration = Calibration((temperature,) * segmenter.task.num_classes, f"images of {seed}")
    return segmenter


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    pixels = random_pixels(100, 130)
    pixels[:, :20, :40] = 0
    return write_tif(tmp_path / "scene.tif", pixels, nodata=0)


def layer(output: Path, name: str) -> np.ndarray:
    with rasterio.open(output.with_name(f"{output.stem}_{name}.tif")) as file:
        return file.read()


@pytest.mark.parametrize("blend", ["crop", "hann"])
@pytest.mark.parametrize("fills", [(0.5, 0.5), (0.2, 0.9)])
def test_an_ensemble_is_the_mean_of_calibrated_probabilities(
    scene: Path, tmp_path: Path, blend: str, fills: tuple[float, float]
) -> None:
    networks = [conv(1, 2.5, fill=[fills[0]] * 3), conv(2, fill=[fills[1]] * 3)]
    # One tile, so that the mean over tiles of logits does not differ from that of probabilities.
    wanted = options(probabilities="float16", confidence=True, blend=blend, tile=160)
    result = predict_scene(networks, scene, tmp_path / "both.tif", wanted)
    for number, network in enumerate(networks):
        predict_scene(network, scene, tmp_path / f"{number}.tif", wanted)
    valid = read_classes(tmp_path / "both.tif") != 255
    assert valid.sum() == 100 * 130 - 20 * 40
    own = [layer(tmp_path / f"{number}.tif", "probabilities") for number in range(2)]
    mean, found = sum(own) / 2, layer(tmp_path / "both.tif", "probabilities")
    assert np.abs(mean - found)[:, valid].max() < 0.001
    values = np.array([c.value for c in networks[0].task.classes])
    clear = valid & (np.diff(np.sort(mean, axis=0)[-2:], axis=0)[0] > 0.002)
    assert clear.mean() > 0.9
    assert (values[mean.argmax(0)] == read_classes(tmp_path / "both.tif"))[clear].all()
    assert np.abs(layer(tmp_path / "both.tif", "confidence")[0] / 254 - mean.max(0))[valid].max() < 0.004
    assert result.engine == "torch"


def test_one_model_twice_equals_that_model(scene: Path, tmp_path: Path) -> None:
    network = conv(1, 1.7)
    wanted = options(confidence=True, probabilities="uint8", min_confidence=0.5)
    predict_scene(network, scene, tmp_path / "one.tif", wanted)
    predict_scene([network, network], scene, tmp_path / "two.tif", wanted.model_copy(update={"disagreement": True}))
    assert (read_classes(tmp_path / "one.tif") == read_classes(tmp_path / "two.tif")).all()
    for name in ("confidence", "probabilities"):
        assert (layer(tmp_path / "one.tif", name) == layer(tmp_path / "two.tif", name)).all()
    differ = layer(tmp_path / "two.tif", "disagreement")[0]
    assert (differ[differ != 255] == 0).all()


def test_the_order_of_the_models_changes_nothing(scene: Path, tmp_path: Path) -> None:
    networks = [conv(1), conv(2, 0.3), conv(3)]
    wanted = options(confidence=True, disagreement=True)
    identities = []
    for number, order in enumerate((networks, networks[::-1])):
        predict_scene(order, scene, tmp_path / f"{number}.tif", wanted)
        identities.append(identity(order, scene, wanted))
    for name in ("", "_confidence", "_disagreement"):
        assert (read_classes(tmp_path / f"0{name}.tif") == read_classes(tmp_path / f"1{name}.tif")).all()
    assert identities[0] == identities[1]


def joined(networks: list[ConvSegmenter], wanted: Any) -> PreparedNetwork:
    return join_networks([(str(n), prepare_network(one, wanted)) for n, one in enumerate(networks)], wanted)


def identity(networks: list[ConvSegmenter], scene: Path, wanted: Any) -> str:
    return prepare_scene(joined(networks, wanted), scene, None, wanted).identity()


def test_disagreement_is_high_where_the_models_choose_other_classes(scene: Path, tmp_path: Path) -> None:
    networks = [conv(1, 0.2), conv(2, 0.2)]
    for number, network in enumerate(networks):
        predict_scene(network, scene, tmp_path / f"{number}.tif", options())
    predict_scene(networks, scene, tmp_path / "both.tif", options(disagreement=True))
    found = layer(tmp_path / "both.tif", "disagreement")[0]
    classes = [read_classes(tmp_path / f"{number}.tif") for number in range(2)]
    valid = classes[0] != 255
    assert ((found == 255) == ~valid).all()
    same = classes[0] == classes[1]
    assert found[valid & ~same].mean() > 4 * found[valid & same].mean()


def test_disagreement_is_0_for_equal_and_1_for_opposite_sure_models() -> None:
    sure, other = np.array([[[1, 0, 0]]], np.float32), np.array([[[0, 1, 0]]], np.float32)
    unsure = np.full((1, 1, 3), 1 / 3, np.float32)
    assert disagreement(sure, [sure, sure])[0, 0] == pytest.approx(0)
    assert disagreement(unsure, [unsure, unsure])[0, 0] == pytest.approx(0, abs=1e-6)
    assert disagreement((sure + other) / 2, [sure, other])[0, 0] == pytest.approx(1)
    # By hand: 3 networks, 2 of them for one class; over log 3.
    share = np.array([2 / 3, 1 / 3])
    expected = -(share * np.log(share)).sum() / np.log(3)
    assert disagreement((2 * sure + other) / 3, [sure, sure, other])[0, 0] == pytest.approx(expected, rel=1e-5)


def test_layers_of_features_and_models_need_no_probabilities_of_the_class() -> None:
    assert not PixelOutputs(applicability=True, disagreement=True, temperatures=(2.0,)).need_probabilities
    for changes in ({"confidence": True}, {"probabilities": "uint8"}, {"min_confidence": 0.1}):
        assert PixelOutputs(**changes).need_probabilities  # type: ignore[arg-type]


def test_resuming_needs_the_same_models(scene: Path, tmp_path: Path) -> None:
    first = conv(1)
    wanted = options(resume=True, batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        predict_scene([first, StoppingSegmenter(6)], scene, tmp_path / "a.tif", wanted)
    assert list(tmp_path.glob(".a.tif*resume"))
    again = predict_scene([StoppingSegmenter(10**6), first], scene, tmp_path / "a.tif", wanted)
    assert 0 < again.resumed < 1
    predict_scene([first, StoppingSegmenter(10**6)], scene, tmp_path / "b.tif", options())
    assert (read_classes(tmp_path / "a.tif") == read_classes(tmp_path / "b.tif")).all()
    known = {identity(models, scene, options()) for models in ([first, conv(2)], [first, conv(3)], [first])}
    assert len(known | {identity([first, conv(2, 2.0)], scene, options())}) == 4, "temperatures change classes here"


def test_tiles_suit_all_networks() -> None:
    wanted = options(tile=None, overlap=None)
    task = make_task()
    coarse = ConvSegmenter(task, multiple=12, tile=TileHint(size=96, overlap=20, flexible=True))
    fine = StridedSegmenter(task)
    network = joined([coarse, fine], wanted).network
    assert (network.input_multiple, network.tile) == (24, TileHint(32, 20, flexible=True))
    bound = ConvSegmenter(task, tile=TileHint(size=48, overlap=12, flexible=False))
    network = joined([coarse, bound], wanted).network
    assert network.tile == TileHint(48, 20, flexible=False)


def test_each_network_of_fixed_size_sees_its_own_size(tmp_path: Path) -> None:
    task = make_task()
    small, large = (
        SizeSegmenter(task, input_multiple=1, fill=[0.0] * 3, tile=TileHint(size, 8, flexible=False))
        for size in (32, 64)
    )
    scene = write_tif(tmp_path / "small.tif", random_pixels(20, 20))
    predict_scene([small, large], scene, tmp_path / "out.tif", options(tile=64, confidence=True))
    assert (read_classes(tmp_path / "out.tif") == task.classes[1].value).all(), "both extend 20 pixels to their size"
    with pytest.raises(UsageError, match=r"tiles of 32 \(0\) and 64 \(1\) pixels. Give the side for all with --tile"):
        joined([small, large], options(tile=None))


def test_evaluation_averages_the_same_probabilities() -> None:
    members = [conv(1, 2.0, fill=[0.1] * 3), conv(2, multiple=4, fill=[0.9] * 3)]
    averaged = AveragedSegmenter(members).eval()
    assert (averaged.input_multiple, averaged.tile) == (4, members[0].tile)
    image = np.random.default_rng(0).random((3, 48, 72), np.float32)
    valid = np.random.default_rng(1).random((48, 72)) > 0.3
    config = EvalConfig(tile=96, overlap=8)
    own = [predict_probabilities(one, image, valid, config, device="cpu") for one in members]
    calm = own[0] ** 0.5
    expected = (calm / calm.sum(-1, keepdim=True) + own[1]) / 2
    assert (predict_probabilities(averaged, image, valid, config, device="cpu") - expected).abs().max() < 1e-5


def test_the_plan_counts_all_networks(scene: Path) -> None:
    wanted, segmenters = options(tile=64), [conv(1), conv(2)]
    single = [prepare_network(one, wanted) for one in segmenters]
    both = joined(segmenters, wanted)
    assert both.weights_bytes == sum(one.weights_bytes for one in single)
    assert both.cost(64, 64).peak_bytes > max(one.cost(64, 64).peak_bytes for one in single)
    with pytest.raises(MachineError, match="MB are allowed"):
        prepare_scene(both, scene, None, wanted.model_copy(update={"max_memory": 1 << 20}))


def test_no_model_is_an_error(scene: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no model"):
        predict_scene([], scene, tmp_path / "out.tif", options())


def write_model_of(folder: Path, name: str, task: Task, seed: int) -> str:
    """A small real model file with random weights."""
    recipe = parse_recipe(RecipeSource("tiny", RECIPE))
    torch.manual_seed(seed)
    training = {"calibration": {"temperatures": [1.0 + seed] * task.num_classes, "fitted_on": "images"}}
    header = ModelHeader(recipe.model_dump(mode="json"), task, {}, training, {})
    write_model(folder / name, segmenter_for(recipe, task).state_dict(), header)
    return str(folder / name)


def test_the_command_averages_models(
    scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    models = [write_model_of(tmp_path, f"{n}.safetensors", make_task(), n) for n in (1, 2)]
    call = ["predict", str(scene), "--tile", "64", "--confidence", "--probabilities", "float16"]
    for number, model in enumerate(models):
        assert run([*call, "--model", model, "-o", f"one{number}.tif"]) == 0
    capsys.readouterr()
    both = [*call, "--model", models[0], "--model", models[1], "--disagreement"]
    assert run([*both, "--polygons", ".gpkg", "--min-confidence", "0.1", "-o", "both.tif"]) == 0
    said = capsys.readouterr().err
    assert "1.safetensors" in said
    assert "temperature 2, " in said
    assert "temperature 3, " in said
    assert "both_disagreement.tif" in said
    assert Path("both.gpkg").is_file()
    own = [layer(Path(f"one{number}.tif"), "probabilities") for number in (0, 1)]
    found = layer(Path("both.tif"), "probabilities")
    valid = found[0] != -1
    assert np.abs(found - (own[0] + own[1]) / 2)[:, valid].max() < 0.02, (
        "each file is rounded, and computes in bfloat16"
    )
    with rasterio.open("both_disagreement.tif") as file:
        assert (file.scales, file.descriptions, file.nodata) == ((1 / 254,), ("disagreement",), 255)
    # The order of the models is no change: nothing is left to do.
    again = [*call, "--model", models[1], "--model", models[0], "--disagreement", "--min-confidence", "0.1"]
    assert run([*again, "--polygons", ".gpkg", "-o", "both.tif", "--skip-existing"]) == 0
    assert "is up to date" in capsys.readouterr().err
    assert run([*call, "--model", models[0], "-o", "both.tif", "--skip-existing"]) == 7, "another model"


def test_models_that_do_not_fit_are_named(
    scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    task = make_task()
    tasks = {
        "a": task.model_copy(update={"gsd_m": 1.0}),
        "classes": make_task(classes=4),
        "values": make_task(step=20),
        "bands": make_task(bands=4),
        "scaling": task.model_copy(update={"scale": (1.0,) * 3}),
        "gsd": task.model_copy(update={"gsd_m": 10.0}),
    }
    for name, own in tasks.items():
        write_model_of(tmp_path, name, own, 0)
    call = ["predict", str(scene), "-o", "out.tif", "--model", "a"]
    for name, words in (
        ("classes", "their classes differ: water = 1, grass = 11, roof & wall = 21, and water = 1"),
        ("values", "their classes differ"),
        ("bands", "their bands differ: b1, b2, b3, and b1, b2, b3, b4"),
        ("scaling", "their scaling of the pixels differ"),
        ("gsd", "trained on pixels of 1 m and 10 m"),
    ):
        assert run([*call, "--model", name]) == 2
        said = capsys.readouterr().err
        assert f"a and {name} cannot be averaged" in said
        assert words in said
    for extra, words in (
        (["--disagreement"], "Give --model for each of them"),
        (["--model", "a", "--applicability"], "Give one --model"),
        (["--model", "a", "--disagreement", "--blend", "hann"], "Use it with --blend crop"),
    ):
        assert run([*call, *extra]) == 2
        assert words in capsys.readouterr().err
    assert run([*call, "--model", "absent"]) == 5
    assert not Path("out.tif").exists()
