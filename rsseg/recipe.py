"""Recipes: the union of all methods' recipes, read from YAML with errors that name file, line, key and remedy."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple, get_args

import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from rsseg.config import BaseRecipe
from rsseg.errors import RecipeError, UsageError
from rsseg.methods.dasegnet.recipe import DASegNetRecipe
from rsseg.methods.ktda.recipe import KTDARecipe
from rsseg.methods.mtdf.recipe import MTDFRecipe
from rsseg.methods.supervised.recipe import SupervisedRecipe
from rsseg.text import YamlDocument, load_yaml, read_text, shortened

Recipe = Annotated[SupervisedRecipe | KTDARecipe | MTDFRecipe | DASegNetRecipe, Field(discriminator="method")]
MEMBERS: tuple[type[BaseRecipe], ...] = (SupervisedRecipe, KTDARecipe, MTDFRecipe, DASegNetRecipe)
METHODS: tuple[str, ...] = tuple(get_args(member.model_fields["method"].annotation)[0] for member in MEMBERS)


class Flag(NamedTuple):
    """A value from an option of the command line."""

    key: str
    """Key path."""
    value: object
    option: str
    """Name for messages, such as `--steps`."""


Override = str | tuple[str, object] | Flag
"""`key.path=value`, where the value is YAML, or key path and value."""

_ADAPTER: TypeAdapter[Recipe] = TypeAdapter(Recipe)
_SHOWN = 20
"""Maximum number of problems listed."""


RENAMED: Mapping[str, str] = MappingProxyType(
    {
        "kind": "type",
        "taps": "out_indices",
        "start_from": "start",
        "norm_taps": "out_norm",
        "ce_divisor": "loss_divisor",
        "cross_entropy_divisor": "loss_divisor",
        "pseudo_divisor": "loss_divisor",
        "decoder_lr_scale": "head_lr_scale",
        "norm_weight_decay": "weight_decay_exempt",
        "ema": "ship: average, with ema_decay, at the top level of the recipe",
    }
)
"""Last part of an old key -> what to write instead."""


@dataclass(frozen=True)
class RecipeSource:
    """Text of a recipe, and the name of its file in messages."""

    label: str
    text: str


def packaged_recipes() -> dict[str, Path]:
    """File name -> path of the recipes that come with rsseg, sorted by name."""
    installed = Path(__file__).parent / "_recipes"
    folder = installed if installed.is_dir() else Path(__file__).parents[1] / "recipes"
    return {path.name: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of that path or name, else a packaged recipe (`.yaml` may be left out).

    Raises:
        RecipeError: there is none; the message names the nearest packaged recipe.
    """
    packaged = packaged_recipes()
    try:
        for candidate in (Path(name), Path(f"{name}.yaml")):
            if candidate.is_file():
                return candidate
            if candidate.name == str(candidate) and candidate.name in packaged:
                return packaged[candidate.name]
        if Path(name).exists():
            raise RecipeError(f"{name}: is not a regular file. Give a recipe file.")
    except OSError as error:
        raise RecipeError(f"{shortened(name)}: {error.strerror}. Give a recipe file.") from None
    near = difflib.get_close_matches(Path(name).stem, [Path(file).stem for file in packaged], n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise RecipeError(f"{name}: no such recipe file. {hint}`rsseg recipe ls` lists the packaged recipes.")


def read_recipe(name: str) -> RecipeSource:
    """The text of a recipe; raises `RecipeError` where there is none or it is no text, see `find_recipe`."""
    path = find_recipe(name)
    return RecipeSource(str(path), read_text(path, RecipeError))


def load_recipe(name: str, overrides: Sequence[Override] = (), *, method: str | None = None) -> Recipe:
    """Read and validate a recipe.

    Args:
        name: path or packaged name.
        overrides: validated together with the file.
        method: must agree with the recipe's own, if given.

    Raises:
        RecipeError: one line per problem: file and line or option, key path, problem, nearest valid key.
        UsageError: the same, if all problems are values of a `Flag`.
    """
    return parse_recipe(read_recipe(name), overrides, method=method)


def parse_recipe(source: RecipeSource, overrides: Sequence[Override] = (), *, method: str | None = None) -> Recipe:
    """Validate a recipe's text; see `load_recipe`."""
    document = load_yaml(source.text, source.label, RecipeError)
    values = document.values
    if not isinstance(values, dict):
        raise RecipeError(f"{source.label}: a recipe is a mapping of keys to values; this file has none.")
    options: dict[tuple[str, ...], str] = {}
    for override in overrides:
        key = _apply_override(values, override)
        options[tuple(key.split("."))] = override.option if isinstance(override, Flag) else f"--set {key}"
    recipe = _validated(values, source.label, document, options)
    if method is not None and method != recipe.method:
        raise RecipeError(
            f"{source.label}: the recipe is for method {recipe.method!r}, but --method says {method!r}. "
            "Leave --method out, or choose another recipe."
        )
    return recipe


def recipe_from_dict(values: dict[str, Any], label: str) -> Recipe:
    """Validate a recipe stored as JSON, in a model file or a run folder."""
    return _validated(values, label, YamlDocument(values))


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of all recipes, for editors."""
    return _ADAPTER.json_schema()


def dump_recipe(recipe: Recipe) -> str:
    """The fully resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _validated(
    values: dict[str, Any], label: str, document: YamlDocument, options: Mapping[tuple[str, ...], str] | None = None
) -> Recipe:
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        problems = _joined(error.errors(), values)
        found = [_explain(problem, label, document, values, options or {}) for problem in problems[:_SHOWN]]
        lines = [f"{where}: {what}" for where, what in found]
        lines += [f"{label}: {len(problems) - _SHOWN} more problems."] if len(problems) > _SHOWN else []
        flags = all(where.startswith("--") and not where.startswith("--set ") for where, _ in found)
        raise (UsageError if flags else RecipeError)("\n".join(lines)) from None


def _joined(problems: Sequence[Any], values: dict[str, Any]) -> list[dict[str, Any]]:
    """One problem per value: a value that fits no alternative, such as a number or `auto`, has one for each."""
    joined: dict[tuple[Any, ...], dict[str, Any]] = {}
    messages: dict[tuple[Any, ...], dict[str, None]] = {}
    for problem in problems:
        place = _place(problem, values)
        joined.setdefault(place, {**problem, "loc": place})
        messages.setdefault(place, {})[problem["msg"].removeprefix("Value error, ")] = None
    return [problem | {"msg": " or ".join(messages[place])} for place, problem in joined.items()]


def _place(problem: Any, values: dict[str, Any]) -> tuple[Any, ...]:
    """Keys and indices of a problem in the recipe, without the names of method and alternative that Pydantic adds."""
    place: tuple[Any, ...] = problem["loc"]
    if place and place[0] in METHODS:
        place = place[1:]
    node: Any = values
    for depth, part in enumerate(place):
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            return place if problem["type"] == "missing" else place[:depth]
    return place


def _apply_override(values: dict[str, Any], override: Override) -> str:
    """Set a value; return its key path."""
    if isinstance(override, str):
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise RecipeError(f"--set {shortened(override)}: write it as key.path=value, such as trainer.steps=100.")
        value = load_yaml(text, f"--set {key}", RecipeError).values
    else:
        key, value = override[:2]
    *parents, leaf = key.split(".")
    node = values
    for part in parents:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise RecipeError(f"--set {key}: {part} is {shortened(child)} in the recipe, it has no key {leaf!r}.")
        node = child
    node[leaf] = value
    return key


def _explain(
    problem: Any, label: str, document: YamlDocument, values: dict[str, Any], options: Mapping[tuple[str, ...], str]
) -> tuple[str, str]:
    """Place and description of one Pydantic error."""
    path = problem["loc"]
    line = document.line_of(path)
    where = f"{label}, line {line}" if line else label
    parts = tuple(str(part) for part in path)
    where = next((option for given, option in options.items() if parts[: len(given)] == given), where)
    key = ".".join(str(part) for part in path)[:200]
    match problem["type"]:
        case "extra_forbidden" if path[-1] in RENAMED:
            return where, f"unknown key {key!r}. It was renamed: write {RENAMED[path[-1]]}."
        case "extra_forbidden":
            near = difflib.get_close_matches(str(path[-1]), _keys_at(values, path[:-1]), n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            return where, f"unknown key {key!r}.{hint}"
        case "missing":
            return where, f"{key!r} is missing."
        case "union_tag_not_found":
            return where, f"'method' is missing; it is one of {', '.join(METHODS)}."
        case "union_tag_invalid":
            return where, f"method {shortened(values.get('method'))} is unknown; it is one of {', '.join(METHODS)}."
    message = problem["msg"]
    shown = "" if isinstance(problem["input"], dict) else f" (found {shortened(problem['input'])})"
    return where, f"{key + ': ' if key else ''}{message}{shown}."


def _keys_at(values: dict[str, Any], path: Sequence[Any]) -> list[str]:
    """Valid keys of the part of a recipe at `path`."""
    models: list[Any] = [m for m, name in zip(MEMBERS, METHODS, strict=True) if name == values.get("method")]
    for part in path:
        models = [
            model
            for owner in models
            for model in (
                _models_in(owner.model_fields[part].annotation)
                if part in getattr(owner, "model_fields", {})
                else [owner]  # a key of a mapping or an item of a list: its model is that of the step before
            )
        ]
    return [name for model in models for name in model.model_fields]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every Pydantic model in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
