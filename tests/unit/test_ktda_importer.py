"""Authors' checkpoints: the renaming, what is refused, and that nothing in the file is run."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rsseg.checkpoint import load_tensors, read_header
from rsseg.errors import WeightsError
from rsseg.foreign import read_state_dict
from rsseg.methods.ktda.importer import import_checkpoint, rename_tensors
from rsseg.methods.ktda.network import build_segmenter
from rsseg.methods.ktda.recipe import KTDARecipe
from tests.unit.ktda_models import PLAIN, TASK, recipe_of

DEPTHS = (1, 1, 2, 1)
"""Blocks per stage of convnext_mini."""

RECIPE = recipe_of(PLAIN, fam={"grid": 4, "width": 16}, neck={}, fmm={"type": "vit_block", "depth": 2})


LAYERS = ("conv", "bn")
LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def authors_names() -> Iterator[str]:
    """Names of the original code for the network of RECIPE, without the leaf."""
    for i in range(4):
        yield from (f"backbone.downsample_layers.{i}.{j}" for j in range(2))
        yield from (f"backbone.norm{i}", f"fam.convert.{i}", f"neck.lateral_convs.{i}.conv", f"neck.convs.{i}.conv")
        for j in range(DEPTHS[i]):
            parts = ("depthwise_conv", "norm", "pointwise_conv1", "pointwise_conv2")
            yield from (f"backbone.stages.{i}.{j}.{part}" for part in parts)
        for j in range(2):
            parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
            yield from (f"fmm.adapters.{i}.{j}.{part}" for part in parts)
        yield from (f"decode_head.psp_modules.{i}.1.{part}" for part in ("conv", "bn"))
        if i < 3:
            yield from (f"decode_head.{kind}.{i}.{part}" for kind in ("lateral_convs", "fpn_convs") for part in LAYERS)
    yield from (f"decode_head.{kind}.{part}" for kind in ("bottleneck", "fpn_bottleneck") for part in LAYERS)
    yield "decode_head.conv_seg"


def authors_state(recipe: KTDARecipe = RECIPE) -> dict[str, Tensor]:
    """A whole model's tensors under the authors' names, as their code would save them, teacher and head included."""
    torch.manual_seed(0)
    own = build_segmenter(recipe, TASK).state_dict()
    candidates = [f"{name}.{leaf}" for name in authors_names() for leaf in LEAVES]
    candidates += [f"backbone.stages.{i}.{j}.gamma" for i in range(4) for j in range(DEPTHS[i])]
    state: dict[str, Tensor] = {}
    for theirs in candidates:
        try:
            (ours,) = rename_tensors({theirs: torch.empty(0)}).segmenter
        except WeightsError:
            continue
        if ours in own:
            state[theirs] = own[ours]
    assert len(state) == len(own)
    return state | {"auxiliary_head.conv_seg.bias": torch.zeros(3), "teach_backbone.ln1.bias": torch.zeros(8)}


def saved(folder: Path, state: dict[str, Tensor]) -> Path:
    path = folder / "best_mIoU.pth"
    torch.save({"state_dict": state, "meta": {"epoch": 1}}, path)
    return path


def test_imported_model_holds_every_tensor_of_the_original_but_teacher_and_auxiliary_head(tmp_path: Path) -> None:
    state = authors_state()
    output = tmp_path / "model.safetensors"
    import_checkpoint(saved(tmp_path, state), RECIPE, TASK, output=output)
    header = read_header(output)
    assert header.task == TASK
    assert KTDARecipe.model_validate(header.recipe) == RECIPE
    torch.manual_seed(1)
    segmenter = build_segmenter(RECIPE, TASK)
    load_tensors(segmenter, output)
    torch.testing.assert_close(dict(segmenter.state_dict()), rename_tensors(state).segmenter, rtol=0, atol=0)


def test_header_says_student_as_the_authors_keep_no_average(tmp_path: Path) -> None:
    averaged = RECIPE.model_copy(update={"ship": "average"})
    header = import_checkpoint(saved(tmp_path, authors_state()), averaged, TASK, output=tmp_path / "m.safetensors")
    assert header.training["weights"] == header.recipe["ship"] == "student"


def test_older_name_of_fam_is_known() -> None:
    renamed = rename_tensors({"student_adapter.convert.0.bias": torch.zeros(2)})
    assert list(renamed.segmenter) == ["fam.projections.0.bias"]


def test_several_auxiliary_heads_keep_their_numbers() -> None:
    renamed = rename_tensors({f"auxiliary_head.{i}.conv_seg.bias": torch.zeros(2) for i in range(2)})
    assert list(renamed.aux_heads) == ["0.head.classifier.conv.bias", "1.head.classifier.conv.bias"]


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    state = authors_state()
    del state["neck.convs.1.conv.bias"]
    with pytest.raises(WeightsError, match=r"missing tensor 'neck\.convs\.1\.bias'"):
        import_checkpoint(saved(tmp_path, state), RECIPE, TASK, output=tmp_path / "out.safetensors")


def test_unknown_tensor_is_named(tmp_path: Path) -> None:
    state = authors_state() | {"decode_head.novel.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"'decode_head\.novel\.weight' is not a tensor of KTDA"):
        import_checkpoint(saved(tmp_path, state), RECIPE, TASK, output=tmp_path / "out.safetensors")


def test_other_modulation_than_the_recipes_is_named(tmp_path: Path) -> None:
    other = RECIPE.model_copy(update={"fmm": None})
    with pytest.raises(WeightsError, match="type: vit_block, depth: 2"):
        import_checkpoint(saved(tmp_path, authors_state()), other, TASK, output=tmp_path / "out.safetensors")


def test_other_number_of_classes_than_the_tasks_is_named(tmp_path: Path) -> None:
    fewer = TASK.model_copy(update={"classes": TASK.classes[:2]})
    with pytest.raises(WeightsError, match="has 3 classes, tiny has 2"):
        import_checkpoint(saved(tmp_path, authors_state()), RECIPE, fewer, output=tmp_path / "out.safetensors")


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04 cut short"])
def test_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"model\.pth: not a readable checkpoint"):
        read_state_dict(path)


def test_missing_file_and_file_without_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="not a readable checkpoint"):
        read_state_dict(tmp_path / "absent.pth")
    path = tmp_path / "numbers.pth"
    torch.save({"state_dict": {"a": 1}}, path)
    with pytest.raises(WeightsError, match="has no state dict"):
        read_state_dict(path)


def test_objects_of_other_libraries_beside_the_tensors_are_not_run(tmp_path: Path) -> None:
    marker, path = tmp_path / "was-run", tmp_path / "model.pth"
    # Written by a process of its own, so that the class exists nowhere when the file is read.
    code = f"""
import sys, types, torch
module = sys.modules["training_logs"] = types.ModuleType("training_logs")
class History:
    def __init__(self): self.values = [1.0]
    def __reduce__(self): return (open, ({str(marker)!r}, "w"))
class Log:
    def __init__(self): self.values = [1.0]
Log.__module__, Log.__qualname__ = "training_logs", "Log"
module.Log = Log
torch.save({{"state_dict": {{"a": torch.ones(2)}}, "log": [Log(), History()]}}, {str(path)!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert read_state_dict(path)["a"].tolist() == [1.0, 1.0]
    assert not marker.exists()
