"""Tiles that several threads compute at once."""

from pathlib import Path

import pytest
import torch
from numpy.testing import assert_array_equal

from rsseg.inference.device import Precision
from rsseg.methods.base import TileHint
from rsseg.scene.memory import prepare_network
from rsseg.scene.options import SceneOptions
from rsseg.scene.plan import prepare_scene
from rsseg.scene.predict import predict_scene
from tests.conftest import write_tif
from tests.scene.helpers import (
    StoppingSegmenter,
    files_in,
    options,
    plan_scene,
    random_pixels,
    read_classes,
    threads,
)
from tests.toys import ConvSegmenter, make_task


@pytest.mark.parametrize("blend", ["crop", "hann"])
@pytest.mark.parametrize("size", [(300, 420), (40, 50)])
@threads(6)
def test_parallel_batches_give_the_pixels_of_single_ones(tmp_path: Path, blend: str, size: tuple[int, int]) -> None:
    segmenter, pixels = ConvSegmenter(make_task()), random_pixels(*size)
    pixels[:, :100, :200] = 0
    scene = write_tif(tmp_path / "scene.tif", pixels, nodata=0)
    choices = options(blend=blend, confidence=True, batch_size=2)
    # A single batch has all threads.
    assert plan_scene(segmenter, scene, tmp_path / "many.tif", choices).parallel_batches == (3 if size[0] > 64 else 1)
    predict_scene(segmenter, scene, tmp_path / "many.tif", choices)
    assert torch.get_num_threads() == 6
    torch.set_num_threads(1)
    assert plan_scene(segmenter, scene, tmp_path / "one.tif", choices).parallel_batches == 1
    predict_scene(segmenter, scene, tmp_path / "one.tif", choices)
    for end in (".tif", "_confidence.tif"):
        assert_array_equal(read_classes(tmp_path / f"many{end}"), read_classes(tmp_path / f"one{end}"))


@threads(6)
def test_less_memory_takes_fewer_parallel_batches_first(tmp_path: Path) -> None:
    scene = write_tif(tmp_path / "scene.tif", random_pixels(300, 420))
    usual = plan_scene(ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options())
    tight = plan_scene(
        ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options(max_memory=usual.memory_bytes - 1)
    )
    assert tight.parallel_batches == usual.parallel_batches - 1
    assert (tight.tile, tight.batch_size) == (usual.tile, usual.batch_size)


@threads(4)
@pytest.mark.parametrize(("dtype", "expected"), [("float32", 2), ("bfloat16", 4)])
def test_a_float32_batch_has_two_threads_and_one_of_bfloat16_has_one(
    tmp_path: Path, dtype: Precision, expected: int
) -> None:
    scene = write_tif(tmp_path / "scene.tif", random_pixels(300, 420))
    plan = plan_scene(ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options(dtype=dtype))
    assert plan.parallel_batches == expected


@threads(6)
def test_failure_in_one_of_several_batches_ends_all_and_leaves_nothing(tmp_path: Path) -> None:
    scene = write_tif(tmp_path / "scene.tif", random_pixels(300, 420))
    with pytest.raises(KeyboardInterrupt):
        predict_scene(StoppingSegmenter(5), scene, tmp_path / "out.tif", options())
    assert files_in(tmp_path) == ["scene.tif"]


def test_free_memory_decides_nothing_but_how_many_batches_run_in_parallel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = ConvSegmenter(make_task(), tile=TileHint(64, 8, flexible=True))
    scene = write_tif(tmp_path / "scene.tif", random_pixels(300, 420))
    choices = SceneOptions(device="cpu", dtype="float32", batch_size=2)
    monkeypatch.setattr("rsseg.scene.memory.free_bytes", lambda: 0)
    with threads(6):
        scarce = prepare_scene(prepare_network(segmenter, choices), scene, tmp_path / "out.tif", choices)
        monkeypatch.setattr("rsseg.scene.memory.free_bytes", lambda: 64 << 30)
        plenty = prepare_scene(prepare_network(segmenter, choices), scene, tmp_path / "out.tif", choices)
    assert (scarce.compute.parallel_batches, plenty.compute.parallel_batches) == (1, 3)
    assert (scarce.plan, scarce.panels, scarce.compute.batch_size) == (
        plenty.plan,
        plenty.panels,
        plenty.compute.batch_size,
    )
    assert scarce.identity() == plenty.identity()
    assert plenty.memory_bytes <= 4 << 30
