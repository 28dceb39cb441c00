"""Exported networks: their metadata, their classes, and what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import rasterio
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.scenes import write_random_model
from rsseg.checkpoint import Calibration
from rsseg.cli import run
from rsseg.errors import UsageError
from rsseg.export.model import onnx_runner
from rsseg.inference.graph import write_graph
from rsseg.inference.network import load_segmenter
from tests.conftest import write_tif
from tests.toys import make_task

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
SIDE = 96
DECODERS = {"segformer": "{type: segformer, channels: 16}", "upernet": "{type: upernet, channels: 16}"}


def write_network(
    folder: Path, decoder: str = "segformer", temperatures: tuple[float, ...] | None = None, **changes: Any
) -> Path:
    """A model with random weights whose classes differ from patch to patch; pooling cells do not divide the map."""
    task = make_task(classes=4).model_copy(
        update={"dtype": "uint8", "scale": (1 / 255,) * 3, "offset": (0.0,) * 3, "gsd_m": 0.5} | changes
    )
    text = f"""
name: tiny
method: ktda
data: {{path: none}}
student: {{name: convnext_mini, weights: random}}
decoder: {DECODERS[decoder]}
"""
    calibration = None if temperatures is None else Calibration(temperatures, "val")
    write_random_model(folder / "model.safetensors", text, task, calibration)
    return folder / "model.safetensors"


def patches(height: int = 200, width: int = 260) -> np.ndarray:
    coarse = np.random.default_rng(3).integers(1, 256, (3, -(-height // 40), -(-width // 40)))
    return coarse.repeat(40, 1).repeat(40, 2)[:, :height, :width].astype(np.uint8)


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    return write_tif(tmp_path / "scene.tif", patches(), crs="EPSG:32631")


@pytest.mark.parametrize("decoder", DECODERS)
def test_onnx_holds_what_deepness_and_geodeep_read_and_gives_rssegs_classes(
    tmp_path: Path, scene: Path, decoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = write_network(tmp_path, decoder), tmp_path / "out.onnx"
    arguments = ["--tile", str(SIDE), "--check", str(scene), "-o", str(output)]
    assert run(["export", str(model), "--for", "deepness", *arguments]) == 0
    assert "rsseg's own class" in capsys.readouterr().err
    graph = onnx.load(output)
    assert graph.ir_version <= 9
    assert all(entry.version <= 17 for entry in graph.opset_import)
    dims = [
        [d.dim_value for d in value.type.tensor_type.shape.dim] for value in (*graph.graph.input, *graph.graph.output)
    ]
    assert dims == [[1, 3, SIDE, SIDE], [1, 4, SIDE, SIDE]]
    found = {entry.key: json.loads(entry.value) for entry in graph.metadata_props}
    assert found["model_type"] == "Segmentor"
    assert found["class_names"] == {str(i): c.name for i, c in enumerate(make_task(classes=4).classes)}
    assert (found["tile_size"], found["tiles_size"], found["resolution"]) == (SIDE, SIDE, 50)
    assert (found["seg_thresh"], found["seg_small_segment"]) == (0, 0)
    assert 0 <= found["tiles_overlap"] < 100
    assert not any(name.startswith("standardization") for name in found)
    assert found["rsseg_license"] == {"convnext_mini": "none"}


@pytest.mark.parametrize("target", ["onnx", "torch-export"])
def test_an_export_that_fails_its_check_replaces_nothing(
    tmp_path: Path, scene: Path, target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = write_network(tmp_path), tmp_path / "new" / "out"
    arguments = ["export", str(model), "--for", target, "--tile", str(SIDE), "-o", str(output)]
    assert run(arguments) == 0
    before = output.read_bytes()
    monkeypatch.setattr("rsseg.export.model.LEAST_AGREEMENT", 1.1)
    assert run([*arguments, "--check", str(scene), "--overwrite"]) == 8
    assert "It was not written." in " ".join(capsys.readouterr().err.split())
    assert [file.name for file in output.parent.iterdir()] == ["out"]
    assert output.read_bytes() == before


def test_onnx_gives_rssegs_classes_where_only_onnxruntime_and_numpy_are(tmp_path: Path) -> None:
    model, pixels = write_network(tmp_path), patches(SIDE, SIDE)
    np.save(tmp_path / "pixels.npy", pixels)
    assert run(["export", str(model), "--tile", str(SIDE)]) == 0
    code = (
        "import sys, numpy, onnxruntime; session = onnxruntime.InferenceSession('model.onnx'); "
        "images = numpy.load('pixels.npy')[None].astype(numpy.float32) / 255; "
        "shares = session.run(None, {'images': images})[0]; "
        "assert numpy.allclose(shares.sum(1), 1, atol=1e-5); assert not {'torch', 'rsseg'} & set(sys.modules); "
        "numpy.save('classes.npy', shares[0].argmax(0))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    # In float32: a scene on a processor with bfloat16 is predicted in that.
    own = load_segmenter(model).predict_logits(torch.from_numpy(pixels[None] / np.float32(255))).argmax(1)[0].numpy()
    assert len(np.unique(own)) > 1
    assert (np.load(tmp_path / "classes.npy") == own).mean() >= 0.999


@pytest.mark.parametrize("temperatures", [(2.5,) * 4, (0.6, 1.7, 3.0, 2.0)], ids=["one", "per class"])
@pytest.mark.parametrize("target", ["onnx", "torch-export"])
def test_exported_probabilities_are_calibrated_like_rssegs_own(
    tmp_path: Path, target: str, temperatures: tuple[float, ...]
) -> None:
    pixels = patches(SIDE, SIDE)
    scene = write_tif(tmp_path / "one.tif", pixels, crs="EPSG:32631")
    model = write_network(tmp_path, temperatures=temperatures)
    (tmp_path / "plain").mkdir()
    plain = write_network(tmp_path / "plain")
    options = ["--for", target, "--tile", str(SIDE), "--check", str(scene)]
    for file in (model, plain):
        assert run(["export", str(file), *options]) == 0
    images = pixels[None].astype(np.float32) / 255
    if target == "onnx":
        found, uncalibrated = (onnx_runner(path / "model.onnx")(images)[0] for path in (tmp_path, tmp_path / "plain"))
        keys = {entry.key: json.loads(entry.value) for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
        assert keys["rsseg_temperatures"] == list(temperatures)
        assert keys["rsseg_calibrated_on"] == "val"
    else:
        programs = [torch.export.load(path / "model.pt2").module() for path in (tmp_path, tmp_path / "plain")]
        found, uncalibrated = (program(torch.from_numpy(images)).detach().numpy()[0] for program in programs)
    assert (found.argmax(0) == uncalibrated.argmax(0)).all()
    assert np.abs(found - uncalibrated).max() > 0.05
    command = ["predict", str(scene), "--model", str(model), "-o", str(tmp_path / "map.tif"), "--engine", "onnx"]
    assert run([*command, "--probabilities", "float16", "--tile", str(SIDE)]) == 0
    with rasterio.open(tmp_path / "map_probabilities.tif") as file:
        np.testing.assert_allclose(found, file.read(), atol=2e-3)


class Antialiased(nn.Module):
    """Halves an image by an operation that the opset of rsseg's graphs lacks."""

    def forward(self, images: Tensor) -> Tensor:
        return F.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)


def test_network_that_the_opset_lacks_an_operation_for_is_a_sentence_and_leaves_no_file(tmp_path: Path) -> None:
    place = tmp_path / "out" / "model.onnx"
    with pytest.raises(UsageError, match=r"this network cannot be written as ONNX \(opset 17\): .*_aa"):
        write_graph(Antialiased().eval(), torch.rand(1, 3, 32, 32), place)
    assert list(place.parent.iterdir()) == []


def test_torch_export_gives_rssegs_classes_and_keeps_the_metadata(tmp_path: Path, scene: Path) -> None:
    model = write_network(tmp_path, "upernet")
    assert run(["export", str(model), "--for", "torch-export", "--tile", str(SIDE), "--check", str(scene)]) == 0
    extra = {"class_names": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert json.loads(extra["class_names"])["0"] == make_task(classes=4).classes[0].name


def test_check_fails_for_other_classes(tmp_path: Path, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsseg.export.model.onnx_runner", lambda _: lambda pixels: np.zeros((1, 4, SIDE, SIDE)))
    model = write_network(tmp_path)
    assert run(["export", str(model), "--tile", str(SIDE), "--check", str(scene)]) == 8


@pytest.mark.parametrize(
    ("target", "changes", "extra", "message"),
    [
        ("deepness", {"dtype": "uint16"}, [], "trained on uint16"),
        ("geodeep", {"dtype": "uint16"}, [], "trained on uint16"),
        ("deepness", {"gsd_m": None}, [], "--resolution"),
        ("onnx", {}, ["--tile", "50"], "a multiple of 32, such as 32"),
        ("pytorch", {}, [], "choose onnx"),
        ("stac-mlm", {}, ["--tile", "64"], "Leave out --tile"),
    ],
)
def test_what_a_target_cannot_do_is_refused(
    tmp_path: Path,
    target: str,
    changes: dict[str, Any],
    extra: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = write_network(tmp_path, **changes)
    assert run(["export", str(model), "--for", target, *extra]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_four_bands_are_refused_for_geodeep_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    four = {"bands": ("red", "green", "blue", "nir"), "scale": (1 / 255,) * 4, "offset": (0.0,) * 4}
    model = write_network(tmp_path, **four)
    assert run(["export", str(model), "--for", "geodeep", "--tile", str(SIDE)]) == 2
    assert "exactly three bands" in capsys.readouterr().err
    assert run(["export", str(model), "--for", "deepness", "--tile", str(SIDE)]) == 0


def test_existing_file_is_kept_unless_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, output = write_network(tmp_path), tmp_path / "model.onnx"
    output.write_text("mine")
    assert run(["export", str(model), "--tile", str(SIDE)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert run(["export", str(model), "--tile", str(SIDE), "--overwrite"]) == 0


def test_scene_of_check_is_never_replaced_and_is_opened_before_anything_is_written(
    tmp_path: Path, scene: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, command = scene.read_bytes(), ["export", str(write_network(tmp_path)), "--tile", str(SIDE), "--check"]
    assert run([*command, str(scene), "-o", str(scene), "--overwrite"]) == 2
    assert "would replace the input" in capsys.readouterr().err
    assert scene.read_bytes() == before
    assert run([*command, str(tmp_path / "missing.tif"), "-o", str(tmp_path / "out.onnx")]) == 4
    assert not (tmp_path / "out.onnx").exists()


def test_missing_package_is_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert run(["export", str(write_network(tmp_path)), "--tile", str(SIDE)]) == 6
    assert "rsseg[onnx]" in capsys.readouterr().err


def test_stac_item_is_valid(tmp_path: Path) -> None:
    schema = pytest.importorskip("stac_model.schema")
    pystac = pytest.importorskip("pystac")
    model = write_network(tmp_path)
    assert run(["export", str(model), "--for", "stac-mlm"]) == 0
    item = json.loads((tmp_path / "model.stac.json").read_text())
    found = pystac.Item.from_dict(item)
    properties = schema.MLModelProperties.model_validate(item["properties"])
    assert [task.value if hasattr(task, "value") else task for task in properties.tasks] == ["semantic-segmentation"]
    assert properties.input[0].input.dim_order == ["batch", "bands", "height", "width"]
    assert [c.value for c in properties.output[0].classes] == [c.value for c in make_task(classes=4).classes]
    assert "mlm:model" in found.assets["weights"].roles
    assert found.assets["weights"].href == "./model.safetensors"
    assert item["stac_extensions"][0].endswith("/mlm/v1.5.2/schema.json")


# geodeep pads with zeros and has other tiles: an untrained network sees these wherever there is more than one.
@pytest.mark.parametrize(("height", "width", "share"), [(192, 192, 0.999), (400, 480, 0.8)])
def test_geodeep_gives_the_classes_of_rsseg(tmp_path: Path, height: int, width: int, share: float) -> None:
    command = shutil.which("geodeep") or shutil.which("geodeep", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("geodeep is not installed")
    half_meter = rasterio.Affine(0.5, 0, 500000, 0, -0.5, 4000000)
    scene = write_tif(tmp_path / "scene.tif", patches(height, width), transform=half_meter)
    model = write_network(tmp_path)
    assert run(["export", str(model), "--for", "geodeep", "--tile", "192"]) == 0
    theirs = [command, str(scene), str(tmp_path / "model.onnx"), "-t", "mask", "-o", str(tmp_path / "theirs.tif"), "-q"]
    subprocess.run(theirs, check=True)
    ours = ["predict", str(scene), "--model", str(model), "-o", str(tmp_path / "ours.tif"), "--tile", "192"]
    assert run([*ours, "--dtype", "float32"]) == 0
    found, expected = (rasterio.open(tmp_path / name).read(1) for name in ("theirs.tif", "ours.tif"))
    values = np.array([c.value for c in make_task(classes=4).classes], np.uint8)[found]
    assert (values == cv2.medianBlur(expected, 5)).mean() > share  # geodeep filters its classes
