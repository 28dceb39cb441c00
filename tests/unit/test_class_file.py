"""Class files of someone's own data."""

from pathlib import Path

import pytest

from rsseg.datasets.class_file import load_classes
from rsseg.errors import DataError

EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "examples").glob("*classes.yaml"))


def written(folder: Path, text: str) -> Path:
    path = folder / "classes.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_load(path: Path) -> None:
    classes = load_classes(path)
    assert len(classes.class_infos()) >= 4
    assert classes.label_map().values[255] == 255


def test_examples_exist() -> None:
    assert EXAMPLES


def test_values_beyond_254_are_read_and_stored_as_indices(tmp_path: Path) -> None:
    text = """
        name: biome
        classes: [{name: clear, value: 128, color: [0, 0, 0]}, {name: cloud, value: 255, also: [192], color: "#FFffFF"}]
        ignore: [0]
    """
    classes = load_classes(written(tmp_path, text))
    assert [(info.value, info.color) for info in classes.class_infos()] == [(0, (0, 0, 0)), (1, (255, 255, 255))]
    assert classes.label_map().values == {128: 0, 255: 1, 192: 1, 0: 255}


def test_classes_without_values_are_told_by_colour(tmp_path: Path) -> None:
    text = """
        name: isprs
        classes: [{name: road, color: "#FFFFFF"}, {name: car, color: "#FFFF00"}]
        ignore_colors: ["#000000"]
    """
    label_map = load_classes(written(tmp_path, text)).label_map()
    assert label_map.colors == (((255, 255, 255), 0), ((255, 255, 0), 1), ((0, 0, 0), 255))
    assert not label_map.values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nclases: []", "clases: unknown key; did you mean 'classes'"),
        ("name: a\nclasses: [{name: x, colour: [0, 0, 0]}]", r"classes\.0\.colour: unknown key; did you mean 'color'"),
        ("name: a\nclasses: [{name: x, color: '#12345'}]", r"classes\.0\.color"),
        ("name: a\nclasses: [{name: x, color: '#123456', value: 1}, {name: y, color: '#123457'}]", "'y' has no value"),
        ("name: [", "not valid YAML"),
        ("- 1", "expected a table"),
    ],
)
def test_mistakes_are_named_with_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=f"classes.yaml(, line 1)?: .*{message}"):
        load_classes(written(tmp_path, text))


def test_one_value_for_two_classes_is_an_error(tmp_path: Path) -> None:
    text = "name: a\nclasses: [{name: x, value: 1, color: '#000000'}]\nignore: [1]"
    with pytest.raises(DataError, match="lists 1 twice"):
        load_classes(written(tmp_path, text)).label_map()
