from pathlib import Path

import pytest
import torch

from rsseg.checkpoint import MODEL_NAME, ModelHeader, write_model
from rsseg.errors import MachineError, WeightsError
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
    with pytest.raises(MachineError, match="Choose auto, cpu"):
        resolve_device("gpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
