"""Scenes predicted by other programs than torch."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose, assert_array_equal

from rsseg.cli import run
from rsseg.inference.blend import CLASSES_ONLY, ArrayLogits, PixelOutputs, decide_planes
from rsseg.inference.engines import open_engine
from rsseg.inference.tiling import Span
from rsseg.inference.torch_network import TensorLogits, decide
from tests.conftest import write_tif
from tests.export.test_export import patches, write_network
from tests.scene.helpers import read_classes

ENGINES = {"onnx": "onnxruntime", "openvino": "openvino"}
pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("model"), "upernet")


def predict(model: Path, scene: Path, output: Path, *extra: str) -> np.ndarray:
    assert run(["predict", str(scene), "--model", str(model), "-o", str(output), "--overwrite", *extra]) == 0
    return read_classes(output)


@pytest.mark.parametrize("engine", ENGINES)
def test_engine_gives_torchs_classes_and_the_same_bytes_twice(tmp_path: Path, model: Path, engine: str) -> None:
    pytest.importorskip(ENGINES[engine])
    pixels = patches(150, 210)
    pixels[:, :40, :50] = 0
    scene = write_tif(tmp_path / "scene.tif", pixels, nodata=0)
    tiles = ["--tile", "96", "--overlap", "32"]
    expected = predict(model, scene, tmp_path / "torch.tif", *tiles)
    found = predict(model, scene, tmp_path / "first.tif", *tiles, "--engine", engine)
    # torch and openvino compute in bfloat16 where the processor has it.
    assert (found == expected).mean() > 0.97
    assert_array_equal(found == 255, expected == 255)
    predict(model, scene, tmp_path / "second.tif", *tiles, "--engine", engine)
    assert (tmp_path / "first.tif").read_bytes() == (tmp_path / "second.tif").read_bytes()
    with rasterio.open(tmp_path / "torch.tif") as ours, rasterio.open(tmp_path / "first.tif") as theirs:
        assert ours.tags()["RSSEG_MADE_FROM"] != theirs.tags()["RSSEG_MADE_FROM"]


@pytest.mark.parametrize("engine", ENGINES)
def test_engine_with_blending_views_and_probabilities(tmp_path: Path, model: Path, engine: str) -> None:
    pytest.importorskip(ENGINES[engine])
    scene = write_tif(tmp_path / "scene.tif", patches(70, 100))
    extra = ["--tile", "64", "--overlap", "32", "--blend", "hann", "--tta", "d4", "--confidence"]
    expected = predict(model, scene, tmp_path / "torch.tif", *extra)
    found = predict(model, scene, tmp_path / "engine.tif", *extra, "--engine", engine)
    assert (found == expected).mean() > 0.97
    ours, theirs = (read_classes(tmp_path / f"{name}_confidence.tif").astype(int) for name in ("torch", "engine"))
    assert np.abs(ours - theirs).mean() < 4


@pytest.mark.parametrize("engine", ENGINES)
def test_neither_torch_nor_timm_is_imported_once_the_network_is_exported(
    tmp_path: Path, model: Path, engine: str
) -> None:
    pytest.importorskip(ENGINES[engine])
    scene = write_tif(tmp_path / "scene.tif", patches(64, 64))
    predict(model, scene, tmp_path / "out.tif", "--engine", engine)
    arguments = ["predict", str(scene), "--model", str(model), "-o", str(tmp_path / "again.tif"), "--engine", engine]
    code = (
        f"import sys; from rsseg.cli import run; assert run({arguments!r}) == 0; "
        "sys.exit(', '.join({'torch', 'timm', 'onnx', 'torchvision', 'pyogrio'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert_array_equal(read_classes(tmp_path / "out.tif"), read_classes(tmp_path / "again.tif"))


def test_network_is_exported_once_for_each_state_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    file = write_network(tmp_path)
    first = open_engine(file, "onnx", "cpu", "auto")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "rsseg.inference.graph", None)
        assert open_engine(file, "onnx", "cpu", "auto").model == first.model
    file.unlink()
    write_network(tmp_path, "upernet")
    assert open_engine(file, "onnx", "cpu", "auto").model != first.model
    assert len(list(tmp_path.glob(".model.safetensors.*.onnx"))) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--engine", "onnx", "--device", "cuda"], 2, "runs on CPUs"),
        (["--engine", "tensorrt"], 2, "--engine tensorrt"),
    ],
)
def test_engine_that_cannot_be_used_is_a_message(
    tmp_path: Path, model: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = write_tif(tmp_path / "scene.tif", patches(64, 64))
    assert run(["predict", str(scene), "--model", str(model), "-o", str(tmp_path / "out.tif"), *arguments]) == code
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]


@pytest.mark.parametrize("logits", [None, np.nan])
def test_graph_that_does_not_give_torchs_logits_is_refused_in_a_sentence_and_auto_takes_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logits: float | None
) -> None:
    pytest.importorskip("onnxruntime")

    def run_graph(_: Path, images: np.ndarray) -> np.ndarray:
        if logits is None:
            raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Reshape")
        return np.full((1, 4, images.shape[2] // 4, images.shape[3] // 4), logits, np.float32)

    monkeypatch.setattr("rsseg.inference.graph._run", run_graph)
    file, scene = write_network(tmp_path), write_tif(tmp_path / "scene.tif", patches(64, 64))
    arguments = ["predict", str(scene), "--model", str(file), "-o", str(tmp_path / "out.tif"), "--engine"]
    assert run([*arguments, "onnx"]) == 2
    problem = "does not run on images of" if logits is None else "computes other logits than rsseg's own for images of"
    error = capsys.readouterr().err
    assert f"{file}: exported for other engines, the network {problem} 256 x 256 pixels. Give --engine torch." in error
    assert "Reshape" not in error
    assert not list(tmp_path.glob(".*.onnx"))
    assert run([*arguments, "auto"]) == 0
    assert "with torch" in capsys.readouterr().err


def test_engine_that_is_not_installed_is_a_message_and_auto_takes_torch(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    scene = write_tif(tmp_path / "scene.tif", patches(64, 64))
    arguments = ["predict", str(scene), "--model", str(model), "-o", str(tmp_path / "out.tif"), "--engine"]
    assert run([*arguments, "onnx"]) == 6
    assert "rsseg[onnx]" in capsys.readouterr().err
    assert run([*arguments, "auto"]) == 0
    assert "with torch" in capsys.readouterr().err


@pytest.mark.parametrize("classes", [5, 40])  # torch leaves few classes to OpenCV
@pytest.mark.parametrize("low", [(64, 48), (32, 24), (256, 192), (37, 28)])
def test_arrays_are_resized_and_decided_like_tensors(low: tuple[int, int], classes: int) -> None:
    torch.manual_seed(0)
    stored = torch.randn(1, classes, *low)
    ours = ArrayLogits(stored[0].numpy(), (256, 192), (250, 180))
    theirs = TensorLogits(stored, (256, 192), (250, 180))
    expected = F.interpolate(stored, size=(256, 192), mode="bilinear")[0, :, :250, :180]
    assert_allclose(ours.whole(), expected.numpy(), atol=1e-5)
    outputs = PixelOutputs(confidence=True, probabilities="float16")
    rows, cols = Span(13, 240), Span(5, 170)
    wanted = decide(expected[:, rows.area, cols.area].permute(1, 2, 0), outputs)
    for logits in (ours, theirs):
        found = logits.decide(rows, cols, outputs)
        assert (found.classes == wanted.classes).mean() > 0.999
        assert np.abs(found.confidence.astype(int) - wanted.confidence).max() <= 1
        assert_allclose(found.probabilities, wanted.probabilities, atol=2e-3)
        assert_array_equal(logits.decide(rows, cols, CLASSES_ONLY).classes, found.classes)


def test_first_of_equal_logits_wins() -> None:
    assert_array_equal(decide_planes(np.zeros((3, 2, 2), np.float32), PixelOutputs()).classes, np.zeros((2, 2)))


SIGNAL_AFTER_TWO_NETWORKS = """
import gc, os, signal, sys
from pathlib import Path
import numpy as np
from rsseg.inference.engines import open_engine

def network():
    ready = open_engine(Path(sys.argv[1]), "openvino", "cpu", "float32")
    run = ready.network.start(1, 1)
    run(np.zeros((1, 3, 64, 64), np.float32))
    return run

signal.signal(signal.SIGINT, lambda *_: print("interrupted"))
first = network()
second = network()
for name in ("first", "second"):
    del globals()[name]
    gc.collect()
os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_signals_are_handled_after_openvino_networks_are_gone(model: Path) -> None:
    pytest.importorskip("openvino")
    command = [sys.executable, "-c", SIGNAL_AFTER_TWO_NETWORKS, str(model)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "interrupted\n"), result.stderr
