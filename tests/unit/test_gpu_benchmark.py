"""`benchmarks/gpu.py` at toy size on the CPU, with a recorder in the place of CUDA graphs."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from rsseg.training import graphs, trainer
from tests.training.replaying import CpuRecorder


def test_every_figure_is_measured_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recorded(parts: Any, recipe: Any, hardware: Any, report: Any) -> Any:
        return graphs.make_step(parts, recipe, hardware, report, CpuRecorder())

    monkeypatch.setattr(gpu, "make_step", recorded)
    monkeypatch.setattr(trainer, "make_step", recorded)
    output = tmp_path / "gpu.json"
    values = gpu.main(["--toy", "--output", str(output)])
    assert json.loads(output.read_text()) == values
    assert "errors" not in values, values["errors"]
    assert "skipped" not in values
    missing = [name for name, goal in values["goals"].items() if goal["value"] is None and "busy" not in name]
    assert missing == []
    for method in ("ktda", "mtdf", "dasegnet"):
        assert values[method]["messages"] == values[method]["trainer_messages"] == []
        assert values[method]["weight_difference"] < 1e-3


def test_what_does_not_fit_into_the_time_or_fails_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = gpu.main(["--toy", "--output", str(tmp_path / "a.json"), "--seconds", "0"])
    assert len(values["skipped"]) == 12
    assert {goal["met"] for goal in values["goals"].values()} == {None}

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(gpu, "network_rate", fail)
    monkeypatch.setattr(gpu, "predict_scene", fail)
    values = gpu.main(["--toy", "--only", "scene", "--output", str(tmp_path / "b.json")])
    assert values["errors"] == dict.fromkeys(["network alone", "scene none", "scene deflate"], "CUDA error")


def test_without_a_gpu_full_size_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "there is no GPU; --toy runs on a CPU" in capsys.readouterr().err
