"""Reference pages that follow from the code: every command with its options, every key of a recipe."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rsseg.recipe import recipe_schema
from rsseg.scene.options import SceneOptions

Schema = Mapping[str, Any]


def write_reference(folder: Path) -> None:
    """Write `commands.md` and `recipes.md` into `folder`, and `scene_options.md` for the page that includes it."""
    folder.mkdir(exist_ok=True)
    options = SceneOptions.model_json_schema()
    pages = {
        "commands.md": commands_page(),
        "recipes.md": recipes_page(recipe_schema()),
        "scene_options.md": "\n".join(_line(key, field, {}) for key, field in options["properties"].items()) + "\n",
    }
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")


def commands_page() -> str:
    """Every command with its arguments and options, from its own help."""
    command = [sys.executable, "-m", "typer", "rsseg.cli", "utils", "docs", "--name", "rsseg", "--title", "Commands"]
    return subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout


def recipes_page(schema: Schema) -> str:
    """Every key of a recipe with its type, default and meaning: shared keys once, then those of each method."""
    definitions = schema["$defs"]
    methods = {
        _constant(recipe["properties"]["method"]): recipe
        for recipe in (_resolve(choice, definitions) for choice in schema["oneOf"])
    }
    first = next(iter(methods.values()))["properties"]
    shared = [key for key in first if all(first[key] == recipe["properties"].get(key) for recipe in methods.values())]
    lines = [
        "# Recipe reference",
        "",
        "A recipe is a YAML file. `rsseg recipe cat NAME` prints a packaged one, `rsseg recipe schema` the JSON Schema",
        "for editors. Any key can be set on the command line: `--set trainer.steps=100`.",
    ]
    lines += ["", "## Every method", *_keys(first, definitions, only=shared)]
    for name, recipe in methods.items():
        own = [key for key in recipe["properties"] if key not in shared and key != "method"]
        lines += ["", f"## {name}", "", recipe.get("description", "")]
        lines += _keys(recipe["properties"], definitions, only=own)
    return "\n".join(lines) + "\n"


def _keys(properties: Schema, definitions: Schema, *, only: list[str]) -> Iterator[str]:
    """First the plain keys as one list, then a section per key that holds others."""
    nested = [key for key in only if _section(properties[key], definitions) is not None]
    yield ""
    yield from (_line(key, properties[key], definitions) for key in only if key not in nested)
    for key in nested:
        yield from _table(key, properties[key], definitions)


def _table(path: str, field: Schema, definitions: Schema) -> Iterator[str]:
    section = _section(field, definitions)
    if section is None:
        return
    path = f"{path}.NAME" if "additionalProperties" in field else path
    yield from ("", f"### {path}", "")
    words = [field.get("description", ""), section.get("description", "")]
    off = "Off by default." if field.get("default", "") is None else ""
    yield " ".join(word.replace("\n", " ") for word in (*words, off) if word)
    yield ""
    nested = {}
    for key, below in section["properties"].items():
        if _section(below, definitions) is None:
            yield _line(key, below, definitions)
        else:
            nested[f"{path}.{key}"] = below
    for below_path, below in nested.items():
        yield from _table(below_path, below, definitions)


def _line(key: str, field: Schema, definitions: Schema) -> str:
    default = f", default `{json.dumps(field['default'])}`" if "default" in field else ", required"
    meaning = field.get("description", "").replace("\n", " ")
    return f"- **`{key}`** ({_type(field, definitions)}{default}){': ' + meaning if meaning else ''}"


def _type(field: Schema, definitions: Schema) -> str:
    field = _resolve(field, definitions)
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if choices := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(_type(choice, definitions) for choice in choices)
    if field.get("type") == "array":
        return f"list of {_type(field['items'], definitions)}" if "items" in field else "list"
    return str(field.get("type", "any"))


def _section(field: Schema, definitions: Schema) -> Schema | None:
    """The object with named keys that a field holds, as such, as an option, as an element, or by a free name."""
    inner = [field[key] for key in ("items", "additionalProperties") if isinstance(field.get(key), Mapping)]
    for choice in (field, *field.get("anyOf", ()), *inner):
        if "properties" in (resolved := _resolve(choice, definitions)):
            return resolved
    return None


def _resolve(field: Schema, definitions: Schema) -> Schema:
    return definitions[field["$ref"].rpartition("/")[2]] if "$ref" in field else field


def _constant(field: Schema) -> str:
    return str(field.get("const") or field["enum"][0])
