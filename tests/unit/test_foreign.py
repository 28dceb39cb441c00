"""Checkpoints of other code bases that are damaged, hostile or odd: exit code 5 and one sentence."""

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rsseg.backbones.backbone import create_backbone
from rsseg.cli import run
from rsseg.config import BackboneConfig
from rsseg.errors import WeightsError
from rsseg.foreign import read_state_dict
from tests.unit.backbone_tasks import task_of

ONES = torch.ones(2)
RECIPES = ("grass", "potsdam-1pct", "dasegnet-loveda-rural-to-urban")


def pickled(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def other_pickle(payload: bytes) -> bytes:
    """A checkpoint archive whose pickle is `payload`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


class Exploding:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (print, ("executed",))


ODD: dict[str, bytes] = {
    "integer keys": pickled({"state_dict": {0: ONES, 1: ONES}}),
    "only integer keys": pickled({0: ONES}),
    "tuple keys": pickled({("a", "b"): ONES}),
    "names of 300 characters": pickled({"state_dict": {"a" * 300: ONES}}),
    "a list": pickled([ONES]),
    "a tensor": pickled(ONES),
    "nothing": pickled({}),
    "numbers": pickled({"state_dict": {"a": 1.0}}),
    "nested": pickled({"state_dict": {"backbone": {"weight": ONES}}}),
    "sparse": pickled({"state_dict": {"a": torch.eye(2).to_sparse()}}),
    "on no device": pickled({"state_dict": {"a": torch.empty(2, device="meta")}}),
    "plain pickle": pickle.dumps({"state_dict": {"a": [1]}}),
    "code": other_pickle(pickle.dumps({"state_dict": Exploding()})),
    "cut pickle": other_pickle(pickle.dumps({"a": 1})[:-3]),
    "stack underflow": other_pickle(b"\x80\x02R."),
    "unknown memo": other_pickle(b"\x80\x02h\xff."),
    "deep nesting": other_pickle(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
    "huge storage": pickled({"a": ONES}).replace(b"K\x02", b"K\xff"),
    "empty": b"",
    "text": b"not a checkpoint",
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("recipe", RECIPES)
def test_odd_checkpoint_is_refused_in_one_sentence_and_not_executed(
    case: str, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "odd.pth", tmp_path / "model.safetensors"
    source.write_bytes(ODD[case])
    assert run(["weights", "import", str(source), "--recipe", recipe, "-o", str(output)]) == 5
    said = capsys.readouterr()
    assert "executed" not in said.out
    assert "bug" not in said.err
    assert not output.exists()


@pytest.mark.parametrize(
    ("recipe", "name", "tensor"),
    [
        ("grass", "fmm.adapters.0.99999999999999999999.attn.qkv.weight", ONES),
        ("grass", "decode_head.conv_seg.weight", torch.tensor(1.0)),
        ("potsdam-1pct", "head.scratch.output_conv.2.weight", torch.tensor(1.0)),
        ("dasegnet-loveda-rural-to-urban", "dsk_neck.dsk_neck" + "9" * 5000 + ".fc.weight", ONES),
        ("dasegnet-loveda-rural-to-urban", "backbone_s.layers.0.1.0.attn.attn.in_proj_weight", torch.tensor(1.0)),
        ("dasegnet-loveda-rural-to-urban", "decode_head_s.conv_seg.weight", torch.ones(2, 2, dtype=torch.int32)),
    ],
)
def test_odd_tensors_are_refused(
    recipe: str, name: str, tensor: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {name: tensor}, "model": {name: tensor}}, tmp_path / "odd.pth")
    command = ["weights", "import", str(tmp_path / "odd.pth"), "--recipe", recipe, "-o", str(tmp_path / "model")]
    assert run(command) == 5
    assert len(capsys.readouterr().err) < 1500


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_checkpoint_is_never_replaced_by_its_model(flags: list[str], tmp_path: Path) -> None:
    source, link = tmp_path / "authors.pth", tmp_path / "link.pth"
    source.write_bytes(ODD["names of 300 characters"])
    link.symlink_to(source)
    for output in (source, link):
        assert run(["weights", "import", str(source), "--recipe", "grass", "-o", str(output), *flags]) == 2
    assert source.read_bytes() == ODD["names of 300 characters"]


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.pth", tmp_path / ("a" * 300)):
        with pytest.raises(WeightsError, match="not a readable checkpoint"):
            read_state_dict(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda name, tensor: torch.full_like(tensor, torch.nan) if name == "stem.0.weight" else tensor,
        lambda name, tensor: tensor.to(torch.complex64) if name == "stem.0.weight" else tensor,
        lambda name, tensor: tensor.flatten() if name == "stem.0.weight" else tensor,
        lambda name, tensor: torch.tensor(1.0) if name == "stem.0.weight" else tensor,
    ],
    ids=["nan", "complex", "flat", "scalar"],
)
def test_pretrained_weights_with_odd_values_are_refused(
    change: Callable[[str, Tensor], Tensor], tmp_path: Path
) -> None:
    random = BackboneConfig(name="convnext_atto", weights="random")
    state = create_backbone(random, task_of("red", "green", "blue")).body.network.state_dict()
    head = {f"head.{name}": torch.ones(320) for name in ("norm.weight", "norm.bias")}
    file = tmp_path / "odd.safetensors"
    save_file({name: change(name, tensor).contiguous() for name, tensor in (state | head).items()}, file)
    with pytest.raises(WeightsError, match=r"odd\.safetensors"):
        create_backbone(random.model_copy(update={"weights": str(file)}), task_of("red", "green", "blue"))
