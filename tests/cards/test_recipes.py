"""Each packaged recipe names the commands that prepare its data, and finds in the result what it asks for."""

import shlex
from pathlib import Path

import pytest

from rsseg.cli import run
from rsseg.config import SelectConfig
from rsseg.data.sources import Datasets
from rsseg.data.streams import StreamSpec, training_batches
from rsseg.recipe import load_recipe, packaged_recipes
from tests.cards.miniatures import (
    city_osm,
    deepglobe,
    gid,
    landcovernet,
    loveda,
    own_folder,
    potsdam,
    shipped,
    vaihingen,
    zipped,
)

SOURCES = {
    "FOLDER": own_folder,
    "LOVEDA": loveda,
    "POTSDAM": potsdam,
    "VAIHINGEN": vaihingen,
    "DEEPGLOBE": deepglobe,
    "GID": gid,
    "LANDCOVERNET": landcovernet,
    "CITY_OSM": city_osm,
    "grass.zip": lambda root: zipped(shipped("grass", root / "f"), root / "grass.zip"),
    "cloud.zip": lambda root: zipped(shipped("cloud", root / "f"), root / "cloud.zip"),
}
RECIPES = {name: path for name, path in packaged_recipes().items() if not name.startswith("demo-")}
LABELED = {"labeled", "source"}


def commands_of(recipe: Path) -> list[list[str]]:
    """The lines of its comments that a user would type."""
    lines = [line.removeprefix("#").strip() for line in recipe.read_text(encoding="utf-8").splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("rsseg dataset prepare")]


class Workshop:
    """Sources and prepared datasets, each made once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepared(self, command: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
        """The folder that a command makes in `data`."""
        place = self.root / "-".join(command).replace("/", "_")
        if not place.is_dir():
            place.mkdir(parents=True)
            source = command.index("--src") + 1
            made = self.root / "sources" / command[source]
            path = self.root / f"{command[source]}.path"
            if not path.is_file():
                path.write_text(str(SOURCES[command[source]](made)))
            typed = [word.replace(command[source], path.read_text()) for word in command]
            small = ["--tile", "16"] if command[2] not in ("grass", "cloud") else []
            monkeypatch.chdir(place)
            assert run([*typed, *small]) == 0
        (data,) = (place / "data").iterdir()
        return data


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_commands_prepare_what_it_asks_for(
    name: str, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = commands_of(RECIPES[name])
    assert commands, "the recipe does not say how its data is prepared"
    (tmp_path / "data").mkdir()
    for command in commands:
        made = workshop.prepared(command, monkeypatch)
        (tmp_path / "data" / made.name).symlink_to(made)
    monkeypatch.chdir(tmp_path)
    small = ["trainer.batch_size=2", "trainer.workers=0", "data.cache=false"]
    recipe = load_recipe(name, small)
    few = {key: value.model_copy(update={"count": 2}) for key, value in recipe.data.streams.items() if value.count}
    recipe = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"streams": {**recipe.data.streams, **few}})}
    )
    datasets = Datasets(recipe.data, recipe.seed)
    task = datasets.task
    fill = (0.5,) * len(task.bands)
    specs = [StreamSpec(stream, "train", stream in LABELED, fill) for stream in recipe.stream_names()]
    batch = next(training_batches(recipe, specs, task, device="cpu", start_step=0))
    for spec in specs:
        assert batch[spec.name].images.shape[:2] == (2, len(task.bands))
        assert (batch[spec.name].masks is not None) == spec.masks
        assert (
            Datasets(recipe.data, recipe.seed)
            .open(recipe.data.streams.get(spec.name, SelectConfig()), "train", task, masks=False)
            .items
        )
    for split, select in (("val", recipe.data.val), ("test", recipe.data.test)):
        assert datasets.open(select, split, task, masks=True).items
