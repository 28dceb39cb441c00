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


def test_text_of_windows_and_numbers_as_names_are_read(tmp_path: Path) -> None:
    text = 'name: 2024\nclasses: [{name: no, value: 1, color: "#000001"}, {name: 1.5, value: 2, color: [0, 0, 2]}]'
    for number, content in enumerate((f"\ufeff{text}".encode(), text.encode("utf-16"))):
        (tmp_path / f"{number}.yaml").write_bytes(content)
        read = load_classes(tmp_path / f"{number}.yaml")
        assert (read.name, [entry.name for entry in read.classes]) == ("2024", ["no", "1.5"])
    (tmp_path / "c.yaml").write_bytes("name: Zürich".encode("cp1252"))
    with pytest.raises(DataError, match=r"c\.yaml, line 1: is not UTF-8"):
        load_classes(tmp_path / "c.yaml")


BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "aliases expanded"),
        ("classes: " + "[" * 5000, "nested more than"),
        ("name: a\nname: b", "already"),
        ("name: !!python/object:os.system x", "tag"),
        ("name: a\nclasses: [{name: x, color: '#000000', value: " + "9" * 5000 + "}]", r"classes\.0\.value"),
        ("name: a\nclasses: [{name: x, color: '#000000', value: 1e30}]", r"classes\.0\.value"),
        ("name: a\ngsd_m: .inf\nclasses: [{name: x, color: '#000000'}]", "gsd_m"),
        ("name: " + "n" * 300 + "\nclasses: [{name: x, color: '#000000'}]", "name"),
        ("name: a\nclasses: [{name: x, color: '#000000'}, {name: x, color: '#000001'}]", "two classes are named 'x'"),
        ("name: a\nbands: [red, red]\nclasses: [{name: x, color: '#000000'}]", "bands must be different"),
    ],
)
def test_hostile_and_contradictory_class_files_end_quickly(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "classes.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        load_classes(tmp_path / "classes.yaml")
