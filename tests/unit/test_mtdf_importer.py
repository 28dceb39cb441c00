"""The authors' checkpoints: names, what is left out, what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rsseg.checkpoint import load_tensors, read_header
from rsseg.errors import WeightsError
from rsseg.foreign import read_state_dict
from rsseg.methods.mtdf.importer import import_checkpoint, rename_tensors
from rsseg.methods.mtdf.network import build_segmenter
from tests.unit.mtdf_models import TASK, TEACHERS, recipe_of

RECIPE = recipe_of(teachers=[TEACHERS[0] | {"name": "dino"}, TEACHERS[1] | {"name": "clip"}])


def authors_names() -> list[str]:
    """Names of the student's tensors in the original code, for the network of RECIPE."""
    names = ["backbone." + name for name in build_segmenter(RECIPE, TASK).backbone.body.network.state_dict()]  # type: ignore[union-attr, operator]
    leaves = ("weight", "bias")
    for teacher in ("dino", "clip"):
        names += [f"feature_translator_for_{teacher}.layer.{i}.{leaf}" for i in (0, 2) for leaf in leaves]
        names += [f"project_{teacher}.{leaf}" for leaf in leaves]
    for i in range(4):
        names += [f"head.projects.{i}.{leaf}" for leaf in leaves] + [f"head.scratch.layer{i + 1}_rn.weight"]
        parts = ["out_conv"] + [f"resConfUnit{u}.conv{c}" for u in (1, 2) for c in (1, 2) if (i, u) != (3, 1)]
        names += [f"head.scratch.refinenet{i + 1}.{part}.{leaf}" for part in parts for leaf in leaves]
    names += [f"head.resize_layers.{i}.{leaf}" for i in (0, 1, 3) for leaf in leaves]
    return names + [f"head.scratch.output_conv.{i}.{leaf}" for i in (0, 2) for leaf in leaves]


def checkpoint(seed: int = 0) -> dict[str, Tensor]:
    """A state dict as the authors save it, with teachers and unused parameters."""
    torch.manual_seed(seed)
    own = build_segmenter(RECIPE, TASK).state_dict()
    state = {name: own[next(iter(rename_tensors({name: torch.empty(0)})))] for name in authors_names()}
    assert len(state) == len(own)
    extra = ("backbone.mask_token", "head.scratch.refinenet4.resConfUnit1.conv1.weight", "clip_model.logit_scale")
    return {f"module.{name}": t for name, t in (state | dict.fromkeys(extra, torch.zeros(1))).items()}


def save(path: Path, **parts: Any) -> Path:
    torch.save({"epoch": 3, "previous_best": np.float64(71.5)} | parts, path)
    return path


@pytest.mark.parametrize(("ship", "seed"), [("student", 0), ("average", 1)])
def test_student_or_average_becomes_a_model_file(tmp_path: Path, ship: str, seed: int) -> None:
    source = save(tmp_path / "best.pth", model=checkpoint(0), model_ema=checkpoint(1))
    recipe = RECIPE.model_copy(update={"ship": ship})
    header = import_checkpoint(source, recipe, TASK, output=tmp_path / "model.safetensors")
    assert header.training == {"imported_from": "best.pth", "weights": ship}
    assert read_header(tmp_path / "model.safetensors").backbones["backbone"]["name"] == "vit_mini_patch8"
    found = build_segmenter(recipe, TASK)
    load_tensors(found, tmp_path / "model.safetensors")
    torch.manual_seed(seed)
    for name, tensor in build_segmenter(recipe, TASK).state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name])


def test_header_names_the_weights_that_were_imported_and_the_recipe_agrees(tmp_path: Path) -> None:
    source = save(tmp_path / "best.pth", model=checkpoint(0), model_ema=checkpoint(1))
    for ship in ("student", "average"):
        recipe = RECIPE.model_copy(update={"ship": ship})
        import_checkpoint(source, recipe, TASK, output=tmp_path / "model.safetensors")
        header = read_header(tmp_path / "model.safetensors")
        assert header.training["weights"] == header.recipe["ship"] == ship


def test_foreign_and_incomplete_files_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "model.safetensors"
    state = checkpoint()
    with pytest.raises(WeightsError, match="no state dict 'model'"):
        read_state_dict(save(tmp_path / "a.pth", weights=state), "model")
    with pytest.raises(WeightsError, match=r"'backbone_s\.x' is not a tensor of RS-MTDF"):
        rename_tensors({"backbone_s.x": torch.zeros(1)})
    (tmp_path / "text.pth").write_text("no checkpoint")
    with pytest.raises(WeightsError, match="not a readable checkpoint"):
        read_state_dict(tmp_path / "text.pth", "model")
    state.pop("module.project_dino.bias")
    with pytest.raises(WeightsError, match=r"translators\.dino\.project\.bias"):
        import_checkpoint(save(tmp_path / "b.pth", model=state), RECIPE, TASK, output=output)
    wrong = TASK.model_copy(update={"classes": TASK.classes[:2]})
    with pytest.raises(WeightsError, match="has 3 classes, tiny has 2"):
        import_checkpoint(save(tmp_path / "c.pth", model=checkpoint()), RECIPE, wrong, output=output)
    assert not output.exists()
