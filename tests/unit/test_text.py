"""Text from outside: encodings, limits and messages."""

import os
from pathlib import Path

import pytest

from rsseg.errors import DataError, RecipeError
from rsseg.text import MAX_BYTES, MAX_DEPTH, load_json, load_yaml, read_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_is_read_in_every_unicode_encoding(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "t.txt"
    file.write_bytes("Zürich\n草\n".encode(encoding))
    assert read_text(file, DataError) == "Zürich\n草\n"


def test_other_encodings_are_refused_with_the_line(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_bytes("a\nZürich\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"t\.txt, line 2: is not UTF-8 text\. Save"):
        read_text(file, DataError)
    file.write_bytes(b"a\0b")
    with pytest.raises(DataError, match="is not a text file"):
        read_text(file, DataError)
    file.write_bytes(b"\xff\xfea")
    with pytest.raises(DataError, match="UTF-16"):
        read_text(file, DataError)


def test_what_is_no_text_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"#" * (MAX_BYTES + 1))
    for name, message in (
        ("pipe", "not a regular file"),
        (".", "not a regular file"),
        ("none", "no such file"),
        ("large", "too many"),
        ("n" * 300, "name too long"),
        ("a\0b", "no such file|null"),
    ):
        with pytest.raises(RecipeError, match=message):
            read_text(tmp_path / name, RecipeError)


def test_plain_values_stay_text_and_only_null_and_infinities_are_converted() -> None:
    text = "a: 2024\nb: no\nc: 1.50\nd: 2024-02-31\ne: ~\nf: -.inf\ng: '~'\nh: [010, 1:30, .nan]\n3:\n"
    values = load_yaml(text, "x", RecipeError).values
    assert str(values.pop("h")) == "['010', '1:30', nan]"
    assert values == {
        "a": "2024", "b": "no", "c": "1.50", "d": "2024-02-31", "e": None, "f": float("-inf"), "g": "~", "3": None
    }  # fmt: skip


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "line 1: .*aliases expanded"),
        ("a: &a [*a]", "aliases expanded"),
        ("[" * 5000, f"line 1: .*more than {MAX_DEPTH} levels deep"),
        ("{a: " * 5000, "levels deep"),
        ("- " * 5000, "levels deep"),
        ("a: 1\nb: 2\na: 3\n", "line 3: .*key 'a' is in line 1 already"),
        ("[a, b]: 1", "key must be one word"),
        ("a: !!python/object/apply:os.system [x]", "is a tag"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: \0", "unacceptable character"),
        ("a: \ud800", "unacceptable character"),
        ("a: [", "line 1: not valid YAML"),
    ],
)
def test_yaml_that_is_no_plain_document_is_refused_at_once(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_yaml(text, "x", RecipeError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "levels deep"),
        ('{"a":' * 40 + "1" + "}" * 40, "levels deep"),
        ("1" * 5000, "digits"),
        ("{", "invalid JSON"),
        ('{"a": "\\ud800"}', "surrogates"),
        ('{"\\udc00": 1}', "surrogates"),
    ],
)
def test_json_is_parsed_under_limits(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_json(text, "x", DataError)


def test_json_within_the_limits_comes_back() -> None:
    assert load_json(b'{"a": [1, {"b": null}], "c": "x"}', "x", DataError) == {"a": [1, {"b": None}], "c": "x"}
