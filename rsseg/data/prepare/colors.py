"""Class colours of published label images, as (red, green, blue) -> value in the converted mask; 0 is ignored later."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsseg.task import Color

ISPRS: Mapping[Color, int] = MappingProxyType(
    {
        (0, 0, 0): 0,  # object borders
        (255, 255, 255): 1,  # impervious surfaces
        (0, 0, 255): 2,  # building
        (0, 255, 255): 3,  # low vegetation
        (0, 255, 0): 4,  # tree
        (255, 255, 0): 5,  # car
        (255, 0, 0): 6,  # clutter
    }
)
"""Potsdam and Vaihingen."""

GID: Mapping[Color, int] = MappingProxyType(
    {
        (0, 0, 0): 0,
        (255, 0, 0): 1,  # built-up
        (0, 255, 0): 2,  # farmland
        (0, 255, 255): 3,  # forest
        (255, 255, 0): 3,  # meadow, merged into forest
        (0, 0, 255): 4,  # water
    }
)

CITY_OSM: Mapping[Color, int] = MappingProxyType(
    {
        (255, 255, 255): 0,  # background, a class of its own here
        (0, 0, 255): 1,  # road
        (255, 0, 0): 2,  # building
    }
)


def values_of_colors(image: NDArray[Any], colors: Mapping[Color, int], *, unknown: int = 0) -> NDArray[np.uint8]:
    """uint8 (3, H, W) red, green, blue -> uint8 (H, W); colours that are not listed become `unknown`, as published."""
    red, green, blue = image.astype(np.int32)
    keys = (red << 16) | (green << 8) | blue
    values = np.full(keys.shape, unknown, np.uint8)
    for color, value in colors.items():
        values[keys == (color[0] << 16 | color[1] << 8 | color[2])] = value
    return values
