"""The accuracy benchmark: cells and their keys, choice of the rate, page and CSV from results."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.accuracy import jobs, report
from benchmarks.accuracy.run import Ready, Table, run_table
from benchmarks.accuracy.table import PROFILES, SETTINGS, Arm
from rsseg.recipe import load_recipe

ARMS = {arm.name: arm for setting in SETTINGS.values() for arm in setting.arms}
DEMO = SETTINGS["demo-4"]
QUICK = PROFILES["quick"]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "digest.txt").write_text("abc")
    return folder


def job_of(dataset: Path, arm: str = "mini-plain", **changes: Any) -> jobs.Job:
    values = {"seed": 0, "rate": 1.0, "score": True, "weights": None} | changes
    profile, output = values.pop("profile", QUICK), values.pop("output", Path("out"))
    return jobs.make_job(DEMO, ARMS[arm], profile, dataset, output, **values)


def table_of(dataset: Path, output: Path) -> Table:
    table = Table(replace(QUICK, settings=()), data=None, weights=None, output=output)
    table.ready = [Ready(DEMO, dataset, DEMO.arms)]
    return table


def finish(job: jobs.Job, miou: float = 0.5, **more: Any) -> None:
    facts = {"setting": job.setting.name, "arm": job.arm.name, "title": job.recipe.title, "seed": job.seed}
    facts |= {"rate": job.rate, "lr": job.recipe.optimizers["main"].lr, "score": job.score, "code": "c0de"}
    facts |= {"val_miou": miou, "method": job.recipe.method, "curve": [[4, miou]], "cpu_seconds": 60.0}
    if job.score:
        facts |= {"test": {"miou": miou, "mf1": miou, "oa": miou}, "test_iou": {"a": miou, "b": None}}
        facts |= {"parameters": 1_000_000, "megapixels_per_s": 2.0, "processor": "a CPU"}
    job.folder.mkdir(parents=True)
    job.result.write_text(json.dumps(facts | more))


@pytest.mark.parametrize("arm", ARMS.values(), ids=lambda arm: arm.name)
def test_every_arm_has_a_recipe_of_its_name_and_a_plain_arm_beside_it(arm: Arm) -> None:
    recipe = load_recipe(str(arm.recipe))
    assert recipe.name == arm.name
    assert recipe.title
    for setting in SETTINGS.values():
        names = [other.name for other in setting.arms]
        assert arm.name not in names or arm.plain is None or arm.plain in names
    assert arm.plain is None or load_recipe(str(ARMS[arm.plain].recipe)).method == "supervised"


def test_every_arm_of_a_table_trains_equally_long_on_equal_crops(dataset: Path) -> None:
    recipes = [job_of(dataset, arm.name).recipe for arm in DEMO.arms]
    assert len({(r.trainer.steps, r.trainer.batch_size, r.data.augment.model_dump_json()) for r in recipes}) == 1
    assert {r.data.streams["labeled"].count for r in recipes} == {4}


def test_key_changes_with_recipe_data_and_code_but_not_with_the_place(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = job_of(dataset).folder.name
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "digest.txt").write_text("abc")
    assert job_of(elsewhere).folder.name == key
    assert job_of(dataset, rate=3.0).folder.name != key
    assert job_of(dataset, profile=replace(QUICK, steps=9)).folder.name != key
    monkeypatch.setattr(jobs, "code_version", lambda: "other")
    assert job_of(dataset).folder.name.rpartition("-")[0] == key.rpartition("-")[0]
    assert job_of(dataset).folder.name != key
    monkeypatch.undo()
    (dataset / "digest.txt").write_text("abd")
    assert job_of(dataset).folder.name != key


def test_result_of_another_version_of_the_code_counts_only_if_that_is_wanted(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = job_of(dataset, output=tmp_path)
    finish(before)
    monkeypatch.setattr(jobs, "code_version", lambda: "other")
    assert not job_of(dataset, output=tmp_path).result.is_file()
    assert job_of(dataset, output=tmp_path, any_code=True).folder == before.folder


def test_weights_come_from_the_folder_and_their_content_is_in_the_key(dataset: Path, tmp_path: Path) -> None:
    def key(folder: str, content: int) -> str:
        place = tmp_path / folder
        place.mkdir()
        save_file({"x": torch.full((3,), float(content))}, place / "tf_efficientnet_lite0.safetensors")
        job = job_of(dataset, "lite0-plain", weights=place)
        assert job.recipe.backbone.weights == str(place / "tf_efficientnet_lite0.safetensors")
        return job.folder.name

    assert key("one", 1) == key("two", 1)
    assert key("three", 2) != key("four", 1)


def test_arm_without_weights_is_left_out_with_a_reason(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(dataset))
    assert "tf_efficientnet_lite0" in str(jobs.missing_weights(DEMO, ARMS["lite0-plain"], QUICK, dataset, None))
    assert jobs.missing_weights(DEMO, ARMS["mini-plain"], QUICK, dataset, None) is None


def test_setting_without_images_is_left_out_with_a_reason(tmp_path: Path) -> None:
    table = Table(replace(QUICK, settings=("dubai-10",)), data=tmp_path, weights=None, output=tmp_path / "out")
    assert table.ready == []
    assert "the images are not here" in table.left_out[0]


def test_cell_waits_for_its_sweep_and_takes_the_rate_that_validated_best(dataset: Path, tmp_path: Path) -> None:
    table = table_of(dataset, tmp_path / "out")
    ready, arm, seed = next(table.cells())
    assert {job.score for job in table.pending()} == {False}
    for job in table.sweep(ready, arm):
        assert job is not None
        finish(job, miou=0.1 * job.rate)
    cell = table.cell(ready, arm, seed)
    assert cell is not None
    assert cell.rate == 3.0
    assert cell.recipe.optimizers["main"].lr == pytest.approx(9e-3)
    assert next(table.pending()).folder == cell.folder
    finish(cell)
    assert next(table.pending()).folder != cell.folder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder with a stand-in for weights that are only hashed here."""
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, folder / "tf_efficientnet_lite0.safetensors")
    return folder


def test_arm_with_a_teacher_waits_for_it_and_names_its_model(dataset: Path, weights: Path, tmp_path: Path) -> None:
    taught = replace(ARMS["lite0-taught"], needs=(("task_teacher.model", "mini-plain"),))
    setting = replace(DEMO, arms=(ARMS["mini-plain"], taught))
    table = Table(replace(QUICK, settings=(), rates=(1.0,)), data=None, weights=weights, output=tmp_path / "out")
    table.ready = [Ready(setting, dataset, setting.arms)]
    teacher, *again = table.pending()
    assert {job.folder for job in again} <= {teacher.folder}
    finish(teacher)
    assert list(table.pending()) == []  # scored, but its model was not kept
    teacher.model.touch()
    (job,) = table.pending()
    assert job.recipe.task_teacher.model == teacher.folder / "model.safetensors"
    assert job.recipe.stream_names() == ("labeled",)


def started_table(dataset: Path, output: Path, weights: Path, **changes: Any) -> tuple[Table, Arm, Arm]:
    """`mini-plain`, and `lite0-mtdf-recommended` that starts from it."""
    started = replace(ARMS["lite0-mtdf-recommended"], plain="mini-plain", needs=(("start", "mini-plain"),), long=None)
    setting = replace(DEMO, arms=(ARMS["mini-plain"], started, ARMS["mini-ktda"]))
    table = Table(
        replace(QUICK, settings=(), rates=(1.0,)), data=None, weights=weights, output=output, any_code=True, **changes
    )
    table.ready = [Ready(setting, dataset, setting.arms)]
    return table, ARMS["mini-plain"], started


def test_filter_of_arms_runs_those_and_what_they_need(dataset: Path, weights: Path, tmp_path: Path) -> None:
    changes = {"only_arms": ["lite0-mtdf-recommended"], "only_settings": ["demo-4"]}
    table, plain, started = started_table(dataset, tmp_path / "out", weights, **changes)
    (first,) = table.pending()
    assert first.arm == plain
    finish(first)
    first.model.touch()
    (second,) = table.pending()
    assert second.arm == started
    assert second.recipe.start == first.model
    table.only_seeds = {1}
    assert list(table.pending()) == []
    table.only_seeds, table.only_settings = set(), {"dubai-10"}
    assert list(table.pending()) == []


def test_key_of_a_started_arm_changes_with_its_start_model_only(dataset: Path, weights: Path, tmp_path: Path) -> None:
    def key(folder: str) -> str:
        models = {"start": tmp_path / folder / "model.safetensors"}
        return job_of(dataset, "lite0-mtdf-recommended", weights=weights, models=models).folder.name

    assert key("a/seed0-x") == key("b/seed0-x") != key("a/seed0-y")


def test_cell_whose_model_was_not_kept_is_run_again_where_an_arm_needs_it(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(dataset, output=tmp_path)
    finish(job)
    assert job.done
    monkeypatch.setattr(jobs, "NEEDED", {"mini-plain"})
    assert not job.done
    job.model.touch()
    assert job.done
    failed = job_of(dataset, "mini-ktda", output=tmp_path)
    finish(failed, error="diverged")
    monkeypatch.setattr(jobs, "NEEDED", {"mini-ktda"})
    assert failed.done


def test_long_arm_trains_twice_as_long_at_the_rate_of_its_plain_arm(dataset: Path, tmp_path: Path) -> None:
    long = replace(ARMS["mini-plain"], lengths=2, rate_of="mini-plain", plain="mini-plain")
    table = table_of(dataset, tmp_path / "out")
    ready = table.ready[0]
    for job in table.sweep(ready, ARMS["mini-plain"]):
        assert job is not None
        finish(job, miou=0.1 * job.rate)
    cell = table.cell(ready, long, 0)
    assert cell is not None
    assert (cell.rate, cell.recipe.trainer.steps) == (3.0, 2 * QUICK.steps)


def test_page_gives_the_difference_to_plain_training_of_as_many_steps(
    dataset: Path, weights: Path, tmp_path: Path
) -> None:
    table, plain, started = started_table(dataset, tmp_path / "out", weights)
    ready = replace(table.ready[0], arms=(plain, replace(started, long="mini-ktda"), ARMS["mini-ktda"]))
    table.ready = [ready]
    for arm, miou in zip(ready.arms, (0.5, 0.6, 0.57), strict=True):
        cell = table.cell(ready, arm, 0)
        assert cell is not None
        finish(cell, miou)
        cell.model.touch()
    page = report.write_report(table, tmp_path / "docs").read_text()
    assert (
        "from the plain run: `start` is the model of a small ResNet from scratch, plain (test mIoU 0.500); against"
        in page
    )
    assert "with as many steps in all: +0.030" in page


def test_switch_of_an_arm_stays_in_its_recipe(dataset: Path, weights: Path) -> None:
    switches = ("plain", "class-weights", "dice", "focal", "rare", "strong", "target-statistics")
    recipes = {switch: job_of(dataset, f"lite0-{switch}", weights=weights).recipe for switch in switches}
    unnamed = [recipe.model_copy(update={"name": "", "title": ""}) for recipe in recipes.values()]
    assert len({recipe.model_dump_json() for recipe in unnamed}) == len(switches)
    assert recipes["rare"].data.rare_class_sampling == 0.1
    assert recipes["strong"].data.augment.scale_range == (0.5, 2.0)
    assert recipes["strong"].data.augment.crop_size == recipes["plain"].data.augment.crop_size


def test_page_and_csv_show_every_cell_and_the_paired_difference(dataset: Path, tmp_path: Path) -> None:
    table = table_of(dataset, tmp_path / "out")
    table.profile = replace(table.profile, seeds=(0, 1))
    scores = {"mini-plain": (0.5, 0.6), "mini-ktda": (0.55, 0.61)}
    for ready, arm, seed in table.cells():
        for job in table.sweep(ready, arm):
            if job is not None and not job.result.is_file():
                finish(job)
        cell = table.cell(ready, arm, seed)
        if cell is not None and arm.name in scores:
            finish(cell, scores[arm.name][seed])
        elif cell is not None and seed == 0:
            finish(cell, error="training diverged", test=None)
            (data := json.loads(cell.result.read_text())).pop("test")
            cell.result.write_text(json.dumps(data))
    page = report.write_report(table, tmp_path / "docs").read_text()
    overview, row, *_ = (line for line in page.splitlines() if "KTDA with an UNTRAINED" in line)
    assert overview.endswith("| +0.030 ± 0.028 equal |")
    assert "0.580 ± 0.042" in row
    assert "+0.030 ± 0.028 | equal" in row
    assert "0.550 | 0.610" in row
    assert "Failed: mini-fixmatch, seed 0: training diverged" in page
    assert "- demo-4, mini-fixmatch: seeds 0, 1" in page
    assert "(results/demo-4-seeds.svg)" in page
    assert (tmp_path / "docs" / "results" / "demo-4-curves.svg").is_file()
    rows = list(csv.DictReader((tmp_path / "docs" / "results.csv").open()))
    assert [r["test_miou"] for r in rows if r["arm"] == "mini-plain" and r["score"] == "True"] == ["0.5", "0.6"]
    assert len([r for r in rows if r["score"] == "False"]) == 6


@pytest.mark.parametrize(
    ("plain", "other", "expected"),
    [
        ((0.50, 0.54), (0.60, 0.62), "better"),
        ((0.50, 0.54), (0.40, 0.42), "worse"),
        ((0.50, 0.54), (0.53, 0.55), "equal"),
        ((0.50,), (0.60, 0.62), "-"),
    ],
)
def test_verdict_asks_for_more_than_the_pooled_deviation(
    plain: tuple[float, ...], other: tuple[float, ...], expected: str
) -> None:
    results = [
        {"setting": "s", "arm": arm, "seed": seed, "score": True, "test": {"miou": miou}}
        for arm, scores in (("plain", plain), ("other", other))
        for seed, miou in enumerate(scores)
    ]
    assert report.verdict(results, "s", "other", "plain") == expected


def test_failed_process_leaves_a_result_that_says_so(dataset: Path, tmp_path: Path) -> None:
    table = table_of(dataset, tmp_path / "out")  # the dataset has no index
    table.ready = [replace(table.ready[0], arms=DEMO.arms[:1])]
    table.profile = replace(table.profile, rates=(1.0,))
    said: list[str] = []
    run_table(table, jobs=1, hours=0.1, threads=1, say=lambda text, **_: said.append(text))
    assert len(said) == 1
    assert "no prepared dataset" in said[0] or "index" in said[0]
