"""Recipes: validation, overrides, lookup and messages."""

import os
from pathlib import Path

import pytest
import yaml

from rsseg.errors import RecipeError
from rsseg.recipe import RecipeSource as Source
from rsseg.recipe import dump_recipe, find_recipe, load_recipe, packaged_recipes, parse_recipe, recipe_schema

MINIMAL = """\
method: ktda
name: tiny
data:
  path: data/tiny
  augment:
    crop_size: 64
student:
  name: convnext_atto
trainer:
  steps: 10
"""


def write(folder: Path, text: str) -> str:
    file = folder / "r.yaml"
    file.write_text(text)
    return str(file)


def test_minimal_recipe_is_valid_and_dumps_to_an_equal_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert parse_recipe(Source("dumped", dump_recipe(recipe))) == recipe


def test_misspelt_key_names_file_line_and_nearest_key(tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL.replace("steps: 10", "stepz: 10"))
    with pytest.raises(RecipeError, match=r"r\.yaml, line 10: unknown key 'trainer\.stepz'\. Did you mean 'steps'\?"):
        load_recipe(file)


@pytest.mark.parametrize("given", ["[-1, 2]", "[a, 2]", "{a: 1}", "some", "[[1], 2]"])
def test_value_that_fits_no_alternative_is_one_problem_of_its_key(given: str, tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL)
    with pytest.raises(RecipeError, match=r"^--set loss\.class_weights: loss\.class_weights: [^\n]*'auto' or [^\n]*$"):
        load_recipe(file, [f"loss.class_weights={given}"])


def test_misspelt_key_deep_inside_is_found(tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL.replace("crop_size", "cropsize"))
    with pytest.raises(
        RecipeError, match=r"line 6: unknown key 'data\.augment\.cropsize'\. Did you mean 'crop_size'\?"
    ):
        load_recipe(file)


@pytest.mark.parametrize(
    ("old", "key", "new"),
    [
        ("student: {name: convnext_atto, taps: [3]}", "student.taps", "out_indices"),
        ("student: {name: convnext_atto, norm_taps: all}", "student.norm_taps", "out_norm"),
        ("student: {name: convnext_atto}\ndecoder: {kind: segformer}", "decoder.kind", "type"),
        ("student: {name: convnext_atto}\ncross_entropy_divisor: all", "cross_entropy_divisor", "loss_divisor"),
        ("student: {name: convnext_atto}\nnorm_weight_decay: all", "norm_weight_decay", "weight_decay_exempt"),
        ("student: {name: convnext_atto}\ndecoder_lr_scale: 2", "decoder_lr_scale", "head_lr_scale"),
        ("student: {name: convnext_atto}\nstart_from: x", "start_from", "start"),
    ],
)
def test_renamed_key_is_refused_with_its_new_name(tmp_path: Path, old: str, key: str, new: str) -> None:
    file = write(tmp_path, MINIMAL.replace("student:\n  name: convnext_atto", old))
    with pytest.raises(RecipeError, match=rf"r\.yaml, line \d+: unknown key '{key}'\. It was renamed: write {new}\."):
        load_recipe(file)


def test_average_of_the_trainer_was_moved(tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL.replace("steps: 10", "ema: {decay: 0.9}"))
    with pytest.raises(RecipeError, match=r"'trainer\.ema'.*write ship: average, with ema_decay"):
        load_recipe(file)


def test_every_problem_is_listed_at_once(tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL.replace("steps: 10", "steps: -1\n  batch_size: many").replace("name: tiny\n", ""))
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert any("'name' is missing" in line for line in lines)
    assert any("trainer.steps" in line and "-1" in line for line in lines)
    assert any("trainer.batch_size" in line and "many" in line for line in lines)


def test_broken_yaml_names_the_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"line 3: not valid YAML"):
        load_recipe(write(tmp_path, "method: ktda\nname: [1,\ndata: }\n"))


@pytest.mark.parametrize(
    ("text", "message"), [("- 1\n", "mapping"), ("method: yolo\n", "is unknown"), ("name: x\n", "method")]
)
def test_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, text))


def test_overrides_are_typed_and_validated_with_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL)
    recipe = load_recipe(file, ["trainer.steps=7", "optimizers.main.lr=6e-5", "data.bands=[red, nir]"])
    assert recipe.trainer.steps == 7
    assert recipe.optimizers["main"].lr == 6e-5
    assert recipe.data.bands == ("red", "nir")
    with pytest.raises(RecipeError, match=r"trainer\.step"):
        load_recipe(file, ["trainer.step=7"])
    with pytest.raises(RecipeError, match=r"key\.path=value"):
        load_recipe(file, ["trainer.steps"])
    with pytest.raises(RecipeError, match="has no key"):
        load_recipe(file, ["name.first=x"])


def test_method_that_contradicts_the_recipe_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="for method 'ktda', but --method says 'mtdf'"):
        load_recipe(write(tmp_path, MINIMAL), method="mtdf")


def test_unknown_stream_names_the_ones_there_are(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown stream 'sauce'.*labeled"):
        load_recipe(write(tmp_path, MINIMAL), ["trainer.stream_batch_sizes.sauce=2"])


def test_recipe_is_found_in_the_working_folder_before_the_packaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = next(iter(packaged_recipes()))
    assert find_recipe(name) == packaged_recipes()[name]
    assert find_recipe(name.removesuffix(".yaml")) == packaged_recipes()[name]
    Path(name).write_text(MINIMAL)
    assert find_recipe(name) == Path(name)


def test_unknown_recipe_suggests_the_nearest_packaged_one() -> None:
    with pytest.raises(RecipeError, match=r"Did you mean grass\?"):
        find_recipe("gras.yaml")


@pytest.mark.parametrize("path", packaged_recipes().values(), ids=lambda p: p.name)
def test_packaged_recipe_is_valid_and_says_what_it_is(path: Path) -> None:
    recipe = load_recipe(str(path))
    assert recipe.title
    assert recipe.name == path.stem
    if not path.stem.startswith("demo"):
        assert recipe.reference, "say which paper and table row this reproduces, or what was measured"


def test_there_are_packaged_recipes_for_the_publications() -> None:
    assert {"grass.yaml", "cloud.yaml", "demo-ktda.yaml"} <= set(packaged_recipes())


def test_schema_forbids_unknown_keys() -> None:
    assert '"additionalProperties": false' in yaml.dump(recipe_schema(), default_style='"').replace(
        "!!bool ", ""
    ).replace('"false"', "false")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 10", "steps: 10\n  steps: 20", "line 11: .*key 'steps' is in line 10 already"),
        ("steps: 10", "max_hours: .inf", r"trainer\.max_hours"),
        ("steps: 10", "max_hours: 1e400", r"trainer\.max_hours"),
        ("steps: 10", "clip_grad: .nan", r"trainer\.clip_grad"),
        ("steps: 10", "clip_grad: nan", r"trainer\.clip_grad"),
        ("steps: 10", "clip_grad: true", r"trainer\.clip_grad.*found 'true'"),
        ("steps: 10", "steps: true", r"trainer\.steps"),
        ("steps: 10", f"steps: {'9' * 5000}", r"trainer\.steps"),
        ("steps: 10", "batch_size: 1000000000", r"trainer\.batch_size"),
        ("steps: 10", "workers: 100000", r"trainer\.workers"),
        ("crop_size: 64", "crop_size: 10000000", r"data\.augment\.crop_size"),
        ("crop_size: 64", "scale_range: [2.0, 0.5]", "first value of a range"),
        ("name: tiny", "name: ../../tiny", "name"),
        ("name: tiny", "name: .", "name"),
        ("name: tiny", f"name: {'n' * 300}", "name"),
        ("name: tiny", "name: tiny\neval: {tile: 64, overlap: 64}", "eval: overlap: 64 pixels do not fit tiles of 64"),
        ("name: tiny", "name: tiny\neval: {scales: []}", r"eval\.scales"),
        ("name: tiny", "name: tiny\noptimizers: {main: {betas: [1, 0.9]}}", r"betas"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(write(tmp_path, MINIMAL.replace(old, new)))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["2024", "1.5", "yes", "~x", "2024-02-31", "1:30", "0x10"])
def test_words_that_look_like_numbers_stay_names(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, MINIMAL.replace("data/tiny", name).replace("name: tiny", f"name: {name}"))
    recipe = load_recipe(file, [f"data.val.split={name}"])
    assert (recipe.name, recipe.data.path, recipe.data.val.split) == (name, Path(name), name)


@pytest.mark.parametrize("folder", ["2024", "yes", "~", "a: b", "-", "[x]", "a\nb"])
def test_override_of_a_flag_is_no_yaml(tmp_path: Path, folder: str) -> None:
    assert load_recipe(write(tmp_path, MINIMAL), [("data.path", Path(folder))]).data.path == Path(folder)


def test_overrides_are_read_under_the_same_limits(tmp_path: Path) -> None:
    for text in ("[" * 5000, "{a: 1, a: 2}", "&a [*a]"):
        with pytest.raises(RecipeError, match=r"--set name: not valid YAML|--set name, line 1"):
            load_recipe(write(tmp_path, MINIMAL), [f"name={text}"])


def test_recipe_with_a_thousand_problems_names_the_first_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, MINIMAL + "".join(f"key{i}: 1\n" for i in range(1000))))
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert lines[-1].endswith("980 more problems.")


def test_folder_pipe_and_name_without_end_are_no_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in (str(tmp_path), str(tmp_path / "pipe")):
        with pytest.raises(RecipeError, match="not a regular file"):
            load_recipe(name)
    with pytest.raises(RecipeError, match="File name too long"):
        load_recipe("n" * 300)
    # A folder of that name does not hide the packaged recipe.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grass").mkdir()
    assert load_recipe("grass").name == "grass"
