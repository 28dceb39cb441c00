"""The two regions of the demo dataset: colours of their surfaces, atmosphere, sensor."""

from dataclasses import dataclass

Rgb = tuple[float, float, float]


@dataclass(frozen=True)
class Look:
    """Appearance of a region: reflectance 0..1 of its surfaces, atmosphere and sensor."""

    crops: tuple[Rgb, ...]
    woods: tuple[Rgb, ...]
    roads: tuple[Rgb, ...]
    roofs: tuple[Rgb, ...]
    waters: tuple[Rgb, ...]
    parcel_px: tuple[float, float]
    """Range of the sides of parcels."""
    crown_px: float
    """Diameter of a tree crown."""
    haze: float
    """Share of scattered light, 0..1."""
    haze_color: Rgb
    response: tuple[Rgb, Rgb, Rgb]
    """Sensor response: rows are the output bands, columns red, green and blue of the surface."""
    gamma: float


NORTH = Look(
    crops=(
        (0.30, 0.44, 0.18), (0.22, 0.38, 0.14), (0.17, 0.29, 0.12), (0.47, 0.52, 0.25), (0.66, 0.58, 0.37),
        (0.60, 0.52, 0.40), (0.44, 0.36, 0.27), (0.33, 0.27, 0.21), (0.55, 0.53, 0.47), (0.27, 0.31, 0.19),
    ),
    woods=((0.14, 0.23, 0.11), (0.11, 0.19, 0.11), (0.20, 0.30, 0.12), (0.25, 0.28, 0.14)),
    roads=((0.44, 0.43, 0.42), (0.33, 0.33, 0.34), (0.57, 0.55, 0.51), (0.61, 0.53, 0.41)),
    roofs=(
        (0.56, 0.36, 0.27), (0.47, 0.31, 0.24), (0.36, 0.29, 0.25), (0.42, 0.42, 0.43), (0.30, 0.31, 0.33),
        (0.64, 0.60, 0.53), (0.83, 0.83, 0.82),
    ),
    waters=((0.12, 0.18, 0.20), (0.15, 0.22, 0.17), (0.19, 0.26, 0.27), (0.29, 0.29, 0.22)),
    parcel_px=(38.0, 110.0),
    crown_px=5.0,
    haze=0.04,
    haze_color=(0.75, 0.80, 0.88),
    response=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    gamma=0.85,
)  # fmt: skip
"""Temperate early summer, clear air, true colours."""

SOUTH = Look(
    crops=(
        (0.46, 0.46, 0.24), (0.36, 0.40, 0.19), (0.70, 0.58, 0.36), (0.62, 0.48, 0.31), (0.55, 0.40, 0.28),
        (0.66, 0.61, 0.48), (0.58, 0.55, 0.33), (0.45, 0.34, 0.25), (0.40, 0.36, 0.23),
    ),
    woods=((0.20, 0.25, 0.13), (0.25, 0.28, 0.15), (0.17, 0.21, 0.12)),
    roads=((0.48, 0.46, 0.44), (0.38, 0.37, 0.36), (0.62, 0.55, 0.44), (0.58, 0.52, 0.45)),
    roofs=(
        (0.72, 0.68, 0.61), (0.82, 0.80, 0.77), (0.58, 0.42, 0.32), (0.62, 0.56, 0.47), (0.45, 0.41, 0.38),
    ),
    waters=((0.20, 0.28, 0.24), (0.16, 0.24, 0.24), (0.30, 0.32, 0.25)),
    parcel_px=(26.0, 80.0),
    crown_px=6.0,
    haze=0.11,
    haze_color=(0.86, 0.81, 0.72),
    response=((0.96, 0.08, 0.0), (0.06, 0.88, 0.0), (0.02, 0.10, 0.80)),
    gamma=0.9,
)  # fmt: skip
"""Dry late summer, dusty air, small parcels, flat pale roofs, a sensor whose bands overlap."""
