from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from torch._subclasses.fake_tensor import FakeTensorMode

from rsseg.config import EvalConfig
from rsseg.errors import MachineError
from rsseg.inference.image import predict_image, predict_probabilities
from rsseg.inference.predict import Tiling, choose_tiling
from rsseg.methods.base import TileHint
from tests.toys import ConvSegmenter, IndexSegmenter, SizeSegmenter, StridedSegmenter, make_task

ATTENTION = TileHint(size=32, overlap=8, flexible=False)


def random_image(height: int, width: int, bands: int = 3) -> np.ndarray:
    return np.random.default_rng(1).random((bands, height, width), np.float32)


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (70, 1), (31, 33), (32, 32), (90, 41)])
@pytest.mark.parametrize("blend", ["crop", "hann", "mean"])
def test_image_of_any_size_gets_one_class_per_pixel(size: tuple[int, int], blend: str) -> None:
    classes = np.random.default_rng(0).integers(0, 3, size)
    image = np.stack([classes, classes, classes]).astype(np.float32)
    config = EvalConfig.model_validate({"tile": 32, "blend": blend})
    result = predict_image(IndexSegmenter(make_task()), image, None, config, device="cpu")
    assert result.dtype == np.uint8
    assert_array_equal(result, classes)


def test_tiled_equals_whole_where_the_overlap_covers_the_receptive_field() -> None:
    network, image = ConvSegmenter(make_task()), random_image(75, 101)
    whole = predict_image(network, image, None, EvalConfig(tile=200), device="cpu")
    tiled = predict_image(network, image, None, EvalConfig(tile=32, overlap=4), device="cpu")
    assert_array_equal(tiled, whole)


def test_batch_size_does_not_change_the_result() -> None:
    network, image = ConvSegmenter(make_task()), random_image(75, 101)
    one, many = (
        predict_image(network, image, None, EvalConfig(tile=32, overlap=4, batch_size=size), device="cpu")
        for size in (1, 5)
    )
    assert_array_equal(one, many)


def test_network_with_a_stride_predicts_sizes_that_are_no_multiple() -> None:
    network = ConvSegmenter(make_task(), multiple=14)
    assert predict_image(network, random_image(45, 13), None, EvalConfig(tile=40), device="cpu").shape == (45, 13)


def test_pixels_without_data_do_not_influence_their_neighbours_beyond_the_fill() -> None:
    network, image = ConvSegmenter(make_task(), fill=[0.5, 0.5, 0.5]), random_image(40, 40)
    valid = np.ones((40, 40), np.bool_)
    valid[10:20, 10:20] = False
    poisoned = image.copy()
    poisoned[:, ~valid] = 1e9
    clean = predict_image(network, image, valid, EvalConfig(), device="cpu")
    assert_array_equal(predict_image(network, poisoned, valid, EvalConfig(), device="cpu"), clean)
    filled = np.where(valid, image, np.float32(0.5))
    assert_array_equal(clean, predict_image(network, filled, None, EvalConfig(), device="cpu"))


@pytest.mark.parametrize(("size", "seen"), [((20, 50), 1), ((1, 1), 1), ((32, 32), 1), ((64, 64), 1)])
def test_attention_network_sees_its_training_size_also_in_small_images(size: tuple[int, int], seen: int) -> None:
    network = SizeSegmenter(make_task(), input_multiple=1, fill=[0, 0, 0], tile=ATTENTION)
    assert (predict_image(network, random_image(*size), None, EvalConfig(), device="cpu") == seen).all()


def test_small_images_of_an_attention_network_are_extended_by_reflection() -> None:
    image = random_image(20, 32)
    mirrored = np.concatenate([image, image[:, -2:-14:-1]], axis=1)
    network = ConvSegmenter(make_task(), tile=ATTENTION)
    small = predict_image(network, image, None, EvalConfig(), device="cpu")
    assert_array_equal(small, predict_image(network, mirrored, None, EvalConfig(), device="cpu")[:20])


def test_resized_mode_shows_the_network_one_square_and_returns_the_image_size() -> None:
    network = SizeSegmenter(make_task(), input_multiple=1, fill=[0, 0, 0], tile=ATTENTION)
    result = predict_image(network, random_image(20, 50), None, EvalConfig(mode="resized"), device="cpu")
    assert result.shape == (20, 50)
    assert (result == 1).all()


def test_resize_multiple_rounds_each_side_half_up_and_aligns_corners() -> None:
    network = ConvSegmenter(make_task(), kernel=1, multiple=14)
    image = torch.from_numpy(random_image(21, 34))
    inner = torch.nn.functional.interpolate(image[None], (28, 28), mode="bilinear", align_corners=True)
    logits = torch.nn.functional.interpolate(network(inner), (21, 34), mode="bilinear", align_corners=True)
    result = predict_image(network, image, None, EvalConfig(resize_multiple=14), device="cpu")
    assert_array_equal(result, logits[0].argmax(0).numpy())


def test_views_are_averaged_as_probabilities() -> None:
    network, image = ConvSegmenter(make_task()), torch.from_numpy(random_image(30, 30))
    with torch.no_grad():
        straight = network(image[None]).softmax(1)
        mirrored = network(image[None].flip(-1)).softmax(1).flip(-1)
    expected = (straight + mirrored)[0].argmax(0).numpy()
    result = predict_image(network, image, None, EvalConfig(flip=True), device="cpu")
    assert (result == expected).mean() > 0.999  # rounding may turn a tie


def test_scales_are_predicted_and_brought_back_to_the_image() -> None:
    classes = np.zeros((64, 64), np.int64)
    classes[16:48, 24:56] = 2
    image = np.stack([classes] * 3).astype(np.float32)
    config = EvalConfig(scales=(0.5, 1.0, 1.5), tile=32, overlap=8)
    result = predict_image(IndexSegmenter(make_task()), image, None, config, device="cpu")
    assert (result == classes).mean() > 0.95


def test_network_chooses_its_tiling_unless_told_otherwise() -> None:
    task = make_task()
    attention = ConvSegmenter(task, multiple=14, tile=TileHint(518, 148, flexible=False))
    conv = ConvSegmenter(task, multiple=32, tile=TileHint(1024, 128, flexible=True))
    assert choose_tiling(attention, None, None, "crop") == Tiling(518, 148, 518, 1)
    assert choose_tiling(attention, 256, None, "crop") == Tiling(256, 128, 256, 1)
    assert choose_tiling(attention, 1000, 0, "crop") == Tiling(1000, 0, 518, 1)
    assert choose_tiling(conv, None, None, "crop") == Tiling(1024, 128, 1, 32, fitted=True)
    assert choose_tiling(conv, 1024, None, "crop") == Tiling(1024, 128, 1, 32)
    assert choose_tiling(conv, None, None, "mean") == Tiling(1024, 128, 1, 1)


@pytest.mark.parametrize("size", [(33, 100), (97, 64), (70, 131)])
def test_network_with_a_stride_sees_in_tiles_what_it_sees_in_the_whole_image(size: tuple[int, int]) -> None:
    network, image = StridedSegmenter(make_task()), random_image(*size)
    whole = predict_image(network, image, None, EvalConfig(tile=160), device="cpu")
    tiled = predict_image(network, image, None, EvalConfig(tile=32, overlap=16), device="cpu")
    assert_array_equal(tiled, whole)


@pytest.mark.parametrize("changes", [{"mode": "resized"}, {"resize_multiple": 14}, {"mode": "resized", "flip": True}])
def test_probabilities_come_to_host_memory_from_a_gpu(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with FakeTensorMode(allow_non_fake_inputs=True):  # shapes and devices only, so that no GPU is needed
        with torch.device("cuda:0"):
            network = ConvSegmenter(make_task(), tile=ATTENTION)
        config = EvalConfig(tile=32, **changes)
        image = random_image(40, 48)
        assert predict_probabilities(network, image, None, config, device="cuda:0").device.type == "cpu"


class SmallMemory(ConvSegmenter):
    """Runs out of memory with more than `most` images at a time, as a GPU does."""

    most = 1

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(images)


def test_batch_that_does_not_fit_into_memory_is_halved() -> None:
    image, config = random_image(75, 101), EvalConfig(tile=32, overlap=4, batch_size=5)
    expected = predict_image(ConvSegmenter(make_task()), image, None, config, device="cpu")
    assert_array_equal(predict_image(SmallMemory(make_task()), image, None, config, device="cpu"), expected)


@pytest.mark.parametrize("values", [{}, {"mode": "resized"}, {"flip": True}, {"blend": "hann"}])
def test_single_tile_that_does_not_fit_into_memory_is_a_machine_error(values: dict[str, object]) -> None:
    network = SmallMemory(make_task())
    network.most = 0
    with pytest.raises(MachineError, match=r"cpu has too little memory .*--tile"):
        predict_image(network, random_image(40, 40), None, EvalConfig.model_validate(values), device="cpu")
