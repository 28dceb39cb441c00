"""Adaptation of weights for red, green and blue to the bands of a task."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rsseg.errors import DataError
from rsseg.task import Task

RGB = ("red", "green", "blue")


def color_of(band: str) -> int | None:
    """Index of a band in red, green, blue by its name, ignoring case; None for any other band."""
    return RGB.index(band.lower()) if band.lower() in RGB else None


def pretrained_statistics(rgb: Sequence[float], bands: Sequence[str]) -> tuple[float, ...]:
    """One value per band: that of `rgb` for red, green and blue, the mean of the three for other bands."""
    mean = sum(rgb) / len(rgb)
    return tuple(mean if (color := color_of(band)) is None else rgb[color] for band in bands)


def data_statistics(task: Task) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the training images, scaled units.

    Raises:
        DataError: they were not measured, or a band is constant.
    """
    if task.mean is None or task.std is None:
        raise DataError(
            f"{task.name} has no mean and std, which `statistics: data` needs. "
            "Run `rsseg dataset stats` on it, or set statistics: pretrained."
        )
    if min(task.std) <= 0:
        band = task.bands[task.std.index(min(task.std))]
        raise DataError(f"band {band!r} of {task.name} is constant (std 0). Leave it out with data.bands.")
    return task.mean, task.std


def adapt_first_conv(weight: Tensor, bands: Sequence[str]) -> Tensor:
    """Convert the kernels of a first convolution to other bands than red, green, blue.

    Red, green and blue keep their kernels at any position; other bands get the mean of the three. All are scaled by
    3 / C, which preserves the response to a grey image.

    Args:
        weight: (D, 3, kh, kw), input channels red, green, blue.
        bands: C band names.

    Returns:
        (D, C, kh, kw).
    """
    mean = weight.mean(dim=1)
    colors = [color_of(band) for band in bands]
    kernels = [mean if color is None else weight[:, color] for color in colors]
    return torch.stack(kernels, dim=1) * (3 / len(bands))
