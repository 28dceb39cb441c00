"""The check of cloud-optimized GeoTIFFs agrees with that of rio-cogeo."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from rio_cogeo import cog_validate

from rsseg.errors import DataError
from rsseg.scene.cog import check_cog
from tests.conftest import write_tif


def smooth(height: int = 700, width: int = 1100) -> np.ndarray:
    rows, cols = np.mgrid[:height, :width]
    return ((rows + cols) // 7 % 251).astype(np.uint8)[None]


def make(path: Path, kind: str) -> Path:
    tiled = {"tiled": True, "blockxsize": 256, "blockysize": 256}
    match kind:
        case "cog" | "cog with mask" | "bigtiff cog":
            source = write_tif(path.with_name("source.tif"), smooth(), **tiled)
            if kind == "cog with mask":
                with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(source, "r+") as dataset:
                    dataset.write_mask(smooth()[0] > 100)
            big: dict[str, Any] = {"bigtiff": "YES"} if kind == "bigtiff cog" else {}
            rasterio.shutil.copy(source, path, driver="COG", blocksize=256, **big)
        case "small":
            write_tif(path, smooth(100, 200))
        case "strips":
            write_tif(path, smooth())
        case "no overviews":
            write_tif(path, smooth(), **tiled)
        case "overviews behind":
            write_tif(path, smooth(), **tiled)
            with rasterio.open(path, "r+") as dataset:
                dataset.build_overviews([2, 4])
        case "external overviews":
            write_tif(path, smooth(), **tiled)
            with rasterio.Env(TIFF_USE_OVR=True), rasterio.open(path, "r+") as dataset:
                dataset.build_overviews([2, 4])
    return path


@pytest.mark.parametrize(
    ("kind", "valid"),
    [
        ("cog", True),
        ("cog with mask", True),
        ("bigtiff cog", True),
        ("small", True),
        ("strips", False),
        ("no overviews", False),
        ("overviews behind", False),
        ("external overviews", False),
    ],
)
def test_verdict_is_that_of_rio_cogeo(tmp_path: Path, kind: str, valid: bool) -> None:
    file = make(tmp_path / "file.tif", kind)
    report = check_cog(file)
    assert report.is_valid == valid, report
    assert cog_validate(file, strict=True)[0] == valid


def test_file_that_is_cut_off_is_told(tmp_path: Path) -> None:
    file = make(tmp_path / "file.tif", "cog")
    file.write_bytes(file.read_bytes()[:-2000])
    assert any("cut off" in error for error in check_cog(file).errors)


def test_what_is_no_tiff_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file.tif").write_text("nonsense")
    with pytest.raises(DataError, match="not a readable TIFF"):
        check_cog(tmp_path / "file.tif")
    with pytest.raises(DataError, match="no such file"):
        check_cog(tmp_path / "other.tif")
