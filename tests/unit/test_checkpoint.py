import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rsseg.checkpoint import METADATA_KEY, ModelHeader, load_tensors, read_header, write_model
from rsseg.errors import MachineError, WeightsError
from rsseg.task import ClassInfo, Task

TASK = Task(
    name="t",
    classes=(ClassInfo(name="a", value=1, color=(0, 0, 255)),),
    bands=("red",),
    scale=(1 / 255,),
    offset=(0.0,),
)
HEADER = ModelHeader(
    recipe={"method": "ktda", "seed": 3},
    task=TASK,
    backbones={"student": {"name": "convnext_tiny", "mean": [0.5]}},
    training={"step": 7, "weights": "average"},
    made_with={"rsseg": "0.1.0"},
)


def test_model_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    source, copy = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    nn.init.normal_(source.weight)
    write_model(path, source.state_dict(), HEADER)
    load_tensors(copy, path)
    assert read_header(path) == HEADER
    assert all(torch.equal(copy.state_dict()[k], v) for k, v in source.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_views_and_shared_tensors_can_be_written(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    write_model(tmp_path / "m.safetensors", {"a": base.T, "b": base, "c": base[0]}, HEADER)
    assert read_header(tmp_path / "m.safetensors").training["step"] == 7


def test_load_names_first_missing_and_unexpected_tensor_and_shape(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_model(path, {"weight": torch.zeros(2, 2), "odd": torch.zeros(1)}, HEADER)
    with pytest.raises(WeightsError, match="missing tensor 'bias'; unexpected tensor 'odd'"):
        load_tensors(nn.Linear(2, 2), path)
    write_model(path, nn.Linear(3, 2).state_dict(), HEADER)
    with pytest.raises(WeightsError, match=r"'weight' has shape \(2, 3\), the network \(2, 2\)"):
        load_tensors(nn.Linear(2, 2), path)


def test_missing_damaged_foreign_and_newer_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(WeightsError, match="not a readable model"):
        read_header(path)
    path.write_bytes(b"pickle")
    with pytest.raises(WeightsError, match="not a readable model"):
        read_header(path)
    with pytest.raises(WeightsError, match="not a readable model"):
        load_tensors(nn.Linear(1, 1), path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="foreign"):
        read_header(path)
    save_file({"a": torch.zeros(1)}, path, {METADATA_KEY: json.dumps({"format": 2, "made_with": {"rsseg": "9.0"}})})
    with pytest.raises(WeightsError, match=r"format 2.*rsseg 9\.0"):
        read_header(path)
    save_file({"a": torch.zeros(1)}, path, {METADATA_KEY: "[1]"})
    with pytest.raises(WeightsError, match="damaged header"):
        read_header(path)


def test_cut_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_model(path, {"a": torch.zeros(1000)}, HEADER)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="not a readable model"):
        read_header(path)


def test_unwritable_folder_is_a_machine_error(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="cannot be written"):
        write_model(tmp_path / "absent" / "m.safetensors", {"a": torch.zeros(1)}, HEADER)
