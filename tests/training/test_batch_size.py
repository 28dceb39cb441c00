"""The largest batch that fits into memory."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

from rsseg import cli
from rsseg.errors import MachineError
from rsseg.recipe import Recipe
from rsseg.runs import find_run
from rsseg.training import batch_size
from rsseg.training.batch_size import LARGEST, largest_batch
from rsseg.training.device import Hardware
from tests.conformance.cases import make_case, recipe_files
from tests.conftest import rgb_task
from tests.training.recipes import tiny_recipe, tiny_values

CPU = Hardware(torch.device("cpu"))
MEGABYTE = 1 << 20


def automatic(data: Path) -> Recipe:
    return tiny_recipe(data, trainer={"batch_size": "auto", "grad_accum_steps": 1})


def test_batch_grows_with_the_memory_up_to_a_limit(tmp_path: Path) -> None:
    recipe = automatic(tmp_path)
    small, large = (largest_batch(recipe, rgb_task(), CPU, memory=n * MEGABYTE) for n in (8, 16))
    assert 2 < small < large < 3 * small
    assert largest_batch(recipe, rgb_task(), CPU, memory=10**12) == LARGEST


def test_stream_of_its_own_batch_size_keeps_it(tmp_path: Path) -> None:
    recipe = make_case(next(file for file in recipe_files() if file.stem == "mtdf-vit"), tmp_path).recipe

    def largest(sizes: dict[str, int]) -> int:
        trainer = recipe.trainer.model_copy(update={"batch_size": "auto", "stream_batch_sizes": sizes})
        wanted = recipe.model_copy(update={"trainer": trainer})
        return largest_batch(wanted, rgb_task(), CPU, memory=128 * MEGABYTE)

    alone, beside_few, beside_many = largest({}), largest({"unlabeled": 1}), largest({"unlabeled": 12})
    assert beside_many < beside_few
    assert alone < beside_few


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "free_bytes", lambda: 12 * MEGABYTE)
    assert batch_size._available(CPU.device) == 12 * MEGABYTE
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert batch_size._available(CPU.device) == 4 * MEGABYTE


def test_memory_for_not_even_two_images_is_a_limit_of_the_machine(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"trainer\.batch_size: auto: a batch of 2 does not fit into the 0\.0 GB"):
        largest_batch(automatic(tmp_path), rgb_task(), CPU, memory=MEGABYTE)


def test_run_records_the_number_it_found(
    rgb_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batch_size, "_available", lambda _: 8 * MEGABYTE)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(tiny_values(rgb_dataset)))
    options = ["--batch-size", "auto", "--grad-accum-steps", "1", "--steps", "1", "--output", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", ["rsseg", "train", "--recipe", str(recipe), *options])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (0, None), capsys.readouterr().err
    found = yaml.safe_load(find_run(None, tmp_path / "runs").recipe_file.read_text())["trainer"]["batch_size"]
    assert 2 < found < LARGEST
    monkeypatch.setattr(sys, "argv", ["rsseg", "train", "--recipe", str(recipe), "--batch-size", "many"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "--batch-size" in capsys.readouterr().err
