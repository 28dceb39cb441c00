"""ST-DASegNet's golden cases of the whole network's predictions."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsseg.inference.blend import Tile, blend_logits
from rsseg.inference.predict import Compute, predict_tile_logits
from rsseg.inference.tiling import plan_tiles, tile_origins
from rsseg.inference.torch_network import TorchNetwork
from rsseg.layers.blocks import resize_logits
from rsseg.methods.dasegnet.network import DASegNet
from tests.golden.builders import images_of
from tests.golden.case import Case
from tests.golden.dasegnet_build import make_method
from tests.golden.harness import Drivers

KINDS = {
    "logits": ("logit",),
    "probabilities": ("prob", "softmax"),
    "classes": ("pred", "argmax", "class", "seg_map"),
}
"""What is recorded -> words of its key."""
SEVERAL_VIEWS = ("aug", "tta", "multi", "scale", "views")
INPUT = ("img", "image", "view")

Window = tuple[tuple[int, int], tuple[int, int]]
"""Height and width of a sliding window, and its strides."""


@dataclass(frozen=True)
class Reading:
    """One interpretation of a recorded output: which views, whole images or windows."""

    views: tuple[int, ...]
    window: Window | None

    def __str__(self) -> str:
        return f"views {self.views}, {'whole' if self.window is None else 'windows'}"


def check_encode_decode(case: Case) -> None:
    """Maps of both students, and every recorded output of one or several views of the images."""
    net = make_method(case, {}).segmenter.eval()
    names = sorted(key for key in case.tensors if is_input(key))
    names.sort(key=lambda key: key != "img_u8")  # the images themselves come first, other views of them behind
    assert names, f"{case.name}: no images are recorded"
    views = [images_of(case.tensors[name]) for name in names]
    window = window_of(case)
    with torch.no_grad():
        (view,) = net.styles(views[0])
        by_style = {
            "logits_s": net.decoder_source(view.refined_source),
            "logits_t": net.decoder_target(view.refined_target),
        }
        for prefix, maps in {
            "feat_s": view.source,
            "feat_t": view.target,
            "neck_s": view.refined_source,
            "neck_t": view.refined_target,
        }.items():
            case.check_maps(maps, prefix, "logits")
        for key in case.tensors:
            if key in by_style:
                case.check(by_style[key], key, "logits")
            elif not is_input(key) and not key.startswith(("state.", "feat_", "neck_")):
                check_output(case, net, views, key, window)
        if window is not None:
            check_tiling(case, net, views[0], window)


def is_input(key: str) -> bool:
    return any(word in key for word in INPUT) and kind_of_output(key) is None and not key.startswith("state.")


def kind_of_output(key: str) -> str | None:
    return next((kind for kind, words in KINDS.items() if any(word in key for word in words)), None)


def check_output(case: Case, net: DASegNet, views: list[Tensor], key: str, window: Window | None) -> None:
    """The key says what is recorded, whether in windows (`slide`) and whether of several views (`aug`).

    Where the key leaves something open, one of the readings must fit; the first, by the test configuration, is reported
    if none does.
    """
    kind = kind_of_output(key)
    assert kind is not None, f"{case.name}: no rule for the output {key!r}"
    expected = case.tensors[key]
    possible = list(readings(case, key, len(views), window))
    for reading in possible:
        actual = output(net, views, reading, kind)
        if fits(case, kind, actual, expected):
            break
    else:
        actual = output(net, views, possible[0], kind)
    if kind == "classes":
        case.check_classes(key, actual, expected, share_of(case))
    else:
        case.check(actual, key, "logits")


def readings(case: Case, key: str, views: int, window: Window | None) -> Iterator[Reading]:
    """Possible interpretations of a key, the likeliest first."""
    slides = case.meta["segmentor"].get("test_cfg", {}).get("mode") == "slide"
    windows = [window, None] if slides and "logits" not in key else [None, window]
    if "slide" in key:
        windows = [window]
        assert window is not None, f"{case.name}: {key} without a window"
    elif "whole" in key or window is None:
        windows = [None]
    everything = tuple(range(views))
    if any(word in key for word in SEVERAL_VIEWS):
        assert views > 1, f"{case.name}: {key} is of several views, but one is recorded"
        groups = [everything]
    else:
        groups = [*((i,) for i in everything), *([everything] if views > 1 else [])]
    for group in groups:
        for chosen in windows:
            yield Reading(group, chosen)


def output(net: DASegNet, views: list[Tensor], reading: Reading, kind: str) -> Tensor:
    """Logits (B, K, H, W) of one view at its own size, else mean probabilities or classes at the size of the first."""
    logits = [slide(net, views[i], reading.window) if reading.window else net(views[i]) for i in reading.views]
    if kind == "logits" and len(logits) == 1:
        return logits[0]
    size = views[0].shape[-2:]
    probabilities = torch.stack([resize_logits(one, size).softmax(1) for one in logits]).mean(0)
    return probabilities.argmax(1) if kind == "classes" else probabilities


def fits(case: Case, kind: str, actual: Tensor, expected: Tensor) -> bool:
    """Whether a result is within tolerance of the recorded one; sides of 1 may be missing."""
    if _without_ones(actual) != _without_ones(expected):
        return False
    actual = actual.reshape(expected.shape)
    if kind == "classes":
        return float((actual.long() == expected.long()).double().mean()) >= share_of(case)
    return torch.allclose(actual.double(), expected.double(), **case.tolerance("logits"))


def share_of(case: Case) -> float:
    """Part of the pixels that must agree, stated as `>= 99.9 % equal`."""
    stated = case.meta["tolerance"].get("pred", ">= 99.9 % equal")
    return float(stated.strip("> =").partition("%")[0]) / 100


def window_of(case: Case) -> Window | None:
    """First `crop_size` and `stride` anywhere in the case."""
    found = _first_with(case.meta.untracked(), {"crop_size", "stride"})
    if found is None:
        return None
    return _pair(found["crop_size"]), _pair(found["stride"])


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _first_with(values: Any, keys: set[str]) -> Mapping[str, Any] | None:
    if isinstance(values, Mapping):
        if keys <= set(values):
            return values
        values = list(values.values())
    for value in values if isinstance(values, list) else ():
        if (found := _first_with(value, keys)) is not None:
            return found
    return None


def slide(net: DASegNet, images: Tensor, window: Window) -> Tensor:
    """Mean logits of windows, the last of a row or column moved in; no window is larger than the image."""
    (height, width), _ = window
    rows, cols = (tile_origins(*axis) for axis in zip(images.shape[-2:], *window, strict=True))
    total = images.new_zeros(len(images), net.task.num_classes, *images.shape[-2:])
    count = images.new_zeros(images.shape[-2:])
    for top in rows:
        for left in cols:
            area = (..., slice(top, top + height), slice(left, left + width))
            total[area] += net(images[area])
            count[area] += 1
    return total / count


def check_tiling(case: Case, net: DASegNet, images: Tensor, window: Window) -> None:
    """Compare the product's tiling and blending with the mean of windows, where tiles need no padding."""
    (side, width), (stride, other) = window
    multiple = net.input_multiple
    tiles = [min(side, length) for length in images.shape[-2:]]
    if side != width or stride != other or any(tile % multiple for tile in tiles):
        return
    plan = plan_tiles(*images.shape[-2:], tile=side, overlap=side - stride)
    maps = []
    for image in images:
        scored = predict_tile_logits(TorchNetwork(net), _tiles(image, plan), Compute())
        strips = blend_logits(scored, plan, "mean", net.task.num_classes)
        maps.append(torch.from_numpy(np.concatenate([strip.logits for strip in strips], axis=1)))
    blended = torch.stack(maps)
    case.close("windows blended by the product", blended, slide(net, images, window), "logits")


def _tiles(image: Tensor, plan: Any) -> list[Tile]:
    def cut(top: int, left: int) -> np.ndarray:
        return image[:, top : top + plan.rows.tile, left : left + plan.cols.tile].numpy()

    return [
        Tile(row, col, partial(cut, top, left))
        for row, top in enumerate(plan.rows.origins)
        for col, left in enumerate(plan.cols.origins)
    ]


def _without_ones(tensor: Tensor) -> list[int]:
    return [side for side in tensor.shape if side != 1]


DRIVERS: Drivers = {"encode_decode": check_encode_decode}
