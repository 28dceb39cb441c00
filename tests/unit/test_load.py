import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rsseg.checkpoint import METADATA_KEY, MODEL_NAME, ModelHeader, read_header, write_model
from rsseg.cli import run
from rsseg.errors import MachineError, UsageError, WeightsError
from rsseg.inference.device import resolve_device
from rsseg.inference.network import load_segmenter
from rsseg.methods.registry import segmenter_for
from rsseg.recipe import RecipeSource, parse_recipe
from tests.toys import make_task

RECIPE = """
name: tiny
method: ktda
data: {path: nowhere}
student: {name: tf_efficientnet_lite0}
decoder: {channels: 16}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a model of random weights; the pretrained ones that its recipe names are not there."""
    folder = tmp_path_factory.mktemp("run")
    recipe, task = parse_recipe(RecipeSource("tiny", RECIPE)), make_task()
    segmenter = segmenter_for(recipe, task)
    header = ModelHeader(
        recipe=recipe.model_dump(mode="json"), task=task, backbones={}, training={}, made_with={"rsseg": "9.9"}
    )
    write_model(folder / MODEL_NAME, segmenter.state_dict(), header)
    return folder


def test_network_of_a_run_folder_or_file_predicts_with_its_task(model: Path) -> None:
    first, second = load_segmenter(model), load_segmenter(str(model / MODEL_NAME))
    assert not first.training
    assert first.task == make_task()
    image = torch.rand(1, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = first.predict_logits(image)
        assert torch.equal(second.predict_logits(image), logits)
    assert logits.shape == (1, 3, 40, 50)


def test_folder_without_a_model_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="this run has no model yet"):
        load_segmenter(tmp_path)
    with pytest.raises(WeightsError, match="no such file or folder"):
        load_segmenter(tmp_path / "missing.safetensors")


def test_truncated_and_foreign_files_are_refused(model: Path, tmp_path: Path) -> None:
    content = (model / MODEL_NAME).read_bytes()
    for name, data in (("half", content[: len(content) // 2]), ("picture", b"\x89PNG"), ("empty", b"")):
        file = tmp_path / name
        file.write_bytes(data)
        with pytest.raises(WeightsError, match=name):
            load_segmenter(file)


def test_model_of_an_unknown_method_names_the_version_that_made_it(model: Path, tmp_path: Path) -> None:
    header = ModelHeader(
        recipe={"method": "future", "name": "x"},
        task=make_task(),
        backbones={},
        training={},
        made_with={"rsseg": "9.9"},
    )
    write_model(tmp_path / "future.safetensors", {"weight": torch.zeros(1)}, header)
    with pytest.raises(WeightsError, match=r"rsseg 9\.9"):
        load_segmenter(tmp_path / "future.safetensors")


def test_device_that_is_not_there_is_refused(model: Path) -> None:
    with pytest.raises(MachineError, match="cuda:99"):
        load_segmenter(model, device="cuda:99")
    with pytest.raises(UsageError, match="Choose auto, cpu"):
        resolve_device("gpu")
    assert resolve_device("auto").type in ("cpu", "cuda")


def with_metadata(model: Path, path: Path, change: Any) -> Path:
    """A copy of a model whose metadata is changed by a function, or replaced by a text."""
    content = (model / MODEL_NAME).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    if isinstance(change, str):
        header["__metadata__"][METADATA_KEY] = change
    else:
        values = json.loads(header["__metadata__"][METADATA_KEY])
        header["__metadata__"][METADATA_KEY] = json.dumps(change(values) or values)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return path


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


METADATA = {
    "null": "null",
    "a number": "3",
    "a list": "[]",
    "deep": nested(100_000),
    "less deep": nested(50),
    "many digits": "1" * 5000,
    "no JSON": "{",
    "half a pair": '{"a": "\\ud800"}',
    "no format": "{}",
    "no recipe": lambda values: values.pop("recipe"),
    "a recipe of a list": lambda values: values.update(recipe=[]),
    "an empty recipe": lambda values: values.update(recipe={}),
    "a task of null": lambda values: values.update(task=None),
    "a class of null": lambda values: values["task"].update(classes=[None]),
    "no bands": lambda values: values["task"].update(bands=[]),
    "a backbone of null": lambda values: values.update(backbones={"student": None}),
    "training of a number": lambda values: values.update(training=3),
    "versions of numbers": lambda values: values.update(made_with={"rsseg": [1]}),
    "another backbone": lambda values: values["recipe"]["student"].update(name="vit_large_patch14_dinov2"),
    "a huge backbone": lambda values: values["recipe"]["decoder"].update(channels=10**9),
    "a long name": lambda values: values["recipe"].update(name="n" * 300),
    "an unknown backbone": lambda values: values["recipe"]["student"].update(name="x" * 300),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_that_is_not_ours_is_refused_by_every_command(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = with_metadata(model, tmp_path / "m.safetensors", METADATA[name])
    # `info` shows what is readable; building the network shows the rest.
    assert run(["info", str(file)]) in (0, 5)
    assert run(["predict", "scene.tif", "--model", str(file), "--dry-run"]) in (5, 6)
    assert run(["eval", "--model", str(file), "--data", "none"]) in (5, 6)
    said = capfd.readouterr().err
    assert str(file) in said
    assert len(said) < 4000
    assert "bug" not in said


def test_header_is_as_deep_as_the_recipes_and_shows_names_with_brackets(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change = lambda values: values["task"]["classes"][0].update(name="[/red] roof")  # noqa: E731
    file = with_metadata(model, tmp_path / "m.safetensors", change)
    assert run(["info", str(file)]) == 0
    assert "[/red] roof" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.int(), r"type torch\.int32, the network needs a floating-point type"),
        (lambda tensor: tensor.to(torch.complex64), r"type torch\.complex64"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "float8"),
        (lambda tensor: torch.full_like(tensor, float("nan")), "holds NaN or infinity"),
        (lambda tensor: torch.full_like(tensor, float("inf")), "holds NaN or infinity"),
        (lambda tensor: tensor[..., None], r"has shape \(.*1\), the network"),
    ],
)
def test_tensors_that_cannot_predict_are_refused(model: Path, tmp_path: Path, change: Any, message: str) -> None:
    tensors = load_file(model / MODEL_NAME)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 4)
    write_model(tmp_path / "m.safetensors", tensors | {name: change(tensors[name])}, read_header(model / MODEL_NAME))
    with pytest.raises(WeightsError, match=message):
        load_segmenter(tmp_path / "m.safetensors")


def test_weights_in_half_precision_are_loaded(model: Path, tmp_path: Path) -> None:
    tensors = {n: t.half() if t.is_floating_point() else t for n, t in load_file(model / MODEL_NAME).items()}
    write_model(tmp_path / "m.safetensors", tensors, read_header(model / MODEL_NAME))
    assert next(load_segmenter(tmp_path / "m.safetensors").parameters()).dtype == torch.float32


def test_counter_of_floats_and_names_of_any_length_are_refused(model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / MODEL_NAME)
    counter = next(name for name in tensors if name.endswith("num_batches_tracked"))
    header, file = read_header(model / MODEL_NAME), tmp_path / "m.safetensors"
    write_model(file, tensors | {counter: torch.tensor(0.5)}, header)
    with pytest.raises(WeightsError, match="needs an integer type"):
        load_segmenter(file)
    write_model(file, tensors | {"n" * 300: torch.zeros(1)}, header)
    with pytest.raises(WeightsError, match="unexpected tensor 'nnn") as caught:
        load_segmenter(file)
    assert len(str(caught.value)) < 300


def test_what_is_no_file_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.safetensors")
    Path("folder.safetensors").mkdir()
    Path("empty.safetensors").touch()
    save_file({"a": torch.zeros(1)}, "foreign.safetensors")
    for name in ("pipe", "folder", "empty", "foreign", "none", "n" * 300):
        assert run(["info", f"{name}.safetensors"]) == 5
        assert run(["predict", "scene.tif", "--model", f"{name}.safetensors", "--dry-run"]) == 5
        assert run(["eval", "--model", f"{name}.safetensors"]) == 5
    os.mkfifo("scene.tif")
    assert run(["info", "scene.tif"]) == 4


def test_parameters_are_not_initialized_before_they_are_loaded(model: Path) -> None:
    before = torch.get_rng_state()
    loaded = load_segmenter(model)
    assert torch.equal(torch.get_rng_state(), before), "random numbers were drawn"
    stored = load_file(model / MODEL_NAME)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.state_dict().items())
