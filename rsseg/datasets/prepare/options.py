"""Options of `rsseg dataset prepare`."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from rsseg.errors import UsageError
from rsseg.task import Color
from rsseg.vector.read import split_layer

Count = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=1, le=1 << 16)]
Label = Annotated[int, Field(ge=-(1 << 31), lt=1 << 32)]
"""Mask value without a class."""
Bound = Annotated[float, Field(allow_inf_nan=False)]


class FolderOptions(BaseModel):
    """How to read a folder of your own; see `rsseg.datasets.layouts` for patterns."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    classes: Path
    """Class file (YAML)."""
    images: str
    """Pattern of the images, or one per band joined by `|`, such as `{split}/images/*.jpg`."""
    masks: str | None = None
    """Pattern of the masks, such as `{split}/masks/*.png`."""
    unlabeled: tuple[str, ...] = ()
    """Splits whose masks are never opened."""
    split_as: Mapping[str, str] = {}
    """Match of `{split}` -> `SPLIT` or `SPLIT:DOMAIN`."""
    split_lists: Mapping[str, Path] = {}
    """`SPLIT` or `SPLIT:DOMAIN` -> text file with one image per line, as a path below the source or a name."""


class VectorOptions(BaseModel):
    """How to draw the labels of a vector file on scenes; see `rsseg.vector.labels`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    labels: Path
    """Vector file."""
    layer: str | None = None
    """Layer of the file; None takes the only one."""
    field: str | None = None
    """Attribute with the class, as name or number."""
    classes: Path | None = None
    """Class file (YAML); None takes the values of the attribute as classes."""
    labels_crs: str | None = None
    """Coordinate system of a file that states none."""
    extent: Path | None = None
    """Vector file with polygons in which the labels are complete; pixels outside them are ignored."""
    extent_layer: str | None = None
    """Its layer; None takes the polygons of all layers."""
    background: str | None = None
    """Class of unlabeled pixels; None ignores them."""
    touched: Literal["centre", "all"] = "centre"
    """Pixels of a polygon: those whose centre lies inside, or all that it touches."""
    buffer: Bound = 0.0
    """Metres by which polygons are widened, or narrowed if negative."""
    width: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Metres, of lines and points."""
    priority: tuple[str, ...] = ()
    """Classes that cover others, the uppermost first; the others lie below in the order of the file."""
    strict: bool = False
    """Defects of the labels are errors."""
    images: str | None = None
    """Pattern of the scenes; None takes every raster below the source."""
    split_field: str | None = None
    """Attribute with the split."""
    split_block: Side | None = None
    """Side in pixels of square blocks, which are distributed over the splits."""
    split_as: Mapping[str, str] = {}
    """Match of `{split}` or value of `split_field` -> `SPLIT` or `SPLIT:DOMAIN`."""
    split_lists: Mapping[str, Path] = {}
    """As for `folder`."""

    @model_validator(mode="after")
    def _one_split(self) -> Self:
        ways = {
            "--split-field": self.split_field,
            "--split-block": self.split_block,
            "--split-list": self.split_lists,
            "{split} in --images": self.images is not None and "{split}" in self.images,
        }
        given = [name for name, value in ways.items() if value]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other")
        return self


class PrepareOptions(BaseModel):
    """Source, output and conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    out: Path | None = None
    """Folder to make; `data/NAME` by default."""
    src: Path | None = None
    """Folder, zip or tar with the dataset as its publisher ships it."""
    download: bool = False
    """Allow downloading the archive."""
    offline: bool = False
    """Never use the network."""
    overwrite: bool = False
    """Replace `out`."""
    tile: Side | None = None
    """Cut images into squares of this many pixels; None keeps them whole."""
    stride: Side | None = None
    """Distance between squares; None: `tile`, without overlap."""
    jobs: Count = Field(default_factory=lambda: os.cpu_count() or 1)
    """Threads, by default one per processor; the result does not depend on their number."""
    bands: tuple[str, ...] | None = None
    """For `folder`: band names in file order, instead of those of the class file or the images. For a known dataset:
    the bands to keep, in this order."""
    split: str | None = None
    """Name of one of the card's split rules; None uses the first."""
    split_ratio: Mapping[str, float] = {}
    """Split -> share of the labeled images (whole scenes), drawn with `seed` instead of a split rule."""
    subset: bool = False
    """Accept an incomplete source: leave out unpaired files and allow empty splits."""
    labels: str | None = None
    """Name of one of the card's label choices; None uses the first."""
    seed: int = 0
    """Seed of random splits."""
    ignore_classes: tuple[str, ...] = ()
    """Classes whose pixels are ignored."""
    ignore: tuple[Label | Color, ...] = ()
    """Further mask values or colours without a class."""
    stretch: Literal["none", "minmax"] = "none"
    """`minmax`: each band of each image is stretched from its least and greatest value to 8 bits."""
    scale: Literal["auto"] | tuple[Bound, Bound] = "auto"
    """Stored values that become 0 and 1: 0 and 255 for uint8, else percentiles 1 and 99 of the training images per
    band, or a fixed pair for all bands."""
    folder: FolderOptions | None = None
    """For the card `folder` only."""
    vectors: VectorOptions | None = None
    """For the card `vectors` only."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stride is not None and self.tile is None:
            raise ValueError("stride needs tile")
        if self.stride is not None and self.tile is not None and self.stride > self.tile:
            raise ValueError("stride must not be larger than tile: pixels would be lost")
        if self.bands is not None and (not all(self.bands) or len(set(self.bands)) < len(self.bands)):
            raise ValueError(f"bands must be different names, not {','.join(self.bands)!r}")
        if self.vectors is not None and self.vectors.split_block is not None:
            if self.tile is None:
                raise ValueError("split_block needs tile")
            if self.vectors.split_block < self.tile:
                raise ValueError("split_block must not be smaller than tile")
        if self.scale != "auto" and not self.scale[0] < self.scale[1]:
            raise ValueError(f"the low end of the scale must be below the high end, not {self.scale}")
        return self


FOLDER_KEYS = frozenset(FolderOptions.model_fields)
VECTOR_KEYS = frozenset(VectorOptions.model_fields)


def parse_options(name: str, values: Mapping[str, Any]) -> PrepareOptions:
    """Validate options for a card; raises `UsageError` with one line per problem that names the option."""
    own = {"folder": FOLDER_KEYS, "vectors": VECTOR_KEYS}
    given = {key for kind in own for key in values.get(kind) or {}}
    if foreign := sorted(given - own.get(name, frozenset())):
        kinds = [f"`{kind}`" for kind, keys in own.items() if foreign[0] in keys]
        flags = ", ".join(map(_flag, foreign))
        raise UsageError(f"{flags}: {_flag(foreign[0])} is for {' and '.join(kinds)}; {name} has no such option.")
    values = {key: value for key, value in values.items() if key not in own or key == name}
    try:
        return PrepareOptions.model_validate(values)
    except ValidationError as error:
        problems = [problem for problem in error.errors() if problem["type"] != "missing"]
        if len(problems) < error.error_count():
            needed = "--labels FILE and --field NAME" if name == "vectors" else "--classes FILE and --images PATTERN"
            raise UsageError(f"`{name}` needs --src DIR, {needed}; docs/datasets.md has examples.") from None
        raise UsageError("\n".join(_problem(problem) for problem in problems)) from None


def _problem(problem: ErrorDetails) -> str:
    names = [str(part) for part in problem["loc"] if part not in ("folder", "vectors")]
    option = _flag(names[0]) if names else ""
    return f"{option} {problem['msg'].removeprefix('Value error, ')} (found {problem['input']!r}).".strip()


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-").replace("lists", "list")


def parse_scale(text: str) -> Literal["auto"] | tuple[float, float]:
    """`auto` or `fixed:LOW,HIGH`; raises `UsageError`."""
    if text == "auto":
        return "auto"
    low, comma, high = text.removeprefix("fixed:").partition(",")
    try:
        if not text.startswith("fixed:") or not comma:
            raise ValueError(text)
        return float(low), float(high)
    except ValueError:
        raise UsageError(f"--scale {text}: expected auto or fixed:LOW,HIGH, such as fixed:0,10000.") from None


def drawing_values(labels: str | None, extent: str | None, priority: str | None, **others: Any) -> dict[str, Any]:
    """Values of `VectorOptions`, without options that were not given.

    Args:
        labels: `FILE` or `FILE:LAYER` of --labels.
        extent: the same of --extent.
        priority: names of classes, separated by commas.
        others: fields of `VectorOptions`.
    """
    values: dict[str, Any] = {**others, "priority": priority.split(",") if priority else None}
    for option, layer, text in (("labels", "layer", labels), ("extent", "extent_layer", extent)):
        if text is not None:
            values[option], values[layer] = split_layer(text)
    return {key: value for key, value in values.items() if value is not None and value is not False}


def parse_pairs(option: str, texts: tuple[str, ...] | list[str]) -> dict[str, str]:
    """`["a=b", "c=d"]` -> `{"a": "b", "c": "d"}`; a comma also separates pairs. Raises `UsageError`."""
    pairs = {}
    for text in (part for whole in texts for part in whole.split(",")):
        key, equals, value = text.partition("=")
        if not (key.strip() and equals and value.strip()):
            raise UsageError(f"{option} {text}: expected NAME=VALUE.")
        if key.strip() in pairs:
            raise UsageError(f"{option}: {key.strip()!r} is given twice.")
        pairs[key.strip()] = value.strip()
    return pairs


def parse_ignored(texts: Sequence[str]) -> tuple[int | Color, ...]:
    """`["77", "#0a0b0c", "10,11,12"]` -> `(77, (10, 11, 12), (10, 11, 12))`; raises `UsageError`."""
    parsed: list[int | Color] = []
    for text in texts:
        try:
            numbers = tuple(bytes.fromhex(text[1:]) if text.startswith("#") else map(int, text.split(",")))
        except ValueError:
            numbers = ()
        if len(numbers) == 1:
            parsed.append(numbers[0])
        elif len(numbers) == 3 and all(0 <= number <= 255 for number in numbers):
            parsed.append((numbers[0], numbers[1], numbers[2]))
        else:
            raise UsageError(f"--ignore {text}: expected a value such as 77, or a colour such as #0a0b0c or 10,11,12.")
    return tuple(parsed)
