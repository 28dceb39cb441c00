"""The class raster: written in whole rows of blocks, checked, and only then given its name.

Until then the data lies under temporary names in the folder of the output, which any failure removes.
"""

import os
import shutil
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from xml.sax.saxutils import escape

import numpy as np
import rasterio
import rasterio.shutil
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning, RasterioError

import rsseg
from rsseg.errors import MachineError, UsageError
from rsseg.raster import RasterInfo
from rsseg.task import Task

NODATA = 255
"""Pixel value where the input has no data."""
_BLOCK = 512
"""Side of a block of the output in pixels."""
_CACHE_BYTES = 32 << 20
"""What GDAL may cache while the file is finished."""
_COMPRESSION = {"compress": "deflate", "bigtiff": "IF_SAFER"}


def check_output(output: Path, scene: str, *, overwrite: bool) -> None:
    """Say what stands against writing `output` before any work is done.

    Raises:
        UsageError: it is the scene itself, a folder, exists already, or its folder cannot be made or written.
    """
    if output.exists():
        if Path(scene).exists() and output.samefile(scene):
            raise UsageError(f"{output}: the output would replace the scene itself. Choose another --output.")
        if output.is_dir():
            raise UsageError(f"{output}: the output is a folder. Give a file name.")
        if not overwrite:
            raise UsageError(f"{output}: exists already. Choose another --output, or replace it with --overwrite.")
    folder = next(folder for folder in output.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"{output}: cannot be written, {folder} is no writable folder. Choose another --output.")


class SceneWriter:
    """Writes class values row by row onto the grid of a scene.

    A context manager: the file appears when it is left without an exception, and nothing is left behind otherwise.
    """

    def __init__(self, output: Path, info: RasterInfo, task: Task, *, cloud_optimized: bool) -> None:
        """Open a temporary file beside `output`.

        Args:
            output: final name; replaced if it exists.
            info: grid of the scene, which becomes the grid of the output.
            task: class values, names and colours.
            cloud_optimized: with internal overviews (mode of the classes) in the layout of a COG.

        Raises:
            MachineError: the file cannot be made.
        """
        self._output, self._task, self._cloud_optimized = output, task, cloud_optimized
        self._shape = info.height, info.width
        self._file = output.with_name(f".{output.name}.{os.getpid()}.tmp.tif")
        self._rows = np.empty((_BLOCK, info.width), np.uint8)
        self._held = 0
        self._written = 0
        self._checksum = 0
        try:
            with self._writing():
                output.parent.mkdir(parents=True, exist_ok=True)
                self._dataset = _create(self._file, info, task)
        except BaseException:
            self._remove()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
            else:
                with suppress(RasterioError):
                    self._dataset.close()
        finally:
            self._remove()

    def write(self, rows: NDArray[np.uint8]) -> None:
        """Append rows (n, width) of pixel values.

        Raises:
            MachineError: the disk is full.
        """
        self._checksum = zlib.crc32(rows.tobytes(), self._checksum)
        while len(rows):
            count = min(len(rows), _BLOCK - self._held)
            self._rows[self._held : self._held + count] = rows[:count]
            self._held += count
            rows = rows[count:]
            if self._held == _BLOCK:
                self._flush()

    def _flush(self) -> None:
        """Only whole rows of blocks are written: others would be compressed twice."""
        if not self._held:
            return
        window = ((self._written, self._written + self._held), (0, self._shape[1]))
        with self._writing():
            self._dataset.write(self._rows[: self._held], 1, window=window)
        self._written += self._held
        self._held = 0

    def _finish(self) -> None:
        self._flush()
        with rasterio.Env(GDAL_CACHEMAX=_CACHE_BYTES), self._writing():
            self._dataset.close()
            if self._cloud_optimized:
                self._file = self._to_cog(self._file)
            self._check()
            _flush_to_disk(self._file)
            names = _side_file(self._file)
            names.write_text(_category_names(self._task), encoding="utf-8")
            self._file.replace(self._output)
            names.replace(_side_file(self._output))

    def _to_cog(self, source: Path) -> Path:
        """The layout of a COG needs sizes that are only known at the end, hence a second file."""
        # GDAL may crash on a disk that is full; overviews, one of them temporary, add at most two thirds.
        needed = 2 * source.stat().st_size + (1 << 20)
        if shutil.disk_usage(source.parent).free < needed:
            raise MachineError(
                f"{self._output}: {needed / 2**20:.0f} MB are needed to finish it, and the disk has less. Free some "
                "space, or write without overviews (--format gtiff)."
            )
        target = source.with_suffix(".cog.tif")
        rasterio.shutil.copy(
            source,
            target,
            driver="COG",
            blocksize=_BLOCK,
            resampling="mode",
            num_threads="ALL_CPUS",
            **_COMPRESSION,
        )
        source.unlink()
        return target

    def _check(self) -> None:
        """Read everything back: GDAL does not report every write that fails."""
        checksum = 0
        with rasterio.open(self._file) as dataset:
            for row in range(0, self._shape[0], _BLOCK):
                window = ((row, min(row + _BLOCK, self._shape[0])), (0, self._shape[1]))
                checksum = zlib.crc32(dataset.read(1, window=window), checksum)
        if checksum != self._checksum:
            raise MachineError(f"{self._output}: what was written is not what is read back. Check the disk.")

    def _remove(self) -> None:
        for file in self._output.parent.glob(f".{self._output.name}.{os.getpid()}.tmp.*"):
            file.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            try:
                yield
            except (RasterioError, OSError) as error:
                reason = str(error.__cause__ or error).strip().rstrip(".")
                raise MachineError(
                    f"{self._output}: cannot be written: {reason}. Make room on the disk or choose another --output."
                ) from None


def _create(file: Path, info: RasterInfo, task: Task) -> Any:
    """An empty raster of the scene's grid, with nodata, colours and class names."""
    georeferenced = info.crs is not None or not info.transform.is_identity
    dataset = rasterio.open(
        file,
        "w",
        driver="GTiff",
        height=info.height,
        width=info.width,
        count=1,
        dtype="uint8",
        nodata=NODATA,
        crs=info.crs,
        transform=info.transform if georeferenced and not info.gcps else None,
        tiled=True,
        blockxsize=_BLOCK,
        blockysize=_BLOCK,
        **_COMPRESSION,
    )
    if info.gcps:
        dataset.gcps = (list(info.gcps), info.gcps_crs)
    if info.rpcs is not None:
        dataset.rpcs = info.rpcs
    if info.area_or_point is not None:
        dataset.update_tags(AREA_OR_POINT=info.area_or_point)
    dataset.update_tags(TIFFTAG_SOFTWARE=f"rsseg {rsseg.__version__}")
    dataset.update_tags(1, **{f"class_{c.value}": c.name for c in task.classes})
    dataset.set_band_description(1, "class")
    dataset.write_colormap(1, {**{c.value: (*c.color, 255) for c in task.classes}, NODATA: (0, 0, 0, 0)})
    return dataset


def _category_names(task: Task) -> str:
    """GDAL's side file with the name of each pixel value, which GIS programs show in the legend."""
    names = {c.value: escape(c.name) for c in task.classes}
    lines = "\n".join(f"      <Category>{names.get(value, '')}</Category>" for value in range(max(names) + 1))
    return (
        '<PAMDataset>\n  <PAMRasterBand band="1">\n    <CategoryNames>\n'
        f"{lines}\n    </CategoryNames>\n  </PAMRasterBand>\n</PAMDataset>\n"
    )


def _side_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.aux.xml")


def _flush_to_disk(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
