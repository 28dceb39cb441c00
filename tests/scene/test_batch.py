"""Many scenes, and the command line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch

from rsseg.cli import run
from rsseg.data.index import SegmentationIndex
from rsseg.errors import UsageError
from rsseg.methods.base import Segmenter
from rsseg.methods.registry import segmenter_for
from rsseg.recipe import RecipeSource, parse_recipe
from rsseg.scene.batch import JOURNAL, QUARANTINE, Target, choose_targets, find_scenes, predict_scenes
from rsseg.scene.memory import PreparedNetwork, prepare_network
from rsseg.scene.options import Outcome
from rsseg.scene.predict import predict_scene
from tests.conftest import write_tif
from tests.scene.helpers import RECIPE, files_in, options, random_pixels, write_tiny_model
from tests.toys import ConvSegmenter, make_task


@pytest.fixture
def scenes(tmp_path: Path) -> list[Path]:
    return [
        write_tif(tmp_path / "in" / f"{name}.tif", random_pixels(40, 50) // (i + 1)) for i, name in enumerate("abc")
    ]


def ready_for(segmenter: Segmenter) -> PreparedNetwork:
    return prepare_network(segmenter, options())


def statuses(outcomes: list[Outcome]) -> list[str]:
    return [o.status for o in outcomes]


def test_scenes_are_found_in_folders_patterns_and_lists(
    tmp_path: Path, scenes: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [str(s) for s in scenes]
    (tmp_path / "in" / "list.txt").write_text("# two of them\nb.tif\n\nc.tif\n")
    monkeypatch.chdir(tmp_path)
    assert find_scenes([str(tmp_path / "in")]) == names
    assert find_scenes([str(tmp_path / "in" / "[ab].tif"), names[0]]) == names[:2]
    assert find_scenes([str(tmp_path / "in" / "list.txt")]) == names[1:]
    assert find_scenes(["https://host/a?b=*.tif"]) == ["https://host/a?b=*.tif"]
    with pytest.raises(UsageError, match="no file matches"):
        find_scenes(["in/z*.tif"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no raster in this folder"):
        find_scenes(["empty"])


def test_parts_share_the_scenes() -> None:
    names = [f"{i}.tif" for i in range(7)]
    parts = [choose_targets(names, Path("out"), (i, 3)) for i in (1, 2, 3)]
    assert sorted(t.scene for part in parts for t in part) == names
    assert parts[0][0] == Target("0.tif", Path("out/0_rsseg.tif"))
    with pytest.raises(UsageError, match="--part"):
        choose_targets(names, None, (4, 3))
    with pytest.raises(UsageError, match="two scenes"):
        choose_targets(["a/x.tif", "b/x.tif"], None)


def test_broken_scene_does_not_stop_the_rest_and_is_in_the_journal(tmp_path: Path, scenes: list[Path]) -> None:
    scenes[1].write_bytes(scenes[1].read_bytes()[:300])
    targets = choose_targets([str(s) for s in scenes], tmp_path / "out")
    outcomes = list(predict_scenes(ready_for(ConvSegmenter(make_task())), targets, options()))
    assert statuses(outcomes) == ["done", "failed", "done"]
    assert [t.output.exists() for t in targets] == [True, False, True]
    lines = [json.loads(line) for line in (tmp_path / "out" / JOURNAL).read_text().splitlines()]
    assert [line["status"] for line in lines] == ["done", "failed", "done"]
    assert "b.tif" in lines[1]["error"]
    quarantine = tmp_path / "out" / QUARANTINE
    assert find_scenes([str(quarantine)]) == [str(scenes[1])]
    assert quarantine.read_text().startswith("# ")
    write_tif(scenes[1], random_pixels(40, 50))
    again = predict_scenes(ready_for(ConvSegmenter(make_task())), targets, options(), skip_existing=True)
    assert statuses(list(again)) == ["skipped", "done", "skipped"]
    assert not quarantine.exists()


def test_parts_that_share_a_folder_keep_the_failed_scenes_of_one_another_in_the_list(
    tmp_path: Path, scenes: list[Path]
) -> None:
    names = [str(scene) for scene in (*scenes, write_tif(scenes[0].with_name("d.tif"), random_pixels(40, 50)))]
    before = scenes[1].read_bytes()
    scenes[1].write_bytes(before[:300])
    ready, quarantine = ready_for(ConvSegmenter(make_task())), tmp_path / "out" / QUARANTINE

    def predict(part: int) -> list[str]:
        targets = choose_targets(names, tmp_path / "out", (part, 2))
        return statuses(list(predict_scenes(ready, targets, options(), inputs=names, skip_existing=True)))

    assert predict(2) == ["failed", "done"]
    assert predict(1) == ["done", "done"]
    assert find_scenes([str(quarantine)]) == [names[1]]
    assert quarantine.read_text().startswith(f"# {names[1]}")
    scenes[1].write_bytes(before)
    assert predict(2) == ["done", "skipped"]
    assert not quarantine.exists()


def test_existing_products_are_skipped_only_if_made_from_the_same(tmp_path: Path, scenes: list[Path]) -> None:
    targets = choose_targets([str(s) for s in scenes], tmp_path / "out")
    network = ConvSegmenter(make_task())

    def again(segmenter: ConvSegmenter, **changes: Any) -> list[Outcome]:
        return list(predict_scenes(ready_for(segmenter), targets, options(**changes), skip_existing=True))

    assert statuses(again(network)) == ["done"] * 3
    before = [t.output.stat().st_mtime_ns for t in targets]
    assert statuses(again(network)) == ["skipped"] * 3
    assert [t.output.stat().st_mtime_ns for t in targets] == before
    write_tif(scenes[2], random_pixels(40, 50) // 7)
    outcomes = again(network)
    assert statuses(outcomes) == ["skipped", "skipped", "failed"]
    assert "--overwrite" in (outcomes[2].error or "")
    assert statuses(again(network, overwrite=True)) == ["skipped", "skipped", "done"]
    assert statuses(again(network, tta="flip")) == ["failed"] * 3

    assert statuses(again(network, confidence=True, overwrite=True)) == ["done"] * 3
    with torch.no_grad():
        network.conv.bias.add_(1)
    assert statuses(again(network, confidence=True)) == ["failed"] * 3


def test_product_of_a_single_scene_is_skipped_in_a_batch_too(tmp_path: Path, scenes: list[Path]) -> None:
    recipe = parse_recipe(RecipeSource("tiny", RECIPE))
    network = segmenter_for(recipe, make_task())
    targets = choose_targets([str(s) for s in scenes], tmp_path / "out")
    predict_scene(network, targets[0].scene, targets[0].output, options())
    outcomes = list(predict_scenes(ready_for(network), targets, options(), skip_existing=True))
    assert statuses(outcomes) == ["skipped", "done", "done"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path)


def test_predict_command_makes_all_products(
    tmp_path: Path, scenes: list[Path], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.tif"
    arguments = ["predict", str(scenes[0]), "--model", str(model), "-o", str(out), "--tile", "64"]
    extra = ["--confidence", "--probabilities", "uint8", "--polygons", str(tmp_path / "out.gpkg"), "--json"]
    assert run([*arguments, *extra, "--preview", str(tmp_path / "out.png"), "--max-memory", "1GiB"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert sum(area["pixels"] for area in result["areas"]) == 2000
    made = {"out.gpkg", "out.png", "out.tif", "out_confidence.tif", "out_probabilities.tif"}
    assert made <= set(files_in(tmp_path))
    assert run(["cog", "validate", str(out), str(tmp_path / "out_probabilities.tif")]) == 0
    assert run(["info", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.split("\n", 2)[2])["coordinate system"] == "EPSG:32631"
    assert run([*arguments]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_predict_command_ends_a_batch_with_its_own_exit_code(
    tmp_path: Path, scenes: list[Path], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes[0].write_text("nonsense")
    arguments = ["predict", str(tmp_path / "in"), "--model", str(model), "-o", str(tmp_path / "out"), "--tile", "64"]
    assert run([*arguments, "--polygons", ".geojson", "--skip-existing"]) == 7
    assert "1 of 3 scenes failed" in capsys.readouterr().err
    assert {"b_rsseg.tif", "b_rsseg.geojson", "c_rsseg.tif", JOURNAL} <= set(files_in(tmp_path / "out"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blend", "foo"], "--blend foo"),
        (["--max-memory", "much"], "--max-memory much"),
        (["--part", "2"], "--part 2"),
        (["--polygons", "out.dxf"], ".gpkg"),
        (["--tile", "0"], "--tile 0"),
    ],
)
def test_wrong_options_are_named(
    scenes: list[Path], model: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["predict", str(scenes[0]), "--model", str(model), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_cog_command_tells_a_plain_file_by_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = write_tif(tmp_path / "plain.tif", np.zeros((1, 600, 600), np.uint8))
    assert run(["cog", "validate", str(plain)]) == 8
    assert "strips" in capsys.readouterr().err
    assert run(["cog", "validate", str(tmp_path / "none.tif")]) == 4


def test_scores_of_written_files_are_those_of_eval(tmp_path: Path, uint16_dataset: Path) -> None:
    from rsseg.config import SelectConfig
    from rsseg.data.sources import Datasets
    from rsseg.evaluation.model import evaluate
    from rsseg.evaluation.rasters import evaluate_rasters

    recipe = parse_recipe(RecipeSource("tiny", RECIPE.replace("path: none", f"path: {uint16_dataset}")))
    index = SegmentationIndex.load(uint16_dataset)
    torch.manual_seed(0)
    segmenter = segmenter_for(recipe, index.task).eval()
    source = Datasets(recipe.data).open(SelectConfig(), "train", index.task, masks=True)
    direct = evaluate(segmenter, recipe, source, device="cpu")
    for item in index.items:
        if item.split == "train":
            target = Target(str(uint16_dataset / item.image), tmp_path / "out" / Path(item.mask).name)
            list(predict_scenes(ready_for(segmenter), [target], options(tile=None, overlap=None)))
            (tmp_path / "truth").mkdir(exist_ok=True)
            (tmp_path / "truth" / Path(item.mask).name).write_bytes((uint16_dataset / item.mask).read_bytes())
    for mask in (tmp_path / "truth").iterdir():
        with rasterio.open(mask, "r+") as dataset:
            pixels = dataset.read()
            pixels[:, :2] = 255
            dataset.write(pixels)
    written = evaluate_rasters(tmp_path / "out", tmp_path / "truth", task=index.task)
    assert np.array_equal(written.matrix, direct.matrix)
