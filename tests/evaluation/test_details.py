"""Scores per image, domain and scene; boundary IoU; bootstrap intervals; calibration."""

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from rsseg.checkpoint import read_header, write_model
from rsseg.cli import run
from rsseg.evaluation.calibration import PixelSample, fit_temperatures, sample_positions, score_calibration
from rsseg.evaluation.details import Scorer, boundary_labels, count_boundaries, details_of, paired_differences
from rsseg.evaluation.model import choose_examples
from rsseg.evaluation.result import load_evaluation
from rsseg.inference.network import load_segmenter
from rsseg.metrics import scores
from rsseg.runs import RunFolder
from rsseg.training.progress import Progress
from rsseg.training.run import train
from tests.conftest import write_png
from tests.training.recipes import tiny_recipe
from tests.training.test_dasegnet_run import recipe_for

NAMES = ("background", "road", "water")


def blocks(seed: int, side: int = 40) -> NDArray[np.uint8]:
    classes = np.random.default_rng(seed).integers(0, 3, (5, 5), np.uint8)
    return np.repeat(np.repeat(classes, side // 5, 0), side // 5, 1)


def published_boundary(mask: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """Pixels of a mask that `width` erosions by 3 x 3 remove; the border of the image removes none."""
    kept = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=width)
    return mask & (kept == 0)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_boundary_iou_equals_the_published_definition_per_class(width: int) -> None:
    truth, predicted = blocks(1), np.roll(blocks(1), (2, 1), (0, 1))
    counts = count_boundaries(predicted, truth, width, 3)
    measured = [c.iou for c in scores(counts, (*NAMES, "inside")).classes][:3]
    expected = []
    for k in range(3):
        ours, theirs = published_boundary(predicted == k, width), published_boundary(truth == k, width)
        expected.append((ours & theirs).sum() / (ours | theirs).sum())
    assert measured == pytest.approx(expected)


def test_unlabeled_pixels_and_image_borders_are_no_boundary() -> None:
    classes = np.ones((12, 12), np.uint8)
    labeled = np.ones((12, 12), np.bool_)
    labeled[4:8, 4:8] = False
    classes[~labeled] = 0
    assert (boundary_labels(classes, labeled, 2, 3)[labeled] == 3).all()
    classes[0, 0] = 2
    marked = boundary_labels(classes, labeled, 2, 3)
    assert (marked != 3)[labeled].sum() == 9


def matrices(images: int) -> NDArray[np.int64]:
    return np.random.default_rng(4).integers(0, 50, (images, 4, 3))


def test_groups_are_sums_of_their_images() -> None:
    counts = matrices(6)
    items = [(f"i{n}", f"s{n // 2}", "north" if n < 3 else None) for n in range(6)]
    details = details_of(items, counts, None, Scorer(NAMES, (), None), width=0, seed=0)
    assert [(g.name, g.images) for g in details.scenes] == [("s0", 2), ("s1", 2), ("s2", 2)]
    assert [(g.name, g.images) for g in details.domains] == [("None", 3), ("north", 3)]
    assert details.scenes[1].scores == scores(counts[2:4].sum(0), NAMES)
    assert details.images[5].miou == scores(counts[5], NAMES).miou
    assert "3 scenes" in details.bootstrap


def test_background_is_left_out_of_a_second_mean_only() -> None:
    counts = matrices(2)
    details = details_of([("a", None, None), ("b", None, None)], counts, None, Scorer(NAMES, (), None), width=0, seed=0)
    whole = scores(counts.sum(0), NAMES)
    assert details.background == ("background",)
    assert details.miou_without_background == pytest.approx((whole.classes[1].iou + whole.classes[2].iou) / 2)


def test_interval_is_over_scenes_not_over_images() -> None:
    """Twenty equal images of one of two scenes do not make the interval narrower."""
    good, bad = np.diag([90, 90, 90]), np.full((3, 3), 30)
    counts = np.stack([np.vstack([m, np.zeros((1, 3))]) for m in (good, bad)]).astype(np.int64)
    two = details_of([("a", None, None), ("b", None, None)], counts, None, Scorer(NAMES, (), None), width=0, seed=1)
    items = [(f"{n}", "a" if n < 20 else "b", None) for n in range(40)]
    many = details_of(items, np.repeat(counts, 20, 0), None, Scorer(NAMES, (), None), width=0, seed=1)
    assert many.intervals["miou"] == two.intervals["miou"]
    assert two.intervals["miou"].low == pytest.approx(0.2)
    assert two.intervals["miou"].high == 1
    assert details_of(items[:1], counts[:1], None, Scorer(NAMES, (), None), width=0, seed=1).intervals == {}


def test_paired_difference_of_equal_runs_is_zero_and_of_better_ones_is_not() -> None:
    items: list[tuple[str, None, None]] = [(f"{n}", None, None) for n in range(8)]
    counts = matrices(8)
    better = counts + 20 * np.vstack([np.eye(3, dtype=np.int64), np.zeros((1, 3), np.int64)])
    a, b = (details_of(items, m, None, Scorer(NAMES, (), None), width=0, seed=0).images for m in (counts, better))

    same = paired_differences(a, a[::-1], Scorer(NAMES, (), None))["miou"]
    assert same.difference == 0
    assert same.interval is not None
    assert same.interval.low == same.interval.high == 0
    gain = paired_differences(a, b, Scorer(NAMES, (), None))["miou"]
    assert gain.interval is not None
    assert gain.difference is not None
    assert 0 < gain.interval.low < gain.difference < gain.interval.high


def sharp_sample(factor: float, pixels: int = 20_000) -> PixelSample:
    """Labels drawn from softmax(z); the network states softmax(factor * z)."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (pixels, 3))
    true = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = (rng.random((pixels, 1)) > true.cumsum(1)).sum(1)
    stated = np.exp(factor * logits)
    return PixelSample((stated / stated.sum(1, keepdims=True)).astype(np.float32), truth)


@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_fit_finds_the_temperature_that_labels_were_drawn_with(factor: float) -> None:
    sample = sharp_sample(factor)
    (temperature, *_) = temperatures = fit_temperatures(sample)
    assert temperature == pytest.approx(factor, rel=0.05)
    found = score_calibration(sample, temperatures)
    assert found.after is not None
    assert found.after.ece is not None
    assert found.after.ece < 0.015
    if factor != 1:
        assert found.before.ece is not None
        assert found.before.ece > 4 * found.after.ece
    assert sum(b.pixels for b in found.after.bins) == 20_000


def test_temperatures_per_class_fit_each_predicted_class() -> None:
    first, second = sharp_sample(1.0), sharp_sample(3.0)
    keep_a, keep_b = first.predicted == 0, second.predicted != 0
    mixed = PixelSample(
        np.concatenate([first.probabilities[keep_a], second.probabilities[keep_b]]),
        np.concatenate([first.truth[keep_a], second.truth[keep_b]]),
    )
    assert fit_temperatures(mixed, per_class=True) == pytest.approx((1, 3, 3), rel=0.1)


def test_degenerate_samples_have_bounded_temperatures() -> None:
    certain = np.tile(np.array([[0.9, 0.1]], np.float32), (50, 1))
    assert fit_temperatures(PixelSample(certain, np.zeros(50, np.int64))) == pytest.approx((0.05, 0.05), rel=1e-3)
    assert fit_temperatures(PixelSample(certain, np.ones(50, np.int64))) == pytest.approx((20, 20), rel=1e-3)
    assert fit_temperatures(PixelSample(np.ones((50, 1), np.float32), np.zeros(50, np.int64)))[0] > 0


def test_sample_is_seeded_and_labeled() -> None:
    mask = np.random.default_rng(0).integers(0, 6, (90, 90), np.uint8)
    mask[mask > 2] = 255
    at = sample_positions(mask, 3, 1000, (1, 2))
    assert (at == sample_positions(mask, 3, 1000, (1, 2))).all()
    assert (mask.ravel()[at] < 3).all()
    assert len(at) == 300
    assert (np.diff(at) > 0).all()


def test_examples_are_the_extremes_and_the_middle_without_repeats() -> None:
    found = choose_examples([n / 20 for n in range(20)] + [None])
    assert [number for name, number in found if name.startswith("best")] == [19, 18, 17]
    assert [number for name, number in found if name.startswith("worst")] == [0, 1, 2]
    assert [number for name, number in found if name.startswith("median")] == [8, 9, 10]
    for count in range(9):
        numbers = [number for _, number in choose_examples([0.5] * count)]
        assert len(numbers) == len(set(numbers))
        assert bool(numbers) == bool(count)


@pytest.fixture
def finished(rgb_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe(rgb_dataset, trainer={"steps": 3})
    return RunFolder(train(recipe, output=tmp_path / "runs", progress=Progress()).run)


def test_training_calibrates_the_shipped_model_and_keeps_its_evaluation(finished: RunFolder) -> None:
    result = load_evaluation(finished.evaluation("val"))
    assert result.details is not None
    calibration = result.details.calibration
    assert calibration is not None
    assert calibration.fitted_here
    segmenter = load_segmenter(finished.model)
    assert segmenter.calibration is not None
    assert segmenter.calibration.temperatures == calibration.temperatures
    assert "split val" in segmenter.calibration.fitted_on
    assert "source" not in segmenter.calibration.fitted_on
    assert len(result.details.images) == 2
    assert {file.name for file in finished.evaluation("val").with_suffix("").glob("worst-1*")} == {
        "worst-1-input.jpg",
        "worst-1-truth.png",
        "worst-1-prediction.png",
        "worst-1-error.png",
    }


@pytest.mark.parametrize("choice", ["none", "per_class"])
def test_calibration_is_a_switch_of_the_recipe(
    rgb_dataset: Path, tmp_path: Path, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(sample: PixelSample, *, per_class: bool) -> tuple[float, ...]:
        return (1.0, 2.0, 3.0) if per_class else (2.0,) * 3

    monkeypatch.setattr("rsseg.evaluation.model.fit_temperatures", fit)
    recipe = tiny_recipe(rgb_dataset, trainer={"steps": 1}, eval={"calibrate": choice})
    segmenter = load_segmenter(train(recipe, output=tmp_path, progress=Progress()).model)
    if choice == "none":
        assert segmenter.calibration is None
    else:
        assert segmenter.calibration is not None
        assert segmenter.calibration.temperatures == (1, 2, 3)


def test_eval_writes_images_groups_and_keeps_the_result(
    finished: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "--split", "train", "--per-image", "scores.csv", "--by", "domain", "--background", "road"]
    assert run(command) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "boundary mIoU (2 px)" in said
    assert "mIoU without road" in said
    assert "north" in said
    with Path("scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    assert {"image", "scene", "domain", "pixels", "miou", "boundary_miou", "iou_water"} <= set(rows[0])
    kept = load_evaluation(finished.evaluation("train"))
    assert kept.details is not None
    assert float(rows[0]["miou"]) == pytest.approx(kept.details.images[0].miou)
    summed = np.sum([image.counts for image in kept.details.images], axis=0)
    assert tuple(map(tuple, summed.tolist())) == kept.counts
    assert run(command) == 2, "scores.csv exists"
    assert run([*command, "--overwrite"]) == 0


def test_eval_of_rasters_has_rows_and_an_interval_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        write_png(tmp_path / "truth" / f"{number}.png", blocks(number))
        write_png(tmp_path / "pred" / f"{number}.png", np.roll(blocks(number), number, 0))
    folders = ["--pred", str(tmp_path / "pred"), "--truth", str(tmp_path / "truth")]
    assert run(["eval", *folders, "--per-image", str(tmp_path / "new" / "s.csv"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["details"]["images"][0]["oa"] == 1
    assert set(result["details"]["intervals"]) >= {"miou", "oa", "iou_1"}
    assert (tmp_path / "new" / "s.csv").read_text().count("\n") == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--by", "tile"], "choose domain or scene"),
        (["--background", "sea"], "no such class"),
        (["--pred", "a", "--truth", "b", "--boundary-width", "2"], "not measured between class rasters"),
        (["--pred", "a", "--truth", "b", "--model", "m"], "--model: has no effect on --pred and --truth"),
    ],
)
def test_wrong_options_are_refused(
    finished: RunFolder, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", "--split", "val", *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_damaged_calibration_is_refused(finished: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    header = read_header(finished.model)
    tensors = load_segmenter(finished.model).state_dict()
    for damaged in ({"temperatures": [1.0], "fitted_on": ""}, {"temperatures": [1, 0, -1], "fitted_on": ""}, 7):
        header.training["calibration"] = damaged
        write_model(finished.model, tensors, header)
        assert run(["eval", "--split", "val"]) == 5
        assert "damaged header: calibration" in capsys.readouterr().err


@pytest.mark.parametrize(("domain", "elsewhere"), [("south", True), ("north", False)])
def test_calibration_on_the_source_of_an_adaptation_is_said(
    rgb_dataset: Path, tmp_path: Path, domain: str, elsewhere: bool
) -> None:
    result = train(recipe_for(rgb_dataset, val=domain, trainer={"steps": 1}), output=tmp_path, progress=Progress())
    calibration = load_segmenter(result.model).calibration
    assert calibration is not None
    assert ("the source domain" in calibration.fitted_on) == elsewhere
    assert f"domain {domain}" in calibration.fitted_on
