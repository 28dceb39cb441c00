"""The rasters of a prediction: written in whole rows of blocks, checked, and only then given their names.

Until then the data lies under temporary names in the folder of the output, which any failure removes. What a killed
process left there, the next one for the same output removes.
"""

import glob
import os
import shutil
import socket
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from xml.sax.saxutils import escape

import numpy as np
import rasterio
import rasterio.shutil
from numpy.typing import NDArray
from rasterio.errors import RasterioError

import rsseg
from rsseg.errors import MachineError, UsageError
from rsseg.raster import RasterInfo
from rsseg.scene.products import Product

_BLOCK = 512
"""Side of a block of the output in pixels."""
_CACHE_BYTES = 32 << 20
"""What GDAL may cache while the file is finished."""
_CREATION = {"compress": "deflate", "bigtiff": "IF_SAFER"}


def check_output(output: Path, scene: Iterable[str], *, overwrite: bool) -> None:
    """Say what stands against writing `output` before any work is done; `scene` are the files that must stay.

    Raises:
        UsageError: it is the scene itself, a folder, exists already, or its folder cannot be made or written.
    """
    if output.exists():
        if any(Path(file).exists() and output.samefile(file) for file in scene):
            raise UsageError(f"{output}: the output would replace the scene itself. Choose another --output.")
        if output.is_dir():
            raise UsageError(f"{output}: the output is a folder. Give a file name.")
        if not overwrite:
            raise UsageError(f"{output}: exists already. Choose another --output, or replace it with --overwrite.")
    folder = next(folder for folder in output.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"{output}: cannot be written, {folder} is no writable folder. Choose another --output.")


class SceneWriter:
    """Writes one product onto the grid of a scene, in panels of columns from left to right, each from top to bottom.

    A context manager: the file appears when it is left without an exception, and nothing is left behind otherwise.
    """

    def __init__(
        self, output: Path, info: RasterInfo, product: Product, *, cloud_optimized: bool, tags: Mapping[str, str]
    ) -> None:
        """Open a temporary file beside `output`.

        Args:
            output: final name; replaced if it exists.
            info: grid of the scene, which becomes the grid of the output.
            product: bands, colours and names.
            cloud_optimized: with internal overviews in the layout of a COG.
            tags: what else the file shall say of itself.

        Raises:
            MachineError: the file cannot be made.
        """
        self._output, self._product, self._cloud_optimized = output, product, cloud_optimized
        self._height = info.height
        self._file = output.with_name(f"{_temporary_start(output)}{os.getpid()}.tmp.tif")
        self._panels: list[_Written] = []
        self._remove_dead()
        try:
            with self._writing():
                output.parent.mkdir(parents=True, exist_ok=True)
                self._dataset = _create(self._file, info, product, tags)
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

    def write(self, rows: NDArray[Any], left: int = 0) -> None:
        """Append rows (count, n, width) to the panel that begins in column `left`.

        Raises:
            MachineError: the disk is full.
        """
        if not self._panels or self._panels[-1].left != left:
            self._flush()
            self._panels.append(_Written(left, rows.shape[2]))
            self._held = np.empty((self._product.count, 0, rows.shape[2]), rows.dtype)
        panel = self._panels[-1]
        # Only whole rows of blocks are written: others would be compressed twice.
        while panel.rows + self._held.shape[1] + rows.shape[1] >= (end := (panel.rows // _BLOCK + 1) * _BLOCK):
            missing = end - panel.rows - self._held.shape[1]
            self._held = np.concatenate([self._held, rows[:, :missing]], axis=1)
            rows = rows[:, missing:]
            self._flush()
        self._held = np.concatenate([self._held, rows], axis=1)

    def _flush(self) -> None:
        if not self._panels or not self._held.shape[1]:
            return
        panel, height = self._panels[-1], self._held.shape[1]
        panel.checksum = zlib.crc32(self._stored(self._held), panel.checksum)
        with self._writing():
            window = ((panel.rows, panel.rows + height), (panel.left, panel.left + panel.width))
            self._dataset.write(self._held, window=window)
        panel.rows += height
        self._held = self._held[:, :0]

    def _stored(self, pixels: NDArray[Any]) -> memoryview:
        """As it is read back, for the checksum."""
        return np.ascontiguousarray(pixels.astype(np.float16) if self._product.half else pixels).data

    def _finish(self) -> None:
        self._flush()
        with rasterio.Env(GDAL_CACHEMAX=_CACHE_BYTES), self._writing():
            self._dataset.close()
            if self._cloud_optimized:
                self._file = self._to_cog(self._file)
            self._check()
            _flush_to_disk(self._file)
            if self._product.value_names:
                # Before the raster: a raster that is there is complete.
                names = _side_file(self._file)
                names.write_text(_category_names(self._product.value_names), encoding="utf-8")
                names.replace(_side_file(self._output))
            self._file.replace(self._output)

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
            resampling=self._product.resampling,
            **_CREATION,
            **_bits(self._product),
        )
        source.unlink()
        return target

    def _check(self) -> None:
        """Read everything back: GDAL does not report every write that fails."""
        with rasterio.open(self._file) as dataset:
            for panel in self._panels:
                checksum = 0
                for row in range(0, self._height, _BLOCK):
                    rows = row, min(row + _BLOCK, self._height)
                    pixels = dataset.read(window=(rows, (panel.left, panel.left + panel.width)))
                    checksum = zlib.crc32(self._stored(pixels), checksum)
                if checksum != panel.checksum:
                    raise MachineError(f"{self._output}: what was written is not what is read back. Check the disk.")

    def _remove(self) -> None:
        for file in self._output.parent.glob(f"{glob.escape(_temporary_start(self._output))}{os.getpid()}.tmp.*"):
            file.unlink(missing_ok=True)

    def _remove_dead(self) -> None:
        """What processes of this machine left that are no more."""
        start = _temporary_start(self._output)
        for file in self._output.parent.glob(f"{glob.escape(start)}*.tmp.*"):
            owner = file.name[len(start) :].partition(".")[0]
            if owner.isdecimal() and not _is_running(int(owner)):
                file.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (RasterioError, OSError) as error:
            reason = str(error.__cause__ or error).strip().rstrip(".")
            raise MachineError(
                f"{self._output}: cannot be written: {reason}. Make room on the disk or choose another --output."
            ) from None


@dataclass
class _Written:
    """What of a panel is in the file."""

    left: int
    width: int
    rows: int = 0
    checksum: int = 0


def _create(file: Path, info: RasterInfo, product: Product, tags: Mapping[str, str]) -> Any:
    """An empty raster of the scene's grid, with nodata, colours and names."""
    georeferenced = info.crs is not None or not info.transform.is_identity
    dataset = rasterio.open(
        file,
        "w",
        driver="GTiff",
        height=info.height,
        width=info.width,
        count=product.count,
        dtype=product.dtype,
        nodata=product.nodata,
        crs=info.crs,
        transform=info.transform if georeferenced and not info.gcps else None,
        tiled=True,
        blockxsize=_BLOCK,
        blockysize=_BLOCK,
        interleave="band",
        **_CREATION,
        **_bits(product),
    )
    if info.gcps:
        dataset.gcps = (list(info.gcps), info.gcps_crs)
    if info.rpcs is not None:
        dataset.rpcs = info.rpcs
    if info.area_or_point is not None:
        dataset.update_tags(AREA_OR_POINT=info.area_or_point)
    dataset.update_tags(TIFFTAG_SOFTWARE=f"rsseg {rsseg.__version__}", **tags)
    if product.value_names:
        dataset.update_tags(1, **{f"class_{value}": name for value, name in product.value_names.items()})
    if product.scale != 1:
        dataset.scales = (product.scale,) * product.count
    for band, name in enumerate(product.band_names, start=1):
        dataset.set_band_description(band, name)
    if product.colors is not None:
        colors = {value: (*color, 255) for value, color in product.colors.items()}
        dataset.write_colormap(1, colors | {int(product.nodata): (0, 0, 0, 0)})
    return dataset


def _bits(product: Product) -> dict[str, int]:
    return {"nbits": 16} if product.half else {}


def _category_names(value_names: Mapping[int, str]) -> str:
    """GDAL's side file with the name of each pixel value, which GIS programs show in the legend."""
    lines = "\n".join(
        f"      <Category>{escape(value_names.get(value, ''))}</Category>" for value in range(max(value_names) + 1)
    )
    return (
        '<PAMDataset>\n  <PAMRasterBand band="1">\n    <CategoryNames>\n'
        f"{lines}\n    </CategoryNames>\n  </PAMRasterBand>\n</PAMDataset>\n"
    )


def _side_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.aux.xml")


def _temporary_start(output: Path) -> str:
    """Beginning of the temporary names of this machine; the process id follows."""
    return f".{output.name}.{socket.gethostname().partition('.')[0]}-"


def _is_running(process: int) -> bool:
    if os.name == "nt":  # there, asking would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to someone else
        return True
    return True


def _flush_to_disk(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
