from pathlib import Path

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from rsseg.config import OptimizerConfig
from rsseg.errors import DataError, RecipeError, WeightsError
from rsseg.layers.ema import Ema
from rsseg.methods.base import ParamGroup
from rsseg.runs import Manifest, RunFolder
from rsseg.training.checkpoints import (
    Counters,
    Identity,
    Parts,
    changed_values,
    frozen_hashes,
    load_state,
    save_state,
    with_global_batch,
)
from rsseg.training.step import build_optimizers
from tests.training.tiny_method import ToyMethod, toy_batches, toy_recipe


def make_parts(seed: int) -> Parts:
    method = ToyMethod(seed)
    recipe = toy_recipe()
    return Parts(
        method, Ema(method.segmenter, 0.9), build_optimizers(method, recipe.optimizers), GradScaler("cpu", enabled=True)
    )


def identity_of(parts: Parts, **changes: object) -> Identity:
    values = {"recipe": {"seed": 1}, "frozen": frozen_hashes(parts.method), "splits": {"val": "a"}, "processes": 1}
    return Identity.model_validate(values | changes)


def manifest_of(*, processes: int, micro_steps: int) -> Manifest:
    fields = ("name", "method", "recipe", "created", "host", "device", "monitor")
    plan = {"processes": processes, "grad_accum_steps": micro_steps}
    values = {"pid": 1, "command": (), "versions": {}, "commit": None, "seed": 0, "plan": plan, "used": {}}
    return Manifest.model_validate(dict.fromkeys(fields, "") | values)


def step(parts: Parts) -> None:
    batch = next(toy_batches(toy_recipe(), 0, 0, 1))
    parts.method.double()
    sum(parts.method(batch, 0).losses.values()).backward()
    for optimizer in parts.optimizers.values():
        optimizer.step()


def test_state_restores_weights_average_optimizers_and_counters(tmp_path: Path) -> None:
    file = tmp_path / "run" / "checkpoints" / "last.state" / "state.safetensors"
    parts, other = make_parts(0), make_parts(1)
    other.method.teacher.module.load_state_dict(parts.method.teacher.module.state_dict())
    for each in (parts, other):
        assert each.ema is not None
        each.ema.double()
        step(each)
    counters = Counters(step=7, best_score=0.5, best_step=4, since_best=2, elapsed_s=1.5)
    save_state(file, parts, counters, identity_of(parts))
    assert load_state(file, other, identity_of(other)) == counters
    assert parts.ema is not None
    assert other.ema is not None
    for a, b in ((parts.method, other.method), (parts.ema, other.ema)):
        torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)
    for name, optimizer in parts.optimizers.items():
        restored = other.optimizers[name].state_dict()["state"]
        torch.testing.assert_close(optimizer.state_dict()["state"], restored, rtol=0, atol=0)
    assert other.scaler.state_dict() == parts.scaler.state_dict()
    assert not any("teacher" in name for name in parts.method.state_dict())
    assert [p.name for p in file.parent.iterdir()] == ["state.safetensors"]


def test_other_teacher_images_or_processes_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "run" / "checkpoints" / "last.state" / "state.safetensors"
    parts = make_parts(0)
    save_state(file, parts, Counters(step=1), identity_of(parts))
    with pytest.raises(WeightsError, match="weights of the frozen 'teacher' differ"):
        load_state(file, make_parts(1), identity_of(make_parts(1)))
    with pytest.raises(DataError, match="images of 'val' differ"):
        load_state(file, parts, identity_of(parts, splits={"val": "b"}))
    with pytest.raises(RecipeError, match="by 1 processes, now there are 2"):
        load_state(file, parts, identity_of(parts, processes=2))
    with pytest.raises(RecipeError, match="seed: was 1, is 2"):
        load_state(file, parts, identity_of(parts, recipe={"seed": 2}))


def test_another_number_of_processes_shares_the_global_batch_or_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run" / "checkpoints" / "last.state" / "state.safetensors"
    parts, heard = make_parts(0), list[str]()

    def identity(processes: int, micro_steps: int) -> Identity:
        recipe = {"trainer": {"grad_accum_steps": micro_steps}}
        return identity_of(parts, recipe=recipe, processes=processes)

    save_state(file, parts, Counters(step=1), identity(2, 3))
    given = toy_recipe(grad_accum_steps=3)
    assert [with_global_batch(given, file, n).trainer.grad_accum_steps for n in (1, 2, 3, 4, 6)] == [6, 3, 2, 3, 1]
    assert with_global_batch(toy_recipe(grad_accum_steps=5), file, 1).trainer.grad_accum_steps == 5
    assert with_global_batch(given, tmp_path / "none", 1) == given
    # A resume with 1 process was killed before it was saved: its recipe is the run's, the state that of 2 processes.
    resumed = RunFolder(file.parents[2])
    resumed.write_manifest(manifest_of(processes=1, micro_steps=6))
    given = toy_recipe(grad_accum_steps=6)
    assert [with_global_batch(given, file, n).trainer.grad_accum_steps for n in (1, 2, 3)] == [6, 3, 2]
    resumed.write_manifest(manifest_of(processes=2, micro_steps=5))  # one with another global batch, by wish
    given = toy_recipe(grad_accum_steps=5)
    assert [with_global_batch(given, file, n).trainer.grad_accum_steps for n in (1, 2)] == [5, 5]
    load_state(file, parts, identity(3, 2), warn=heard.append)
    assert "the global batch is the same" in heard.pop()
    load_state(file, parts, identity(2, 3), warn=heard.append)
    assert not heard
    with pytest.raises(RecipeError, match=r"now there are 4.*or a number that divides 6"):
        load_state(file, parts, identity(4, 3))
    with pytest.raises(RecipeError, match="grad_accum_steps: was 3, is 5"):
        load_state(file, parts, identity(2, 5))


def test_only_values_that_matter_count_as_changed() -> None:
    before = {"name": "a", "trainer": {"steps": 1, "batch_size": 2, "workers": 0}, "streams": {}}
    after = {"name": "b", "trainer": {"steps": 9, "batch_size": 2, "workers": 4}, "streams": {}}
    assert changed_values(before, after) == []
    assert changed_values(before, after | {"streams": {"labeled": {"count": 2}}}) == [
        "streams: was {}, is None",
        "streams.labeled.count: was None, is 2",
    ]


def test_optimizers_keep_scales_and_decay_and_refuse_wrong_names() -> None:
    optimizers = build_optimizers(ToyMethod(), toy_recipe().optimizers)
    assert optimizers["body"].param_groups[0]["lr_scale"] == 0.5
    assert optimizers["head"].param_groups[0]["weight_decay"] == 0.0
    assert optimizers["body"].param_groups[0]["weight_decay"] == 0.01
    with pytest.raises(RecipeError, match=r"describes \['main'\], the method needs \['body', 'head'\]"):
        build_optimizers(ToyMethod(), {"main": OptimizerConfig()})


@pytest.mark.parametrize(("names", "message"), [((0,), "in no group"), ((0, 0, 3), "in two groups")])
def test_parameters_in_no_or_two_groups_are_a_bug(names: tuple[int, ...], message: str) -> None:
    class Forgetful(ToyMethod):
        def param_groups(self) -> dict[str, list[ParamGroup]]:  # type: ignore[override]
            net = self.segmenter.net
            assert isinstance(net, nn.Sequential)
            return {"main": [ParamGroup(list(net[i].parameters())) for i in names]}

    with pytest.raises(ValueError, match=message):
        build_optimizers(Forgetful(), {"main": OptimizerConfig()})
