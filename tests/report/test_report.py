"""The report of a run and the comparison of several, through the command line."""

import base64
import io
import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import rasterio
import yaml
from PIL import Image

from rsseg.cli import run
from rsseg.evaluation.assessment import Sample, Strata, assess
from rsseg.evaluation.details import Scorer, details_of
from rsseg.evaluation.result import Evaluation, load_evaluation, save_evaluation
from rsseg.inference.network import load_segmenter
from rsseg.report.figures import line_chart
from rsseg.report.page import write_report
from rsseg.runs import RunFolder
from rsseg.training.progress import Progress
from rsseg.training.run import train
from tests.conftest import write_tif
from tests.training.recipes import tiny_recipe, tiny_values

VOID = {"meta", "img", "br", "link", "input", "hr", "wbr"}


class Page(HTMLParser):
    """Text of the cells of each table, addresses that the page loads, and whether its tags match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.rows: list[list[str]] = []
        self.balanced = True
        self.feed(text)
        self.balanced &= not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [str(value) for key, value in attrs if key in ("src", "href", "xlink:href", "srcset")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.balanced &= bool(self.open) and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and any(tag in ("td", "th") for tag in self.open):
            self.rows[-1][-1] += data


@pytest.fixture
def finished(rgb_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.chdir(tmp_path)
    return RunFolder(train(tiny_recipe(rgb_dataset), output=tmp_path / "runs", progress=Progress()).run)


def test_training_ends_with_a_report(rgb_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(tiny_values(rgb_dataset) | {"trainer": {"steps": 1, "workers": 0}}))
    assert run(["train", "--recipe", "tiny.yaml"]) == 0
    (report,) = Path("runs").glob("*_001/report.html")
    assert "no independent test" in report.read_text()


def test_report_is_one_file_with_the_scores_of_the_evaluation(
    finished: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", "--model", str(finished.path)]) == 0
    capsys.readouterr()
    assert run(["report", str(finished.path)]) == 0
    file = Path(capsys.readouterr().out.strip())
    assert file == finished.path / "report.html"
    text = file.read_text(encoding="utf-8")
    page, result = Page(text), load_evaluation(finished.evaluation("test"))
    assert page.balanced
    assert all(address.startswith(("data:", "#")) for address in page.loads)
    assert "@import" not in text
    assert "url(http" not in text
    names = [c.name for c in result.scores.classes]
    for name, counts in zip(names, result.counts, strict=False):
        row = next(row for row in page.rows if row and row[0] == name and "%" in row[1])
        shown = [int(re.sub(r"\s", "", cell.partition("%")[2])) for cell in row[1 : 1 + len(names)]]
        assert shown == list(counts)
        assert row[1].startswith(f"{100 * counts[0] / max(sum(counts), 1):.1f} %")
    assert f"{result.scores.miou:.3f}" in text
    assert "no independent test" not in text
    for heading in ("Curves", "Confusion matrix", "worst images", "Calibration", "Time and memory", "Commands"):
        assert heading in text
    assert "rsseg train --recipe" in text
    assert text.count("<svg") >= 4
    assert text.count("data:image/jpeg") == len(result.details.examples)
    assert text.count("data:image/png") == 3 * len(result.details.examples)


def test_report_shows_a_predicted_scene_and_an_assessment(
    finished: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(5)
    pixels = rng.integers(1, 255, (3, 90, 120)).astype(np.uint8)
    pixels[:, :30] = 0
    scene = write_tif(tmp_path / "scenes <1>.tif", pixels, crs="EPSG:32631", nodata=0)
    sample = Sample(
        stratum=np.repeat(np.arange(3), 60), mapped=np.repeat(np.arange(3), 60),
        truth=np.where(np.arange(180) % 10 == 0, 2, np.repeat(np.arange(3), 60)), area=np.ones(180),
    )  # fmt: skip
    classes = ("field", "road", "water")
    result = assess(
        sample, Strata(classes, (5000, 3000, 2000)), classes, mapped_shares=(0.5, 0.3, 0.2), total_ha=1234.5
    )
    Path("assessment.json").write_text(result.model_dump_json())
    before = set(finished.path.rglob("*"))
    command = ["report", str(finished.path), "--scene", str(scene), "--assessment", "assessment.json"]
    assert run([*command, "--device", "cpu"]) == 0
    text = (finished.path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.balanced
    assert all(address.startswith(("data:", "#")) for address in page.loads)
    assert set(finished.path.rglob("*")) - before == {finished.path / "report.html"}, "the class raster is not kept"

    picture, classes_picture = (
        Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        for uri in re.findall(r'<img src="([^"]+)" alt="(?:input|prediction) of [^"]*scenes &lt;1&gt;', text)
    )
    assert picture.size == classes_picture.size == (120, 90)
    shown = {tuple(color) for color in np.asarray(classes_picture.convert("RGB"))[30:].reshape(-1, 3)}
    task = load_segmenter(finished.path).task
    assert shown <= {info.color for info in task.classes}
    assert np.asarray(classes_picture.convert("RGB"))[:30].reshape(-1, 3).tolist() == [[168, 173, 181]] * (30 * 120)
    with rasterio.open(run_predict(finished, scene, tmp_path)) as file:
        counts = [int((file.read(1) == info.value).sum()) for info in task.classes]
    listed = {row[0]: int(re.sub(r"\s", "", row[3])) for row in page.rows if len(row) == 4 and row[1].endswith("%")}
    assert listed == dict(zip(classes, counts, strict=True))

    row = next(row for row in page.rows if row[0] == "water" and len(row) == 7 and "±" in row[2])
    water = result.classes[2]
    assert row[1] == str(water.points)
    assert row[3] == f"{water.producers_accuracy.value:.3f} ± {water.producers_accuracy.half_width:.3f}"
    assert row[6].startswith(f"{water.area_ha.value:.2f} ± " if water.area_ha and water.area_ha.value else "absent")
    assert f"--assessment {Path('assessment.json')}" in text


def run_predict(finished: RunFolder, scene: Path, folder: Path) -> Path:
    assert run(["predict", str(scene), "--model", str(finished.path), "-o", str(folder / "map.tif")]) == 0
    return folder / "map.tif"


def test_additions_that_cannot_be_shown_are_named(
    finished: RunFolder, better: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*command: str) -> tuple[int, str]:
        return run([*command]), " ".join(capsys.readouterr().err.split())

    path = str(finished.path)
    report = (finished.path / "report.html").read_bytes() if (finished.path / "report.html").exists() else None
    Path("other.json").write_text('{"points": 3}')
    for arguments, expected in (
        (("--assessment", "absent.json"), "absent.json"),
        (("--assessment", "other.json"), "rsseg assess MAP POINTS --json > other.json"),
        (("--scene", "absent.tif"), "absent.tif"),
    ):
        code, text = said("report", path, *arguments)
        assert (code, expected in text) == (4, True), text
    assert said("report", path, str(better.path), "--scene", "absent.tif")[0] == 2
    now = (finished.path / "report.html").read_bytes() if (finished.path / "report.html").exists() else None
    assert now == report


def with_images(finished: RunFolder, number: int, *, name: str = "test", better: bool = False) -> Evaluation:
    """Replace an evaluation by one of many images with random matrices."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 900, (number, 4, 3))
    counts[:, 3] = 0
    if better:
        moved = counts[:, :3] // 2 * (1 - np.eye(3, dtype=np.int64))
        counts[:, :3] -= moved
        counts[:, [0, 1, 2], [0, 1, 2]] += moved.sum(2)
    classes = ("field", "road", "water")
    items = [(f"tiles/<b>{n}</b>.png", f"scene {n // 4}", "north" if n % 2 else "south") for n in range(number)]
    details = details_of(items, counts, None, Scorer(classes, (), None), width=0, seed=0)
    kept = load_evaluation(finished.evaluation("val"))
    assert kept.details is not None
    details = details.model_copy(update={"calibration": kept.details.calibration, "examples": kept.details.examples})
    made = Evaluation.of(counts.sum(0), classes, (), images=number, seconds=1.0).model_copy(update={"details": details})
    save_evaluation(made, finished.evaluation(name))
    return made


def test_report_of_500_images_is_small_fast_and_lists_the_worst_first(finished: RunFolder) -> None:
    made = with_images(finished, 500)
    shutil.copytree(finished.evaluation("val").with_suffix(""), finished.evaluation("test").with_suffix(""))
    started = time.process_time()
    file = write_report(finished)
    assert time.process_time() - started < 10
    assert file.stat().st_size < 15e6
    text = file.read_text()
    assert "<b>7</b>" not in text, "names of files are not markup"
    listed = [row for row in Page(text).rows if row and row[0].startswith("tiles/")]
    assert len(listed) == 500
    assert [float(row[2]) for row in listed] == sorted(float(row[2]) for row in listed)
    assert made.details is not None
    assert listed[0][0] == min(made.details.images, key=lambda image: image.miou or 0).image


def test_run_without_an_evaluation_names_the_command(finished: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(finished.path / "evaluations")
    assert run(["report", str(finished.path)]) == 2
    assert "rsseg eval --model" in " ".join(capsys.readouterr().err.split())


def test_bad_input_is_refused(finished: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*command: str) -> tuple[int, str]:
        code = run([*command])
        return code, " ".join(capsys.readouterr().err.split())

    path = str(finished.path)
    assert said("report", "absent")[0] == 2
    assert said("report", path, "--split", "test")[0] == 2
    assert said("runs", "compare", path)[0] == 2
    assert said("runs", "compare", path, path)[0] == 2
    finished.evaluation("val").write_text("{")
    code, text = said("report", path)
    assert code == 4
    assert "not a readable evaluation" in text


@pytest.fixture
def better(finished: RunFolder) -> RunFolder:
    """A second run that is right more often on the images of the first."""
    copy = RunFolder(finished.path.with_name("better"))
    shutil.copytree(finished.path, copy.path)
    with_images(finished, 24)
    with_images(copy, 24, better=True)
    return copy


def test_runs_are_compared_in_pairs(finished: RunFolder, better: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["runs", "compare", str(finished.path), str(better.path)]) == 0
    captured = capsys.readouterr()
    assert "6 scenes" in captured.err
    line = next(line for line in captured.out.splitlines() if line.strip().startswith("mIoU"))
    first, second, difference = (float(part) for part in line.split()[1:4])
    assert difference == pytest.approx(second - first, abs=1e-4)
    assert difference > 0.05
    assert run(["runs", "compare", str(finished.path), str(better.path), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["split"] == "test"
    interval = values["runs"][1]["differences"]["miou"]["interval"]
    assert 0 < interval["low"] < difference < interval["high"]


def test_comparison_page_shows_differences_and_is_not_overwritten(
    finished: RunFolder, better: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["report", str(finished.path), str(better.path), "-o", "both.html"]
    assert run(command) == 0
    text = Path("both.html").read_text()
    assert "better --split test --output both.html" in text
    page = Page(text)
    assert page.balanced
    assert any(row[0] == "mIoU" and row[3].startswith("+0.") for row in page.rows if len(row) == 5)
    assert run(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run([*command, "--overwrite"]) == 0


def test_runs_on_other_images_are_not_compared(
    finished: RunFolder, better: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    with_images(better, 20)
    assert run(["runs", "compare", str(finished.path), str(better.path)]) == 4
    assert "same labeled images" in " ".join(capsys.readouterr().err.split())
    assert run(["runs", "compare", str(finished.path), str(better.path), "--split", "south"]) == 2
    assert "--split south" in " ".join(capsys.readouterr().err.split())


def test_charts_take_the_colour_of_the_page_and_names_literally() -> None:
    svg = line_chart({"a $x_1$ <i>": ([1, 2], [0.1, 0.2]), "b": ([1, 2], [1, 2])}, title="Loss", log=True)
    assert "currentColor" in svg
    assert "$x_1$ &lt;i&gt;" in svg
    assert Page(svg).balanced
    assert not re.search(r'<svg[^>]* width="', svg)


def test_long_curves_end_at_their_last_value() -> None:
    n = 1301
    whole, ends = ([*range(n)], [float(i) for i in range(n)]), ([0, n - 1], [0.0, n - 1.0])
    svg = line_chart({"a": whole, "b": ends}, title="Loss")
    paths = re.findall(r'<path d="([^"]*)"[^>]*clip-path', svg)
    assert paths[-1].split()[-2:] == paths[-2].split()[-2:]
