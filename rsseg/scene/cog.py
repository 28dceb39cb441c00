"""Check whether a file is a cloud-optimized GeoTIFF, from its TIFF structures.

The rules: tiled pixels, internal overviews, the directories at the front (the full image first, then overviews from
large to small), and the pixels behind them in the opposite order, so that a reader gets the small overviews first.
"""

from itertools import pairwise
from pathlib import Path

import tifffile

from rsseg.errors import DataError
from rsseg.fields import Result
from rsseg.files import is_file

_BLOCK = 512
"""Images up to this size need neither tiles nor overviews."""
_HEAD_BYTES = 300
"""A first directory from this byte on is too late, unless GDAL's structural block precedes it."""


class CogReport(Result):
    """Result of a check. `errors` break the rules; `warnings` slow down readers."""

    file: Path
    height: int
    width: int
    overviews: tuple[int, ...]
    """Reduction factor of each overview."""
    block: tuple[int, int]
    """Rows and columns of a stored block."""
    compression: str
    errors: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def is_valid(self) -> bool:
        """Whether there is neither an error nor a warning."""
        return not self.errors and not self.warnings


def check_cog(path: Path) -> CogReport:
    """Check the layout of a file.

    Raises:
        DataError: no such file, or no TIFF that can be read.
    """
    if not is_file(path):
        raise DataError(f"{path}: there is no such file.")
    try:
        with tifffile.TiffFile(path) as file:
            pages = [page.aspage() for page in file.pages]
            head = file.filehandle
            head.seek(0)
            structural = b"GDAL_STRUCTURAL_METADATA" in head.read(400)
            return _report(path, pages, structural=structural)
    except (tifffile.TiffFileError, ValueError, IndexError, KeyError, OSError, RuntimeError) as error:
        raise DataError(f"{path}: not a readable TIFF: {error}.") from None


def _report(path: Path, pages: list[tifffile.TiffPage], *, structural: bool) -> CogReport:
    images = [page for page in pages if not _is_mask(page)]
    masks = [page for page in pages if _is_mask(page)]
    main = images[0]
    errors, warnings = [], []
    big = max(main.imagelength, main.imagewidth) > _BLOCK
    if big and not main.is_tiled:
        errors.append("the pixels are stored in strips, not in tiles")
    if path.with_name(f"{path.name}.ovr").exists():
        errors.append("the overviews are in a file of their own (.ovr)")
    if big and len(images) == 1:
        warnings.append("it has no overviews")
    if main.index != 0:
        errors.append("the first directory is not that of the full image")
    errors += _wrong_sizes(images)
    errors += [f"overview {i} is not tiled" for i, page in enumerate(images[1:], 1) if big and not page.is_tiled]
    errors += _wrong_order(pages, structural=structural)
    for group in (images, masks):
        errors += _wrong_data(group)
    errors += _cut_off(path, pages)
    return CogReport(
        file=path,
        height=main.imagelength,
        width=main.imagewidth,
        overviews=tuple(round(main.imagewidth / page.imagewidth) for page in images[1:]),
        block=(main.tilelength, main.tilewidth) if main.is_tiled else (main.rowsperstrip, main.imagewidth),
        compression=str(main.compression.name).lower(),
        errors=tuple(errors),
        warnings=tuple(warnings),
    )


def _is_mask(page: tifffile.TiffPage) -> bool:
    return bool(page.subfiletype & 4)


def _wrong_sizes(images: list[tifffile.TiffPage]) -> list[str]:
    sizes = [(page.imagelength, page.imagewidth) for page in images]
    return [
        f"overview {i} of {later[1]} x {later[0]} is not smaller than the image before it"
        for i, (earlier, later) in enumerate(pairwise(sizes), 1)
        if not (later[0] <= earlier[0] and later[1] <= earlier[1] and later != earlier)
    ]


def _wrong_order(pages: list[tifffile.TiffPage], *, structural: bool) -> list[str]:
    errors = []
    offsets = [page.offset for page in pages]
    if not structural and offsets[0] > _HEAD_BYTES:
        errors.append(f"the directory of the full image is at byte {offsets[0]}, not at the front")
    if offsets != sorted(offsets):
        errors.append("the directories are not in the order of the images")
    first_data = min((o for page in pages for o in page.dataoffsets if o), default=None)
    if first_data is not None and offsets[-1] > first_data:
        errors.append("some pixels lie before the last directory")
    return errors


def _wrong_data(images: list[tifffile.TiffPage]) -> list[str]:
    """The pixels of a smaller image must lie before those of the next larger one."""
    errors, later = [], None
    for number, page in enumerate(images):
        # A block of offset 0 holds only nodata and is not stored.
        stored = [offset for offset in page.dataoffsets if offset]
        if not stored:
            continue
        if later is not None and min(later) < max(stored):
            errors.append(f"the pixels of overview {number} lie behind those of the larger image")
        later = stored
    return errors


def _cut_off(path: Path, pages: list[tifffile.TiffPage]) -> list[str]:
    size = path.stat().st_size
    ends = [o + n for page in pages for o, n in zip(page.dataoffsets, page.databytecounts, strict=True) if o]
    if max(ends, default=0) <= size:
        return []
    return [f"the file ends at byte {size}, its pixels at {max(ends)}: it is cut off"]
