"""The recommended recipes, as a new user would run them: a folder with few masks, and one or two trainings to the
best map."""

from pathlib import Path

import numpy as np
import pytest
import rasterio

from rsseg.cli import run
from rsseg.recipe import load_recipe, read_recipe
from rsseg.runs import list_runs
from tests.conftest import write_png

CLASSES = """name: mine
bands: [red, green, blue]
classes:
  - {name: field, value: 0, color: "#e6b800"}
  - {name: forest, value: 1, color: "#1a661a"}
  - {name: water, value: 2, color: "#0066cc"}
"""
PREPARE = [
    *("--classes", "mine/classes.yaml", "--images", "images/*.png", "--masks", "masks/*.png"),
    *("--unlabeled", "unlabeled", "--split-ratio", "train=0.7,val=0.15,test=0.15", "--out", "data/mine"),
]
SMALL = ["--steps", "3", "--batch-size", "2", "--device", "cpu", "--amp-dtype", "none"]
FEW = ["trainer.workers=0", "trainer.eval_every=3", "trainer.checkpoint_every=3", "data.augment.crop_size=64"]
VIT = "{name: vit_mini_patch8, weights: random}"
PYRAMID = "{name: tf_efficientnet_lite0, weights: random}"
SINGLE = {
    "supervised-recommended": {"backbone": VIT},
    "supervised-small": {"backbone": PYRAMID},
    "mtdf-recommended": {"student": PYRAMID},
    "ktda-recommended": {"student": PYRAMID, "teacher": VIT},
}
SECOND = {
    "ktda-tuned-teacher": ("supervised-recommended", {"student": PYRAMID}),
    "dasegnet-recommended": ("supervised-small", {"backbone": PYRAMID}),
}
"""Recipes that continue from another one."""


def write_folder(root: Path) -> None:
    """45 images of 96 pixels, masks for ten of them."""
    rng = np.random.default_rng(0)
    for number in range(45):
        mask = rng.integers(0, 3, (6, 6)).astype(np.uint8).repeat(16, 0).repeat(16, 1)
        write_png(
            root / "images" / f"{number}.png", (80 * mask[..., None] + rng.integers(0, 60, (96, 96, 3))).astype("u1")
        )
        if number < 10:
            write_png(root / "masks" / f"{number}.png", mask)
    (root / "classes.yaml").write_text(CLASSES)


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the dataset data/mine."""
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "mine")
    assert run(["dataset", "prepare", "folder", "--src", "mine", *PREPARE]) == 0
    return tmp_path


def assert_maps() -> None:
    """The newest run's model predicts an image of its size."""
    assert run(["predict", "mine/images/44.png", "-o", "map.tif"]) == 0
    with rasterio.open("map.tif") as raster:
        assert raster.shape == (96, 96)


def train(recipe: str, networks: dict[str, str]) -> int:
    sets = [*FEW, *(f"{key}={value}" for key, value in networks.items())]
    return run(["train", "--recipe", recipe, "--data", "data/mine", *SMALL, *(w for s in sets for w in ("--set", s))])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mtdf-recommended", "ktda-recommended"])
@pytest.mark.usefixtures("prepared")
def test_one_training_leads_from_a_folder_to_a_map(recipe: str) -> None:
    assert train(recipe, SINGLE[recipe]) == 0
    assert_maps()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SECOND)
def test_two_trainings_lead_from_a_folder_to_a_map(recipe: str, prepared: Path) -> None:
    first, networks = SECOND[recipe]
    assert train(first, SINGLE[first]) == 0
    assert train(recipe, networks) == 0
    before, after = sorted(list_runs(prepared / "runs"), key=lambda folder: folder.manifest().created)
    method = recipe.partition("-")[0]
    assert method in after.path.name
    stored = load_recipe(str(after.recipe_file))
    used = stored.start if stored.method != "ktda" else stored.task_teacher and stored.task_teacher.model
    assert used == Path("runs") / before.path.name
    assert_maps()


def test_second_command_without_the_first_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rgb_dataset: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    sets = ["backbone.weights=random", "data.augment.crop_size=28", "data.streams.target.split=train"]
    words = [word for text in sets for word in ("--set", text)]
    assert run(["train", "--recipe", "dasegnet-recommended", "--data", str(rgb_dataset), *words, "--dry-run"]) == 5
    assert "runs/latest: no such file or folder" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("recipe", [*SINGLE, *SECOND])
def test_recommended_recipe_claims_no_publication_and_no_unmeasured_accuracy(recipe: str) -> None:
    loaded, text = load_recipe(recipe), read_recipe(recipe).text
    assert "not published" in loaded.title
    assert loaded.reference.startswith("none")
    assert len([line for line in text.splitlines() if line.startswith("# ACCURACY: ")]) == 1
