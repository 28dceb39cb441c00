"""The class file of your own dataset (`classes.yaml`)."""

import colorsys
import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from rsseg.data.index import LabelMap
from rsseg.errors import DataError
from rsseg.task import IGNORE_INDEX, ClassInfo, Color
from rsseg.text import load_yaml, read_text


def _color(value: Any) -> Any:
    """`"#3C1098"` -> (60, 16, 152); other values are left to the validation."""
    if isinstance(value, str) and len(value) == 7 and value.startswith("#"):
        try:
            return tuple(bytes.fromhex(value[1:]))
        except ValueError:
            return value
    return value


_MOST_CLASSES = 254
_MOST_LINES = 20
"""Maximum number of problems listed in an error."""
MaskValue = Annotated[int, Field(ge=-(1 << 31), lt=1 << 32)]
HexColor = Annotated[Color, BeforeValidator(_color)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ClassEntry(_Part):
    """One class."""

    name: Annotated[str, Field(pattern=r"^[^\x00-\x1f]{1,100}$")]
    color: HexColor
    """`"#RRGGBB"` or [red, green, blue]."""
    value: MaskValue | None = None
    """Its mask value."""
    also: tuple[MaskValue, ...] = ()
    """Further mask values of the class."""
    also_colors: tuple[HexColor, ...] = ()
    """Further mask colours of the class."""
    also_names: tuple[str, ...] = ()
    """Further attribute values of the class in vector labels."""


class ClassFile(_Part):
    """Classes in index order, ignored values, and facts that the files do not state."""

    name: Annotated[str, Field(pattern=r"^\w[\w .-]*$", max_length=100)]
    """Name of the task, and of the prepared folder unless --out is given."""
    classes: Annotated[tuple[ClassEntry, ...], Field(min_length=1, max_length=254)]
    labels: str | None = Field(default=None, pattern="^(values|colors)$")
    """Whether masks store `values` or `colors`; by default values if classes have them."""
    ignore: tuple[MaskValue, ...] = ()
    """Mask values without a class."""
    ignore_colors: tuple[HexColor, ...] = ()
    """Mask colours without a class."""
    ignore_names: tuple[str, ...] = ()
    """Attribute values of vector labels that are drawn as ignored pixels."""
    bands: tuple[str, ...] | None = None
    """Band names in file order; by default those of the files."""
    gsd_m: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Ground sampling distance in metres."""
    nodata: float | None = None
    """Nodata value of every band, instead of the declared one; NaN is added to it."""
    ignore_zero_collar: bool = False
    """Treat pixels that are 0 in every band as nodata."""

    @model_validator(mode="after")
    def _all_have_labels(self) -> Self:
        names = [entry.name for entry in self.classes]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two classes are named {twice[0]!r}")
        if self.bands is not None and (not all(self.bands) or len(set(self.bands)) < len(self.bands)):
            raise ValueError(f"bands must be different names, not {', '.join(self.bands)!r}")
        unvalued = [entry.name for entry in self.classes if entry.value is None]
        if not self.by_color and unvalued:
            raise ValueError(f"class {unvalued[0]!r} has no value; give every class one, or set `labels: colors`")
        return self

    @property
    def by_color(self) -> bool:
        """Whether masks are colour-coded."""
        return self.labels == "colors" or (self.labels is None and all(entry.value is None for entry in self.classes))

    def class_infos(self) -> tuple[ClassInfo, ...]:
        """Classes of the task; their values are the mask values if these are in 0..254, else the indices."""
        values = [entry.value for entry in self.classes]
        keep = len(set(values)) == len(values) and all(v is not None and 0 <= v <= 254 for v in values)
        return tuple(
            ClassInfo(name=entry.name, value=entry.value if keep and entry.value is not None else i, color=entry.color)
            for i, entry in enumerate(self.classes)
        )

    def label_map(self) -> LabelMap:
        """Mask value or colour -> class index; raises `DataError` if two classes share one."""
        if self.by_color:
            pairs = [(c, i) for i, entry in enumerate(self.classes) for c in (entry.color, *entry.also_colors)]
            pairs += [(color, IGNORE_INDEX) for color in self.ignore_colors]
            _check_unique([color for color, _ in pairs])
            return LabelMap(colors=tuple(pairs))
        values = [(v, i) for i, e in enumerate(self.classes) for v in (e.value, *e.also) if v is not None]
        values += [(value, IGNORE_INDEX) for value in self.ignore]
        _check_unique([value for value, _ in values])
        return LabelMap(values=dict(values))

    def attribute_values(self) -> dict[str, int]:
        """Attribute value of vector labels as text (names, numbers) -> class index; raises `DataError` if ambiguous."""
        found: dict[str, int] = {}
        names = [(name, i) for i, entry in enumerate(self.classes) for name in (entry.name, *entry.also_names)]
        numbers = [(str(v), i) for i, e in enumerate(self.classes) for v in (e.value, *e.also) if v is not None]
        ignored = [(str(name), IGNORE_INDEX) for name in (*self.ignore_names, *self.ignore)]
        for text, index in (*names, *numbers, *ignored):
            if found.setdefault(text, index) != index:
                raise DataError(f"the class file gives the attribute value {text!r} two meanings.")
        return found


def classes_from(values: Iterable[str], name: str, background: str | None = None) -> ClassFile:
    """A class file for the values of an attribute, in order, with distinct colours.

    Args:
        values: attribute values as text; numbers are also the mask values if all are in 0..254.
        name: of the dataset.
        background: name of a further, first class.

    Raises:
        DataError: more values than a dataset can have classes.
    """
    found = sorted(set(values) - {"", background or ""}, key=lambda text: (not text.isdecimal(), len(text), text))
    if not all(text.isdecimal() for text in found):
        found.sort()
    names = [*([background] if background is not None else []), *found]
    if len(names) > _MOST_CLASSES:
        raise DataError(
            f"the field has {len(names)} different values, too many for classes, such as {', '.join(names[:3])}. "
            "Choose another one with --field, or give --classes."
        )
    by_number = background is None and all(text.isdecimal() and int(text) <= 254 for text in names)
    entries = [
        {"name": text, "value": int(text) if by_number else i, "color": _distinct_color(i)}
        for i, text in enumerate(names)
    ]
    return _validated({"name": re.sub(r"[^\w .-]|^\W", "_", name)[:100], "classes": entries}, "--field")


def class_file_text(classes: ClassFile) -> str:
    """The YAML of a class file."""
    content = classes.model_dump(mode="json", exclude_defaults=True)
    for entry, own in zip(content["classes"], classes.classes, strict=True):
        entry["color"] = "#{:02x}{:02x}{:02x}".format(*own.color)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None)


def _distinct_color(number: int) -> Color:
    """Colours far apart on the colour wheel, in three shades."""
    saturation, brightness = ((0.75, 0.85), (0.5, 0.95), (0.9, 0.6))[number % 3]
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, saturation, brightness)
    return round(red * 255), round(green * 255), round(blue * 255)


def _check_unique(keys: list[Any]) -> None:
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise DataError(f"the class file lists {twice[0]} twice; a mask value or colour must have one meaning.")


def load_classes(path: Path) -> ClassFile:
    """Read a class file; raises `DataError` with file, key, problem and the nearest valid key."""
    content = load_yaml(read_text(path, DataError), str(path), DataError).values
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: expected a table with `name` and `classes`. docs/examples/dubai-classes.yaml shows one."
        )
    return _validated(content, str(path))


def _validated(content: dict[str, Any], what: str) -> ClassFile:
    try:
        return ClassFile.model_validate(content)
    except ValidationError as error:
        raise DataError("\n".join(f"{what}: {line}" for line in _lines(error))) from None


def _lines(error: ValidationError) -> Iterable[str]:
    known = {*ClassFile.model_fields, *ClassEntry.model_fields}
    for problem in error.errors()[:_MOST_LINES]:
        key = ".".join(str(part)[:80] for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        line = f"{key}: {message}" if key else message
        if problem["type"] == "extra_forbidden":
            nearest = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
            line = f"{key}: unknown key" + (f"; did you mean {nearest[0]!r}?" if nearest else ".")
        yield line
