"""Base classes of models, and bounded numbers of recipes."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def ascending(pair: tuple[float, float]) -> tuple[float, float]:
    """The pair itself; raise `ValueError` unless it is a range."""
    if pair[0] > pair[1]:
        raise ValueError("the first value of a range must not be larger than the second")
    return pair


def _without_link(path: Path) -> Path:
    """The run that `runs/latest` names now, as later it names the run that the recipe starts."""
    link = next((place for place in (path, *path.parents) if place.is_symlink()), None)
    return path if link is None else link.parent / link.readlink() / path.relative_to(link)


ModelPath = Annotated[Path, AfterValidator(_without_link)]
"""Model file or run folder; a link such as `runs/latest` is replaced by what it names."""

# Upper limits keep a typing error from exhausting the memory.
Positive = Annotated[float, Field(gt=0, le=1e9)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Whole = Annotated[int, Field(ge=0, le=10**9)]
Batch = Annotated[int, Field(ge=1, le=65_536)]
Width = Annotated[int, Field(ge=1, le=8192)]
"""Channels of a layer."""
Depth = Annotated[int, Field(ge=1, le=64)]
"""Layers of one kind, heads of an attention, or levels."""
Side = Annotated[int, Field(ge=1, le=16_384)]
"""Side of an image, a crop or a grid, in pixels."""
Index = Annotated[int, Field(ge=0, lt=64)]
"""Level of a pyramid or block of a ViT, from 0."""
Scale = Annotated[float, Field(gt=0, le=100)]
Range = Annotated[tuple[Scale, Scale], AfterValidator(ascending)]


class Result(BaseModel):
    """Base of everything that is computed and reported: immutable."""

    model_config = ConfigDict(frozen=True)


class Strict(BaseModel):
    """Base of all recipe parts: immutable, and a misspelt key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
