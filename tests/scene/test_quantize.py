"""`eval --engine`, and int8 in `eval` and `predict`: classes, loss, cache and errors."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsseg.cli import run
from rsseg.config import EvalConfig
from rsseg.data.index import IndexItem, LabelMap, SegmentationIndex
from rsseg.evaluation.model_file import evaluate_model
from rsseg.inference.engines import exported_graph, open_engine
from rsseg.inference.image import predict_image
from rsseg.inference.network import load_segmenter
from tests.conftest import write_png, write_tif
from tests.export.test_export import patches, write_network
from tests.scene.helpers import read_classes
from tests.toys import make_task

ENGINES = {"onnx": "onnxruntime", "openvino": "openvino"}
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    exported_graph(write_network(folder))
    return folder


@pytest.fixture
def model(tmp_path: Path, exported: Path) -> Path:
    """A model in a folder of its own, with the exported graph beside it."""
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    return tmp_path / "model.safetensors"


def predict(model: Path, scene: Path, output: Path, *extra: str) -> np.ndarray:
    assert run(["predict", str(scene), "--model", str(model), "-o", str(output), "--overwrite", *extra]) == 0
    return read_classes(output)


def dataset(folder: Path, masks: list[np.ndarray | None], split: str = "val") -> Path:
    """Images of colour patches; the first has the split `train`."""
    items = []
    for number, mask in enumerate(masks):
        name = f"images/{number}.png"
        write_png(folder / name, patches(96, 128 + 8 * number).transpose(1, 2, 0))
        if mask is not None:
            write_png(folder / f"masks/{number}.png", mask)
        label = None if mask is None else f"masks/{number}.png"
        items.append(IndexItem(image=name, mask=label, split=split if number else "train"))
    task = make_task(classes=4).model_copy(update={"dtype": "uint8", "scale": (1 / 255,) * 3, "offset": (0.0,) * 3})
    labels = LabelMap(values={i: i for i in range(4)} | {255: 255})
    SegmentationIndex(task=task, label_map=labels, items=tuple(items)).save(folder)
    return folder


def labeled(folder: Path, model: Path) -> Path:
    """A dataset whose masks are torch's own classes, so that its mIoU in float32 is 1."""
    network, config = load_segmenter(model), EvalConfig()
    images = [patches(96, 128 + 8 * number).astype(np.float32) / 255 for number in range(3)]
    return dataset(folder, [predict_image(network, image, None, config, device="cpu") for image in images])


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_are_scored_by_the_same_tiles_with_torchs_classes(
    tmp_path: Path, model: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(ENGINES[engine])
    data = labeled(tmp_path / "data", model)
    command = ["eval", "--model", str(model), "--data", str(data), "--split", "val", "--device", "cpu", "--json"]
    capsys.readouterr()
    found = {}
    for name in ("torch", engine):
        assert run([*command, "--engine", name]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    assert (found["torch"]["engine"], found[engine]["engine"]) == ("torch", engine)
    counts = [np.array(found[name]["counts"]) for name in ("torch", engine)]
    assert counts[0].sum() == counts[1].sum() == 96 * (136 + 144)
    # Pixels that moved to another cell of the confusion matrix.
    assert np.abs(counts[0] - counts[1]).sum() / 2 <= 1e-3 * counts[0].sum()
    assert found[engine]["scores"]["oa"] > 0.999


def test_scales_and_mirror_images_are_averaged_by_engines_too(tmp_path: Path, model: Path) -> None:
    ready = open_engine(model, "onnx", "cpu", "float32")
    assert ready is not None
    image = patches(96, 130).astype(np.float32) / 255
    for config in (EvalConfig(flip=True, scales=(0.75, 1.0)), EvalConfig(mode="resized", tile=96)):
        expected = predict_image(load_segmenter(model), image, None, config, device="cpu")
        assert (predict_image(ready.network, image, None, config, device="cpu") == expected).mean() > 0.999


@pytest.mark.parametrize("engine", ENGINES)
def test_int8_is_calibrated_once_and_its_loss_of_miou_is_said(
    tmp_path: Path, model: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(ENGINES[engine])
    data = labeled(tmp_path / "data", model)
    scene = write_tif(tmp_path / "scene.tif", patches(150, 210))
    wide = predict(model, scene, tmp_path / "wide.tif", "--engine", engine)
    int8 = ["--engine", engine, "--quantize", "int8", "--calibrate", str(data)]
    capsys.readouterr()
    narrow = predict(model, scene, tmp_path / "narrow.tif", *int8, "--json")
    captured = capsys.readouterr()
    (result,) = json.loads(captured.out)
    loss = result["quantization"]
    assert (loss["images"], loss["split"], loss["scored"]) == (1, "val", 2)
    assert loss["miou_float32"] > 0.99
    assert 0 < loss["miou_loss"] == loss["miou_float32"] - loss["miou_int8"] < 0.3
    assert f"loss of mIoU {loss['miou_loss']:.4f}" in captured.err
    assert "int8" in captured.err
    assert 0.8 < (narrow == wide).mean() < 1
    graphs = list(tmp_path.glob(".model.safetensors.*.int8-*.onnx"))
    assert len(graphs) == 1
    made = graphs[0].stat().st_mtime_ns
    scored = evaluate_model(model, data=data, split="val", device="cpu", engine=engine, quantize="int8", calibrate=data)
    assert scored.scores.miou == pytest.approx(loss["miou_int8"])
    assert scored.quantization is not None
    assert graphs[0].stat().st_mtime_ns == made
    # Other calibration images are another network.
    Image.fromarray(np.zeros((96, 128, 3), np.uint8)).save(data / "images" / "0.png")
    predict(model, scene, tmp_path / "other.tif", *int8)
    assert len(list(tmp_path.glob(".model.safetensors.*.int8-*.onnx"))) == 2


def test_later_int8_calls_import_neither_torch_nor_the_quantizer(tmp_path: Path, model: Path) -> None:
    data, scene = dataset(tmp_path / "data", [None, None]), write_tif(tmp_path / "scene.tif", patches(64, 64))
    extra = ["--engine", "onnx", "--quantize", "int8", "--calibrate", str(data)]
    first = predict(model, scene, tmp_path / "first.tif", *extra)
    arguments = ["predict", str(scene), "--model", str(model), "-o", str(tmp_path / "again.tif"), *extra]
    code = (
        f"import sys; from rsseg.cli import run; assert run({arguments!r}) == 0; "
        "sys.exit(', '.join({'torch', 'timm', 'onnx'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (read_classes(tmp_path / "again.tif") == first).all()
    assert "loss of mIoU not measured: the dataset has no labels" in result.stderr


def test_loss_is_not_measured_with_labels_of_other_classes(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, scene = dataset(tmp_path / "data", [np.zeros((96, 128), np.uint8)]), tmp_path / "scene.tif"
    index = SegmentationIndex.load(data)
    renamed = (index.task.classes[0].model_copy(update={"name": "moor"}), *index.task.classes[1:])
    index.model_copy(update={"task": index.task.model_copy(update={"classes": renamed})}).save(data)
    write_tif(scene, patches(64, 64))
    predict(model, scene, tmp_path / "out.tif", "--engine", "onnx", "--quantize", "int8", "--calibrate", str(data))
    assert "loss of mIoU not measured" in (error := capsys.readouterr().err)
    assert "moor" in error


@pytest.mark.parametrize("command", ["predict", "eval"])
@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [
        (["--quantize", "int8", "--calibrate", "DATA"], 2, "not computed by torch"),
        (["--quantize", "int8", "--engine", "onnx"], 2, "give --calibrate DATASET"),
        (["--calibrate", "DATA"], 2, "has no effect without --quantize int8"),
        (["--quantize", "int4", "--engine", "onnx", "--calibrate", "DATA"], 2, "--quantize int4"),
        (["--engine", "tensorrt"], 2, "--engine tensorrt"),
        (["--quantize", "int8", "--engine", "onnx", "--calibrate", "EMPTY"], 4, "has no images"),
        (["--quantize", "int8", "--engine", "onnx", "--calibrate", "absent"], 4, "no prepared dataset"),
        (["--quantize", "int8", "--engine", "onnx", "--calibrate", "GRAY"], 4, "needs the band"),
        (["--quantize", "int8", "--engine", "onnx", "--calibrate", "GONE"], 4, "No such file"),
    ],
)
def test_int8_that_cannot_be_computed_is_a_message(
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    extra: list[str],
    code: int,
    message: str,
) -> None:
    data = dataset(tmp_path / "data", [None])
    index = SegmentationIndex.load(data)
    index.model_copy(update={"items": ()}).save(tmp_path / "empty")
    bands = index.task.model_copy(update={"bands": ("a", "b", "c")})
    index.model_copy(update={"task": bands}).save(tmp_path / "gray")
    index.save(tmp_path / "gone")
    places = {"DATA": "data", "EMPTY": "empty", "GRAY": "gray", "GONE": "gone"}
    extra = [str(tmp_path / places[part]) if part in places else part for part in extra]
    scene = write_tif(tmp_path / "scene.tif", patches(64, 64))
    inputs = [str(scene), "-o", str(tmp_path / "out.tif")] if command == "predict" else ["--data", str(data)]
    assert run([command, *inputs, "--model", str(model), *extra]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.tif").exists()
