"""The way of a scene's pixels to a device: decoded by several threads, copied as they are stored, scaled there."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from numpy.typing import NDArray
from torch import Tensor

from rsseg.errors import DataError
from rsseg.inference.tiling import Span
from rsseg.inference.torch_network import Uploads
from rsseg.scene.memory import prepare_network
from rsseg.scene.plan import PreparedScene, prepare_scene
from rsseg.scene.predict import predict_prepared, predict_scene
from rsseg.scene.source import _windows
from tests.conftest import write_tif
from tests.scene.helpers import files_in, options, read_classes
from tests.toys import ConvSegmenter, make_task


class RecordedCopies:
    """A device that is the host, and notes what it is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, tuple[int, ...]]] = []

    def send(self, arrays: Sequence[NDArray[Any]]) -> Tensor:
        stacked = np.stack(arrays)
        self.sent.append((str(stacked.dtype), stacked.shape))
        return torch.from_numpy(stacked)


@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float32", "float64"])
@pytest.mark.parametrize("blend", ["crop", "hann"])
def test_a_device_gets_stored_pixels_and_makes_the_same_map_of_them(
    tmp_path: Path, dtype: str, bands: int, blend: str
) -> None:
    pixels = np.random.default_rng(2).integers(1, 120, (bands, 150, 230)).astype(dtype)
    pixels[:, :40, :30] = 0
    scene = write_tif(tmp_path / "scene.tif", pixels, nodata=0)
    segmenter, wanted = ConvSegmenter(make_task(bands=bands)), options(blend=blend, batch_size=2, confidence=True)
    predict_scene(segmenter, scene, tmp_path / "host.tif", wanted)
    prepared, copies = prepare_network(segmenter, wanted), RecordedCopies()
    uploads = Uploads(prepared.network, copies)
    prepared = replace(prepared, network=replace(prepared.network, uploads=uploads))
    assert copies.sent == [("float32", (3, bands))], "scale, offset and fill are sent once"
    copies.sent.clear()
    predict_prepared(prepare_scene(prepared, scene, tmp_path / "device.tif", wanted))
    for end in (".tif", "_confidence.tif"):
        assert_array_equal(read_classes(tmp_path / f"device{end}"), read_classes(tmp_path / f"host{end}"))
    images = [shape for kind, shape in copies.sent if kind != "bool"]
    masks = [shape for kind, shape in copies.sent if kind == "bool"]
    assert {kind for kind, _ in copies.sent} == {dtype, "bool"}
    assert all(shape[1:] == (64, 64, bands) for shape in images)
    assert all(shape[1:] == (64, 64) for shape in masks)
    assert 0 < len(masks) < len(images), "only of batches with pixels that are no data"


@pytest.mark.parametrize("block", [None, 32])
def test_several_decoders_read_what_one_reads(
    tmp_path: Path, block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (3, 310, 420)).astype(np.uint8)
    pixels[:, 100:200, 90:250] = 0
    layout = {} if block is None else {"tiled": True, "blockxsize": block, "blockysize": block}
    scene = write_tif(tmp_path / "scene.tif", pixels, nodata=0, **layout)
    segmenter = ConvSegmenter(make_task())
    predict_scene(segmenter, scene, tmp_path / "one.tif", options())
    assert prepare_scene(prepare_network(segmenter, options()), scene, tmp_path / "x.tif", options()).decoders == 1
    opened = []
    usual = PreparedScene.open
    monkeypatch.setattr(PreparedScene, "decoders", 3)
    monkeypatch.setattr(PreparedScene, "open", lambda scene: opened.append(usual(scene)) or opened[-1])
    predict_scene(segmenter, scene, tmp_path / "three.tif", options())
    assert len(opened) == 3
    assert_array_equal(read_classes(tmp_path / "three.tif"), read_classes(tmp_path / "one.tif"))
    damaged = bytearray(scene.read_bytes())
    damaged[len(damaged) // 2 :] = b""
    scene.write_bytes(bytes(damaged))
    before = files_in(tmp_path)
    with pytest.raises(DataError, match=r"scene\.tif"):
        predict_scene(segmenter, scene, tmp_path / "damaged.tif", options())
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("block", [(32, 48), (1, 700), (512, 512)])
@pytest.mark.parametrize("parts", [1, 4])
def test_windows_cover_the_part_once_and_end_where_blocks_end(block: tuple[int, int], parts: int) -> None:
    rows, cols = Span(70, 515), Span(33, 640)
    seen = np.zeros((600, 700), int)
    windows = list(_windows(block, rows, cols, parts))
    for row, col, height, width in windows:
        seen[row : row + height, col : col + width] += 1
        assert row == rows.start or row % block[0] == 0
        assert col == cols.start or col % block[1] == 0
        assert width == cols.length or parts > 1
    assert (seen[rows.area, cols.area] == 1).all()
    assert seen.sum() == rows.length * cols.length
    if block == (32, 48):
        assert len(windows) >= parts
