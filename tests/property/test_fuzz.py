"""Files and arguments of any content, through the real command line: each answer is one of the documented exit codes.

`RSSEG_FUZZ_SECONDS=1800` runs with fresh examples for that long instead of the fixed ones.
"""

import io
import json
import os
import random
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from rsseg.checkpoint import METADATA_KEY, ModelHeader, write_model
from rsseg.cli import run
from rsseg.methods.registry import segmenter_for
from rsseg.recipe import dump_recipe, load_recipe, packaged_recipes, recipe_from_dict, recipe_schema
from tests.conftest import write_tif
from tests.toys import make_task

SECONDS = float(os.environ.get("RSSEG_FUZZ_SECONDS", "0"))
CODES = {0, 2, 3, 4, 5, 6, 7, 8}
SLOWEST = 20
"""Seconds of the processor that one call may take, far more than any should."""

CLASS_FILE = """\
name: mine
labels: values
bands: [red, green, blue]
nodata: 0
ignore: [9]
classes:
  - {name: field, value: 1, color: "#ff0000"}
  - {name: road, value: 2, color: [0, 255, 0], also: [3, 4]}
"""
NETWORKS = sorted((Path(__file__).parents[1] / "conformance" / "recipes").glob("*.yaml"))
SQUARE = [[500010, 3999990], [500200, 3999990], [500200, 3999800], [500010, 3999990]]
AREA = {
    "type": "FeatureCollection",
    "crs": {"type": "name", "properties": {"name": "EPSG:32631"}},
    "features": [
        {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [SQUARE]}},
        {"type": "Feature", "properties": None, "geometry": {"type": "MultiPolygon", "coordinates": [[SQUARE]]}},
    ],
}

texts = st.text(max_size=12)
numbers = st.sampled_from([0, -1, 2, 255, 256, 10**6, 2**31, 2**63, 10**30, -(10**12), 1e308, -1e-320])
small = st.one_of(st.integers(1, 64), st.sampled_from([0.1, 0.5, 128, 512]))


def words_in(schema: Any) -> list[str]:
    """All words that a JSON schema allows."""
    if isinstance(schema, list):
        return [word for part in schema for word in words_in(part)]
    if not isinstance(schema, dict):
        return []
    own = [word for word in (*schema.get("enum", ()), schema.get("const")) if isinstance(word, str)]
    return own + [word for part in schema.values() for word in words_in(part)]


words = st.sampled_from(sorted({*words_in(recipe_schema()), "resnet_mini", "vit_mini_patch8", "mit_mini"}))
"""With these and small numbers, recipes stay valid that may not fit together."""
odd_json: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([None, True, False, "", [], {}, "\0", "é" * 300, "../..", "[/x]", "\ud83d\ude00", "\x1b[2J"]),
    st.sampled_from([float("nan"), float("inf"), [[[[]]]], {"a": {"b": {}}}, "vit_large_patch14_clip"]),
    numbers,
    small,
    words,
    texts,
    st.lists(st.one_of(numbers, small), max_size=5),
    st.dictionaries(texts, numbers, max_size=3),
)
odd_yaml = st.one_of(
    st.sampled_from(["9" * 5000, ".inf", "1e400", ".nan", "-1", "true", "null", "[]", "{}", "*a", "&a b", "&a [*a]"]),
    st.sampled_from(["2024-13-45", "!!int x", "!!python/name:os.system", "'", '"\\x"', "|", ">-\n\n", "? a", "<<: *a"]),
    st.sampled_from(["{a: {b: [c]}}", "[" * 40, "- " * 40, "{a: " * 40, "%", "@", "\t", "1:30", "0x1F", "n" * 400]),
    numbers.map(str),
    texts,
)


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder: a model, a scene, an image and its mask."""
    folder, before = tmp_path_factory.mktemp("fuzz"), Path.cwd()
    task = make_task()
    for number, file in enumerate(NETWORKS):
        recipe = recipe_from_dict(yaml.safe_load(file.read_text()), file.name)
        header = ModelHeader(
            recipe=recipe.model_dump(mode="json"),
            task=task,
            backbones={"student": {"name": "mini", "license": "none"}},
            training={"step": 1, "weights": "student"},
            made_with={"rsseg": "0.1.0"},
        )
        torch.manual_seed(0)
        write_model(folder / f"model{number}.safetensors", segmenter_for(recipe, task).state_dict(), header)
    pixels = np.random.default_rng(0).integers(0, 255, (3, 24, 30), np.uint8)
    for name in ("scene.tif", "images/a.tif", "images/b.tif"):
        write_tif(folder / name, pixels)
    for name in ("a", "b"):
        write_tif(folder / f"masks/{name}.tif", pixels[:1] % 4 + 1)
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield folder
    os.chdir(before)


def answer(*arguments: str) -> int:
    """Run one command line; a bug, a traceback or a long time fails the test."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace")]
    before, started = (sys.stdout, sys.stderr), time.process_time()
    sys.stdout, sys.stderr = streams
    try:
        code = run(list(arguments))
        for stream in streams:
            stream.flush()
    finally:
        sys.stdout, sys.stderr = before
    said = "".join(stream.buffer.getvalue().decode() for stream in streams)
    assert code in CODES, f"{arguments}: exit {code}\n{said}\n" + "\n".join(
        file.read_text() for file in Path("cache").rglob("rsseg-bug-*")
    )
    assert "Traceback" not in said
    assert "bug in rsseg" not in said
    assert time.process_time() - started < SLOWEST, arguments
    return code


def repeatedly(check: Callable[[], None]) -> None:
    """Once, or again until the time is over."""
    end = time.monotonic() + SECONDS / 8
    check()
    while time.monotonic() < end:
        check()


def examples(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=not SECONDS,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,) if SECONDS else (Phase.generate, Phase.shrink),
        print_blob=False,
    )


def places_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all parts of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(below for key, item in items for below in places_in(item, (*path, key)))]


@st.composite
def changed_json(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with parts replaced, removed or added."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places_in(value)))
        how = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if not path:
            value = draw(odd_json) if how == "replace" and draw(st.booleans()) else value
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        if how == "replace":
            parent[path[-1]] = draw(odd_json)
        elif how == "remove":
            del parent[path[-1]]
        elif isinstance(parent, dict):
            parent[draw(texts)] = draw(odd_json)
        else:
            parent.append(draw(odd_json))
    return value


@st.composite
def changed_text(draw: st.DrawFn, text: str) -> bytes:
    """Lines of a YAML text with values replaced, lines removed, repeated, moved or indented; or other bytes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode)))
    lines = text.splitlines()
    for _ in range(draw(st.integers(1, 4))):
        i = draw(st.integers(0, len(lines) - 1))
        match draw(st.sampled_from(["value", "value", "value", "remove", "repeat", "indent", "insert"])):
            case "value":
                lines[i] = f"{lines[i].partition(':')[0]}: {draw(odd_yaml)}"
            case "remove":
                lines[i] = ""
            case "repeat":
                lines.insert(draw(st.integers(0, len(lines))), lines[i])
            case "indent":
                lines[i] = " " * draw(st.integers(0, 5)) + lines[i].lstrip()
            case "insert":
                lines.insert(i, draw(odd_yaml))
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "cp1252"]))
    return "\n".join(lines).encode(encoding, "replace")


RECIPES = [path.read_text(encoding="utf-8") for path in packaged_recipes().values()]


def test_recipes_of_any_text_are_valid_or_exit_3() -> None:
    @examples(120)
    @given(content=st.sampled_from(RECIPES).flatmap(changed_text))
    def check(content: bytes) -> None:
        Path("r.yaml").write_bytes(content)
        assert answer("recipe", "show", "r.yaml") in (0, 3)

    repeatedly(check)


def test_overrides_of_any_text_are_valid_or_exit_3() -> None:
    names = ("grass", "deepglobe-1pct", "dasegnet-recommended", "demo-ktda")
    values = {name: parse_values(dump_recipe(load_recipe(name))) for name in names}
    keys = [(name, ".".join(map(str, path))) for name, value in values.items() for path in places_in(value) if path]

    @examples(120)
    @given(where=st.sampled_from(keys), value=odd_yaml, other=texts)
    def check(where: tuple[str, str], value: str, other: str) -> None:
        name, key = where
        assert answer("recipe", "validate", name, "--set", f"{key}={value}", "--set", f"{other}{key}={value}") in (0, 3)
        assert answer("recipe", "validate", name, "--set", f"{key}={value}") in (0, 3)

    repeatedly(check)


def parse_values(text: str) -> Any:
    from rsseg.errors import RecipeError
    from rsseg.text import load_yaml

    return load_yaml(text, "x", RecipeError).values


def parts_of(model: Path) -> tuple[dict[str, Any], bytes]:
    """JSON header and data of a safetensors file."""
    content = model.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_parts(header: Any, data: bytes, *, metadata: Any = ...) -> None:
    if metadata is not ...:
        header = header | {"__metadata__": {METADATA_KEY: json.dumps(metadata)}}
    text = json.dumps(header).encode()
    Path("odd.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def ask_of_the_odd_model() -> None:
    answer("info", "odd.safetensors")
    answer("info", "odd.safetensors", "--json")
    answer("predict", "scene.tif", "--model", "odd.safetensors", "-o", "o.tif", "--tile", "32", "--dry-run")
    answer("eval", "--model", "odd.safetensors", "--data", "nowhere")


def test_models_with_any_header_predict_or_are_refused(place: Path) -> None:
    models = [parts_of(place / f"model{number}.safetensors") for number in range(len(NETWORKS))]

    @examples(40)
    @given(which=st.integers(0, len(models) - 1), draw=st.data())
    def check(which: int, draw: st.DataObject) -> None:
        header, data = models[which]
        write_parts(header, data, metadata=draw.draw(changed_json(json.loads(header["__metadata__"][METADATA_KEY]))))
        ask_of_the_odd_model()

    repeatedly(check)


def test_models_with_any_tensors_predict_or_are_refused(place: Path) -> None:
    header, data = parts_of(place / "model0.safetensors")

    @examples(25)
    @given(changed=changed_json(header), cut=st.integers(0, 9), random_bytes=st.randoms(use_true_random=False))
    def check(changed: Any, cut: int, random_bytes: random.Random) -> None:
        kept = data
        if cut == 0:
            kept = data[: random_bytes.randrange(len(data))]
        elif cut == 1:
            at = random_bytes.randrange(len(data) - 400)
            kept = data[:at] + random_bytes.randbytes(400) + data[at + 400 :]
        write_parts(header if cut == 1 else changed, kept)
        if cut == 2:
            Path("odd.safetensors").write_bytes(random_bytes.randbytes(random_bytes.randrange(2000)))
        ask_of_the_odd_model()

    repeatedly(check)


def predict(*more: str) -> int:
    options = ("-o", "out.tif", "--overwrite", "--format", "gtiff", "--tile", "32", "--device", "cpu")
    return answer("predict", *more, "--model", "model0.safetensors", *options)


def test_areas_of_interest_of_any_content_are_predicted_or_refused() -> None:
    @examples(30)
    @given(changed=changed_json(AREA), binary=st.binary(max_size=40), which=st.integers(0, 9))
    def check(changed: Any, binary: bytes, which: int) -> None:
        Path("area.geojson").write_bytes(binary if which == 0 else json.dumps(changed).encode())
        assert predict("scene.tif", "--aoi", "area.geojson") in (0, 2, 4)

    repeatedly(check)


def test_class_files_of_any_content_are_used_or_refused() -> None:
    @examples(40)
    @given(content=changed_text(CLASS_FILE))
    def check(content: bytes) -> None:
        Path("classes.yaml").write_bytes(content)
        arguments = ("--classes", "classes.yaml", "--images", "images/*.tif", "--masks", "masks/*.tif")
        answer("dataset", "prepare", "folder", "--src", ".", "--out", "made", *arguments, "--overwrite", "--jobs", "1")

    repeatedly(check)


lists = st.one_of(
    st.binary(max_size=100),
    st.lists(
        st.one_of(st.sampled_from(["scene.tif", "images/a.tif", "a.tif", "#", " ", "x" * 300, "\0", "/", ".."]), texts),
        max_size=4,
    ).flatmap(
        lambda lines: st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp1252"]).map(
            lambda encoding: "\n".join(lines).encode(encoding, "replace")
        )
    ),
)


def test_lists_of_scenes_of_any_content_are_predicted_or_refused() -> None:
    @examples(40)
    @given(content=lists)
    def check(content: bytes) -> None:
        Path("list.txt").write_bytes(content)
        answer("predict", "list.txt", "--model", "model0.safetensors", "--tile", "32", "--dry-run", "-o", "outputs")

    repeatedly(check)


def test_lists_of_a_split_of_any_content_are_used_or_refused() -> None:
    Path("good.yaml").write_text(CLASS_FILE)

    @examples(40)
    @given(content=lists)
    def check(content: bytes) -> None:
        Path("list.txt").write_bytes(content)
        arguments = ("--classes", "good.yaml", "--images", "images/*.tif", "--split-list", "train=list.txt")
        answer("dataset", "prepare", "folder", "--src", ".", "--out", "made", *arguments, "--overwrite", "--jobs", "1")

    repeatedly(check)
