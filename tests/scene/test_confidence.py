"""Temperatures in confidences and probabilities, and pixels without a sure class."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio

from rsseg.checkpoint import Calibration, read_header, write_model
from rsseg.cli import run
from rsseg.errors import UsageError
from rsseg.inference.network import load_segmenter
from rsseg.scene.predict import predict_scene
from tests.conftest import write_tif
from tests.scene.helpers import options, random_pixels, read_classes, write_tiny_model
from tests.toys import ConvSegmenter, make_task


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    return write_tif(tmp_path / "scene.tif", random_pixels(70, 90))


def probabilities(path: Path) -> np.ndarray:
    with rasterio.open(path) as dataset:
        return dataset.read()


@pytest.mark.parametrize("blend", ["crop", "hann"])
def test_temperature_changes_probabilities_and_no_class(scene: Path, tmp_path: Path, blend: str) -> None:
    segmenter = ConvSegmenter(make_task())
    wanted = options(probabilities="float16", confidence=True, blend=blend)
    predict_scene(segmenter, scene, tmp_path / "raw.tif", wanted)
    number = segmenter.task.num_classes
    segmenter.calibration = Calibration((2.0,) * (number - 1) + (4.0,), "images")
    predict_scene(segmenter, scene, tmp_path / "calm.tif", wanted)
    assert (read_classes(tmp_path / "raw.tif") == read_classes(tmp_path / "calm.tif")).all()
    raw, calm = (probabilities(tmp_path / f"{name}_probabilities.tif") for name in ("raw", "calm"))
    temperature = np.where(raw.argmax(0) == number - 1, 4.0, 2.0)
    expected = raw ** (1 / temperature)
    assert np.abs(expected / expected.sum(0) - calm).max() < 0.003
    assert (calm.argmax(0) == raw.argmax(0)).mean() > 0.99, "up to ties of float16"
    confidence = probabilities(tmp_path / "calm_confidence.tif")[0] / 254
    assert np.abs(confidence - calm.max(0)).max() < 0.004


def test_unsure_pixels_have_no_data_or_the_chosen_class(scene: Path, tmp_path: Path) -> None:
    segmenter = ConvSegmenter(make_task())
    last = segmenter.task.classes[-1]
    predict_scene(segmenter, scene, tmp_path / "all.tif", options(probabilities="float16"))
    bound = float(np.median(probabilities(tmp_path / "all_probabilities.tif").max(0)))
    result = predict_scene(segmenter, scene, tmp_path / "sure.tif", options(min_confidence=bound, confidence=True))
    given = options(min_confidence=bound, unsure_class=last.name)
    predict_scene(segmenter, scene, tmp_path / "named.tif", given)
    every, sure, named = (read_classes(tmp_path / f"{name}.tif") for name in ("all", "sure", "named"))
    assert 0.4 < (sure == 255).mean() < 0.6
    assert (every[sure != 255] == sure[sure != 255]).all()
    assert (named[sure == 255] == last.value).all()
    assert (named[sure != 255] == sure[sure != 255]).all()
    assert result.valid_share == pytest.approx((sure != 255).mean())
    assert sum(area.pixels for area in result.areas) == (sure != 255).sum()
    assert (probabilities(tmp_path / "sure_confidence.tif")[0] != 255).all(), "known also where the class is not"


def test_skipping_knows_the_temperature(scene: Path, tmp_path: Path) -> None:
    from rsseg.scene.memory import prepare_network
    from rsseg.scene.plan import prepare_scene

    segmenter = ConvSegmenter(make_task())
    kept = []
    for temperature in (None, 1.5, 2.0):
        number = segmenter.task.num_classes
        segmenter.calibration = None if temperature is None else Calibration((temperature,) * number, "images")
        for wanted in (options(), options(confidence=True), options(min_confidence=0.5)):
            prepared = prepare_scene(prepare_network(segmenter, wanted), scene, tmp_path / "out.tif", wanted)
            kept.append(prepared.identity())
    assert len(set(kept)) == 7, "classes alone do not depend on the temperature"


def test_unknown_or_useless_class_is_refused(scene: Path, tmp_path: Path) -> None:
    segmenter = ConvSegmenter(make_task())
    name = segmenter.task.class_names[0]
    with pytest.raises(UsageError, match="no such class"):
        predict_scene(segmenter, scene, tmp_path / "o.tif", options(min_confidence=0.5, unsure_class="sea"))
    with pytest.raises(UsageError, match="no effect without --min-confidence"):
        predict_scene(segmenter, scene, tmp_path / "o.tif", options(unsure_class=name))


def test_command_says_where_the_temperature_comes_from(
    scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_model(tmp_path)
    command = ["predict", str(scene), "--model", str(model), "--overwrite", "-o", str(tmp_path / "o.tif")]
    assert run([*command, "--confidence"]) == 0
    assert "no temperature" in capsys.readouterr().err
    header, segmenter = read_header(model), load_segmenter(model)
    fitted = {"temperatures": [1.7] * header.task.num_classes, "fitted_on": "these images; the source domain"}
    write_model(model, segmenter.state_dict(), replace(header, training={"calibration": fitted}))
    assert run([*command, "--min-confidence", "0.4"]) == 0
    assert "temperature 1.7, fitted on these images; the source domain" in " ".join(capsys.readouterr().err.split())
    assert run(command) == 0
    assert "temperature" not in capsys.readouterr().err
    assert run([*command, "--min-confidence", "1.5"]) == 2
    assert "--min-confidence 1.5" in capsys.readouterr().err
