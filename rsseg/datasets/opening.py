"""Opens the image of a dataset with the bands that the dataset has."""

from collections.abc import Sequence
from pathlib import Path

from rsseg.errors import DataError
from rsseg.raster import Raster


def open_image(
    files: Sequence[Path],
    names: Sequence[str] | None,
    *,
    nodata: float | None = None,
    zero_collar: bool = False,
) -> Raster:
    """Open for reading.

    Args:
        files: file, or one per band.
        names: of the bands, in file order; None takes all but alpha. GDAL calls the fourth band of many files alpha, so
            a file that has as many bands as there are names gives them all.
        nodata: see `Raster`.
        zero_collar: see `Raster`.

    Raises:
        DataError: an unreadable file, or another number of bands.
    """
    raster = Raster(files, nodata=nodata, zero_collar=zero_collar)
    if names is None or raster.info.count == len(names):
        return raster
    info, name = raster.info, raster.name
    raster.close()
    if info.available != len(names):
        raise DataError(f"{name}: the image has {info.count} bands, expected are {len(names)}: {', '.join(names)}.")
    return Raster(files, bands=range(1, len(names) + 1), nodata=nodata, zero_collar=zero_collar)
