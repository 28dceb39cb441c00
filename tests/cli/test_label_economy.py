"""What to label next, and labels back into the dataset, through the command line."""

import json
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
import timm
import torch
import yaml
from numpy.typing import NDArray
from rasterio.transform import Affine
from safetensors.torch import save_file

from rsseg.checkpoint import find_model, read_header, read_tensors, write_model
from rsseg.cli import run
from rsseg.data.dataset import SampleReader
from rsseg.data.index import IndexItem, LabelMap, SegmentationIndex
from rsseg.evaluation.gap import _distances, _energy, verdict
from rsseg.inference.features import REFERENCE_NAME, Reference
from tests.conftest import rgb_task, write_tif
from tests.training.recipes import tiny_values

SIDE = 64


def pixels(rng: np.random.Generator, side: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Image (3, side, side) whose tones tell the class, and class indices."""
    mask = np.repeat(np.repeat(rng.integers(0, 3, (side // 8, side // 8)), 8, 0), 8, 1).astype(np.uint8)
    image = np.array([60, 130, 200])[mask] + rng.normal(0, 8, (3, side, side))
    return image.clip(1, 255).astype(np.uint8), mask


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with labeled and unlabeled images, a model trained on it, and a scene with a nodata corner."""
    folder, rng = tmp_path_factory.mktemp("economy"), np.random.default_rng(3)
    items = []
    for number, split in enumerate(("train", "train", "val", "unlabeled", "unlabeled", "unlabeled")):
        image, mask = pixels(rng, SIDE)
        name = f"{number:02d}.tif"
        write_tif(folder / "data/images" / name, image)
        write_tif(folder / "data/masks" / name, mask[None])
        labeled = split != "unlabeled"
        counts = tuple(int(n) for n in np.bincount(mask.ravel(), minlength=3)) if labeled else None
        mask_name = f"masks/{name}" if labeled else None
        items.append(IndexItem(image=f"images/{name}", mask=mask_name, split=split, classes=counts))
    labels = LabelMap(values={0: 0, 1: 1, 2: 2, 255: 255})
    SegmentationIndex(task=rgb_task(), label_map=labels, items=tuple(items)).save(folder / "data")
    scene, _ = pixels(rng, 4 * SIDE)
    scene[:, :SIDE, :SIDE] = 0
    scene[:, 2 * SIDE : 3 * SIDE, SIDE : 2 * SIDE] = rng.integers(1, 255, (3, SIDE, SIDE))
    write_tif(folder / "scene.tif", scene, nodata=0)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_values(folder / "data")), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(["train", "--method", "ktda", "--recipe", "tiny.yaml", "--steps", "4"]) == 0
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `made` as the working folder."""
    shutil.copytree(made, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_suggestions_lie_on_the_grid_of_the_scene(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["suggest", "runs/latest", "scene.tif", "-n", "6", "--block", "64", "-o", "next.gpkg"]
    assert run([*call, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [s["rank"] for s in found] == [1, 2, 3, 4, 5, 6]
    assert all(s["row"] % SIDE == s["col"] % SIDE == 0 for s in found)
    places = {(s["row"], s["col"]) for s in found}
    assert len(places) == 6
    assert (0, 0) not in places, "a block without data"
    assert all(sum(s["shares"].values()) == pytest.approx(1) for s in found)
    assert all(s["reason"] for s in found)
    assert [s["score"] for s in found] == sorted((s["uncertainty"] for s in found), reverse=True)

    meta, _, wkb, columns = pyogrio.raw.read("next.gpkg", layer="suggestions")
    assert meta["crs"] == "EPSG:32631"
    shapes = dict(zip(columns[meta["fields"].tolist().index("rank")].tolist(), shapely.from_wkb(wkb), strict=True))
    with rasterio.open("scene.tif") as file:
        first = found[0]
        left, top = file.transform * (first["col"], first["row"])
    assert shapes[1].bounds == pytest.approx((left, top - 640, left + 640, top))
    with sqlite3.connect("next.gpkg") as database:
        (style,) = database.execute("SELECT styleQML FROM layer_styles").fetchone()
    assert "SimpleFill" in style
    assert find_model(Path("runs/latest")).with_name(REFERENCE_NAME).is_file()


def test_a_strange_block_is_farther_from_the_labels_than_the_others(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["suggest", "runs/latest", "scene.tif", "-n", "1", "--block", "64", "-o", "next.gpkg", "--json"]
    assert run([*call, "--factors", "rarity,distance"]) == 0
    (first,) = json.loads(capsys.readouterr().out)
    assert first["score"] == pytest.approx(first["uncertainty"] * first["rarity"] * first["distance"])
    assert (first["row"], first["col"]) == (2 * SIDE, SIDE), "noise, unlike all training images"
    assert first["distance"] > 1.2


def test_block_statistics_do_not_depend_on_the_tiles(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import replace

    from rsseg.scene.blocks import Image, measure_blocks
    from rsseg.scene.memory import prepare_model
    from rsseg.scene.options import SceneOptions
    from rsseg.scene.suggest import with_features

    found = []
    for tile in (None, 96):
        options = SceneOptions(tile=tile, overlap=None if tile is None else 64, dtype="float32")
        prepared = prepare_model(find_model(Path("runs/latest")), options)
        prepared = replace(prepared, network=with_features(prepared.network, "test"))
        found.append(measure_blocks(prepared, [Image("scene.tif", options, "scene")], 64))
    whole, cut = found
    assert len(whole) == len(cut) == 15
    assert (whole.counts.sum(1) == SIDE**2).all()
    assert (cut.counts.sum(1) == SIDE**2).all()
    np.testing.assert_array_equal(whole.windows, cut.windows)
    assert np.abs(whole.entropy - cut.entropy).max() < 0.05
    assert np.corrcoef(whole.features.ravel(), cut.features.ravel())[0, 1] > 0.95


def test_corrected_chips_return_to_the_dataset(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["suggest", "runs/latest", "data", "-n", "2", "--per-scene", "1", "--block", "64", "-o", "next.gpkg"]
    assert run([*call, "--chips", "chips"]) == 0
    assert "rsseg dataset add DATASET --chips chips" in capsys.readouterr().err
    images = sorted(Path("chips/images").iterdir())
    assert len(images) == 2
    for image in images:
        with rasterio.open(Path("chips/masks") / image.name, "r+") as mask, rasterio.open(image) as file:
            assert (mask.shape, mask.transform, mask.crs) == (file.shape, file.transform, file.crs)
            mask.write(np.full((1, SIDE, SIDE), 2, np.uint8))
    assert run(["dataset", "add", "data", "--chips", "chips"]) == 0
    assert "predicted them" not in capsys.readouterr().err
    index = SegmentationIndex.load(Path("data"))
    new = [item for item in index.items if item.image.startswith("added/")]
    assert [item.classes for item in new] == [(0, 0, SIDE**2)] * 2
    assert {item.split for item in new} == {"train"}
    assert (SampleReader(index, index.task.bands, cache=False).mask(new[0]) == 2).all()
    assert run(["dataset", "verify", "data"]) == 0
    assert run(["dataset", "add", "data", "--chips", "chips"]) == 4
    assert "was added before" in capsys.readouterr().err


def test_chips_that_nobody_corrected_are_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["suggest", "runs/latest", "data", "-n", "2", "--per-scene", "1", "--block", "64", "-o", "next.gpkg"]
    assert run([*call, "--chips", "chips"]) == 0
    corrected, untouched = sorted(Path("chips/masks").glob("*.tif"))
    with rasterio.open(corrected, "r+") as mask:
        pixels = mask.read()
        pixels[0, 0, 0] = 1 - pixels[0, 0, 0] // 2
        mask.write(pixels)
    capsys.readouterr()
    assert run(["dataset", "add", "data", "--chips", "chips"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"1 of 2 masks are as the model predicted them, {untouched.name} first" in said
    assert "added/001/masks" in said


def test_windows_of_a_validation_image_do_not_become_training_images_unsaid(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for image, chips in (("02.tif", "held"), ("03.tif", "free")):
        call = ["suggest", "runs/latest", f"data/images/{image}", "-n", "1", "--block", "64", "-o", f"{chips}.gpkg"]
        assert run([*call, "--chips", chips]) == 0
        capsys.readouterr()
        assert run(["dataset", "add", "data", "--chips", chips]) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert ("is part of 02, which is in the split 'val'" in said.replace("seems to be", "is")) == (chips == "held")


def test_a_temperature_at_its_limit_is_said(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("evaluation.calibration", "training.final"):
        for limit in ("COLDEST", "HOTTEST"):
            monkeypatch.setattr(f"rsseg.{module}.{limit}", 1.0)
    assert run(["train", "--method", "ktda", "--recipe", "tiny.yaml", "--steps", "2"]) == 0
    assert "the limit: the probabilities hardly tell right from wrong" in capsys.readouterr().out


def test_polygons_drawn_on_a_scene_are_added(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with rasterio.open("scene.tif") as file:
        corners = [file.transform * (col, row) for col, row in ((70, 70), (120, 70), (120, 120), (70, 120))]
    pyogrio.raw.write(
        "mine.gpkg", shapely.to_wkb(np.array([shapely.Polygon(corners)], object)), [np.array(["water"], object)],
        ["kind"], layer="mine", driver="GPKG", geometry_type="Polygon", crs="EPSG:32631",
    )  # fmt: skip
    call = ["dataset", "add", "data", "--src", "scene.tif", "--labels", "mine.gpkg", "--field", "kind", "--tile", "64"]
    assert run(call) == 0
    new = [item for item in SegmentationIndex.load(Path("data")).items if item.image.startswith("added/")]
    assert [item.classes for item in new] == [(0, 0, 50 * 50)]
    assert run(["dataset", "verify", "data"]) == 0


def test_scenes_of_one_name_in_two_folders_stay_two_images(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for number, folder in enumerate(("2019", "2020")):
        left = 500_000 + 1000 * number
        pixels = np.full((3, SIDE, SIDE), 60 + number, np.uint8)
        pixels[:, :8] = 9
        write_tif(
            Path("scenes") / folder / "tile.tif", pixels, crs="EPSG:32631", transform=Affine(1, 0, left, 0, -1, 64)
        )
        if number:  # nodata is declared beside one of the files
            bands = "".join(
                f'<PAMRasterBand band="{b}"><NoDataValue>9</NoDataValue></PAMRasterBand>' for b in (1, 2, 3)
            )
            Path(f"scenes/{folder}/tile.tif.aux.xml").write_text(f"<PAMDataset>{bands}</PAMDataset>")
        lines.append(shapely.LineString([(left, 32), (left + SIDE, 32)]))
    pyogrio.raw.write(
        "lines.geojson", shapely.to_wkb(np.array(lines, object)), [np.array(["field", "water"], object)], ["kind"],
        geometry_type="LineString", crs="EPSG:32631",
    )  # fmt: skip
    call = ["dataset", "add", "data", "--src", "scenes", "--labels", "lines.geojson", "--field", "kind"]
    assert run(call) == 2
    assert "--width METRES" in " ".join(capsys.readouterr().err.split())
    assert run([*call, "--width", "4"]) == 0
    index = SegmentationIndex.load(Path("data"))
    new = [item for item in index.items if item.image.startswith("added/")]
    assert [item.image for item in new] == [f"added/001/images/{year}/tile.tif" for year in (2019, 2020)]
    reader = SampleReader(index, index.task.bands, cache=False)
    assert [int(reader.image(item)[0].max()) for item in new] == [60, 61]
    assert [int(reader.image(item)[1].sum()) for item in new] == [SIDE * SIDE, SIDE * (SIDE - 8)]
    assert [set(np.unique(reader.mask(item)).tolist()) for item in new] == [{0, 255}, {2, 255}]
    assert "listed in data/added/001/label-issues.csv" in " ".join(capsys.readouterr().err.split())
    assert "road" in Path("data/added/001/label-issues.csv").read_text()
    assert run([*call, "--width", "4"]) == 4, "they are added already"


def test_bad_calls_name_the_remedy(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*call: str) -> tuple[int, str]:
        code = run([*call])
        return code, capsys.readouterr().err

    suggest = ("suggest", "runs/latest", "scene.tif", "-o")
    code, said = refused(*suggest, "next.shp")
    assert (code, "ends in .gpkg" in said) == (2, True)
    code, said = refused(*suggest, "next.gpkg", "--block", "8")
    assert (code, "at least 64" in said) == (2, True)
    code, said = refused(*suggest, "next.gpkg", "--factors", "distanse")
    assert (code, "write rarity, distance or rarity,distance" in said) == (2, True)
    code, said = refused(*suggest, "scene.tif")
    assert code == 2
    Path("next.gpkg").write_bytes(b"mine")
    code, said = refused(*suggest, "next.gpkg")
    assert (code, "--overwrite" in said) == (2, True)
    code, said = refused("suggest", "runs/latest", "nowhere.tif", "-o", "other.gpkg")
    assert (code, "nowhere.tif" in said) == (4, True)
    code, said = refused("dataset", "add", "data")
    assert (code, "either --chips" in said) == (2, True)
    code, said = refused("dataset", "add", "data", "--chips", "nowhere")
    assert (code, "no image" in said) == (4, True)
    code, said = refused("dataset", "add", "data", "--src", "scene.tif", "--labels", "x.gpkg", "--tile", "0")
    assert (code, "error: --tile Input should be greater" in said) == (2, True)


def test_a_model_without_features_or_dataset_and_a_dataset_without_candidates(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = SegmentationIndex.load(Path("data"))
    labeled = tuple(item for item in index.items if item.mask is not None)
    index.model_copy(update={"items": labeled}).save(Path("full"))
    shutil.copytree("data/images", "full/images")
    shutil.copytree("data/masks", "full/masks")
    assert run(["suggest", "runs/latest", "full", "-o", "a.gpkg"]) == 4
    assert "none is left to choose from" in capsys.readouterr().err
    model = find_model(Path("runs/latest"))
    shutil.copyfile(model, "alone.safetensors")
    values = yaml.safe_load(Path("tiny.yaml").read_text(encoding="utf-8"))
    shutil.move(values["data"]["path"], f"{values['data']['path']}.gone")
    try:
        assert run(["suggest", "alone.safetensors", "scene.tif", "-o", "b.gpkg"]) == 5
        assert "has no features of its training images" in capsys.readouterr().err
    finally:
        shutil.move(f"{values['data']['path']}.gone", values["data"]["path"])


def test_scenes_of_two_zones_share_one_file(place: Path) -> None:
    with rasterio.open("scene.tif") as file:
        other = file.read()
    write_tif(Path("other.tif"), other, nodata=0, crs="EPSG:32632", transform=Affine(10, 0, 0, 0, -10, 4000000))
    call = ["suggest", "runs/latest", "scene.tif", "other.tif", "-n", "4", "--per-scene", "2", "--block", "64"]
    assert run([*call, "-o", "next.gpkg"]) == 0
    meta, _, _, columns = pyogrio.raw.read("next.gpkg", layer="suggestions", columns=["scene"])
    assert sorted(columns[0].tolist()) == ["other.tif", "other.tif", "scene.tif", "scene.tif"]
    assert meta["crs"] == "EPSG:32631"


def test_the_applicability_layer_is_low_where_the_scene_is_strange(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["predict", "scene.tif", "--model", "runs/latest", "-o", "map.tif"]
    assert run([*call, "--applicability"]) == 0
    said = capsys.readouterr().err
    assert "map_applicability.tif" in said
    assert "Areas counted in pixels are biased" in said
    assert "rsseg sample map.tif" in said
    with rasterio.open("map_applicability.tif") as file, rasterio.open("map.tif") as classes:
        values, nodata = file.read(1), file.nodata
        assert file.scales == (1 / 254,)
        assert (file.transform, file.shape) == (classes.transform, classes.shape)
        np.testing.assert_array_equal(values == nodata, classes.read(1) == classes.nodata)
    strange = values[2 * SIDE + 16 : 3 * SIDE - 16, SIDE + 16 : 2 * SIDE - 16].mean()
    usual = values[:, 3 * SIDE : 4 * SIDE].mean()
    assert strange < usual
    capsys.readouterr()
    assert run([*call, "--applicability", "--tta", "flip", "--overwrite"]) == 2
    assert "--tta none" in capsys.readouterr().err


def test_images_without_data_are_no_reference(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["predict", "scene.tif", "--model", "runs/latest", "--applicability", "--device", "cpu", "--overwrite"]
    empty = np.zeros((3, SIDE, SIDE), np.uint8)
    (place / "own.yaml").write_text(yaml.safe_dump(tiny_values(place / "data")), encoding="utf-8")
    assert run(["train", "--method", "ktda", "--recipe", "own.yaml", "--steps", "1"]) == 0
    write_tif(place / "data/images/02.tif", empty, nodata=0)
    assert run([*call, "-o", "out.tif"]) == 0, "the training windows judge one another"
    reference = find_model(Path("runs/latest")).with_name(REFERENCE_NAME)
    assert Reference.load(reference).held_out == "training images"
    reference.unlink()
    for name in ("00.tif", "01.tif"):
        write_tif(place / "data/images" / name, empty, nodata=0)
    capsys.readouterr()
    assert run([*call, "-o", "out.tif"]) == 5
    assert "has no image with data" in " ".join(capsys.readouterr().err.split())


def test_a_single_training_window_gives_a_finite_applicability() -> None:
    window = torch.tensor([[1.0, 2.0, 3.0]])
    reference = Reference.of(window, cells=1, model="m").with_threshold(window, "training images")
    found = reference.applicability(torch.stack([window[0], window[0] + 1], dim=1)[:, None])
    assert found.flatten().tolist() == pytest.approx([1, 0])


def test_eval_averages_models(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call, found = ["eval", "--split", "val", "--json", "--model", "runs/latest"], []
    for extra in ([], ["--model", "runs/latest"]):
        assert run([*call, *extra]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["counts"] == found[1]["counts"]
    assert found[0]["seen"] == found[1]["seen"]
    header = read_header(find_model(Path("runs/latest")))
    classes = tuple(c.model_copy(update={"name": f"old {c.name}"}) for c in header.task.classes)
    other = replace(header, task=header.task.model_copy(update={"classes": classes}))
    write_model(Path("other.safetensors"), read_tensors(find_model(Path("runs/latest")))[0], other)
    assert run([*call, "--model", "other.safetensors"]) == 2
    said = capsys.readouterr().err
    assert "other.safetensors cannot be averaged, their classes differ" in said


def test_the_gap_of_a_dataset_to_itself_is_none(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = SegmentationIndex.load(Path("data"))
    shutil.copytree("data/images", "dark/images")
    for path in Path("dark/images").glob("*.tif"):
        with rasterio.open(path, "r+") as file:
            file.write(file.read() // 8)
    items = tuple(item.model_copy(update={"mask": None, "classes": None}) for item in index.items)
    index.model_copy(update={"items": items}).save(Path("dark"))
    # The distances need a file of weights, whatever they are.
    torch.manual_seed(0)
    save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), "weights.safetensors")
    found = []
    for second in ("data", "dark"):
        assert run(["dataset", "gap", "data", second, "--weights", "weights.safetensors", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    same, other = found
    assert same["distance"] == pytest.approx(0, abs=1e-6)
    assert same["sentence"].startswith("Same domain")
    assert other["distance"] > same["distance"]
    assert other["low"] <= other["high"]
    assert other["bands"][0]["mean"][0] != pytest.approx(other["bands"][0]["mean"][1], abs=0.001)


def test_few_images_of_one_distribution_are_not_far_apart() -> None:
    rng, means = np.random.default_rng(0), []
    for count in (5, 40):
        found = []
        for _ in range(60):
            a, b = rng.normal(size=(2, count, 30))
            within = _distances(a, a), _distances(b, b), _distances(a, b)
            found.append(_energy(within, np.arange(count), np.arange(count)))
        means.append(np.mean(found))
    assert max(means) < 0.02


def test_the_gap_of_scenes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(5)
    torch.manual_seed(0)
    save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), "weights.safetensors")
    Path("dark").mkdir()
    for number in range(2):
        image, _ = pixels(rng, 512)
        write_tif(Path(f"scene{number}.tif"), image)
        write_tif(Path(f"dark/{number}.tif"), image // 8)
        write_tif(Path(f"deep{number}.tif"), image.astype(np.uint16) * 30 + 200)

    def gap(first: str, second: str) -> dict[str, Any]:
        assert run(["dataset", "gap", first, second, "--weights", "weights.safetensors", "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    same, dark = gap("scene0.tif", "scene0.tif"), gap("scene0.tif", "dark")
    assert same["images"] == [4, 4]
    assert dark["images"] == [4, 8]
    assert same["distance"] == pytest.approx(0, abs=1e-6)
    assert dark["distance"] > 0.05
    assert same["gsd_m"] == dark["gsd_m"] == [pytest.approx(10, rel=0.01)] * 2
    deep = gap("deep0.tif", "deep1.tif")
    assert 0 <= deep["bands"][0]["mean"][0] <= 1, "scaled by the percentiles of the first"
    mixed = gap("data", "scene1.tif")
    assert [band["band"] for band in mixed["bands"]] == list(rgb_task().bands)
    assert mixed["bands"][0]["mean"][0] == pytest.approx(mixed["bands"][0]["mean"][1], abs=0.1)


def test_scenes_without_a_gap(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = "weights.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), weights)
    write_tif(Path("small.tif"), pixels(np.random.default_rng(5), 256)[0])
    write_tif(Path("two.tif"), np.ones((2, 512, 512), np.uint8))
    for second, code, words in (
        ("small.tif", 4, "small.tif: 1 image(s) are too few"),
        ("two.tif", 4, "data and two.tif have no band in common: red, green, blue and "),
        ("absent.tif", 4, "absent.tif"),
    ):
        assert run(["dataset", "gap", "data", second, "--weights", weights]) == code
        assert words in capsys.readouterr().err


def test_a_verdict_that_rests_on_a_guess_says_so() -> None:
    for distance, start in ((0.29, "Moderate: "), (0.31, "Far: ")):
        text = verdict(distance, 0.1, (None, None))
        assert text.startswith(start)
        assert "between moderate and far, 0.3, is a guess" in text
    assert "guess" not in verdict(0.05, 0.1, (None, None))
    assert "0.5 m and 2 m: set data.match_gsd" in verdict(0.05, 0.1, (0.5, 2.0))


def test_an_untrained_network_measures_no_gap(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["dataset", "gap", "data", "data", "--weights", "random"]) == 2
    assert "untrained network" in capsys.readouterr().err
    assert run(["dataset", "gap", "data", "nowhere"]) == 4
