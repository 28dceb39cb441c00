"""Strong views against the published recipe of PIL and torchvision: crops per second of one core, and their look.

Both jitter colours (0.5, 0.5, 0.5, 0.25), turn grey and blur with the same probabilities and strengths, on the same
8-bit crops. "view" is the strong view alone, as each library leaves it; "sample" is what training needs of an
unlabeled image: scale by 0.5 to 2, crop, mirror, one strong view, and both views as a normalized float32 batch.
Rounds are interleaved; ratios are taken within a round.

The second table compares how strongly the views differ from their crops: quantiles of each change over many draws, and
the largest distance of the two cumulative distributions (Kolmogorov-Smirnov; chance alone gives up to "chance").

    python benchmarks/strong_views.py [--data FOLDER_OF_IMAGES] [--draws 600]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torchvision.transforms import ColorJitter, Normalize, RandomGrayscale
from torchvision.transforms.functional import to_tensor

from rsseg.config import AugmentConfig, StrongConfig
from rsseg.data.assembly import Crop, collate
from rsseg.data.augmentation import (
    ColorSpace,
    box_mask,
    draw_box,
    draw_geometry,
    draw_scaled_size,
    draw_window,
    strong_view,
    transform_image,
)
from rsseg.data.streams import Scaling, to_samples
from rsseg.task import ClassInfo, Task

CROP = 518
BATCH = 8
ROUNDS = 5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TASK = Task(
    name="benchmark",
    classes=(ClassInfo(name="any", value=0, color=(0, 0, 0)),),
    bands=("red", "green", "blue"),
    scale=(1 / 255,) * 3,
    offset=(0.0,) * 3,
)
SPACE = ColorSpace.of(TASK.bands, TASK.scale, TASK.offset)
AUGMENT = AugmentConfig(crop_size=CROP, scale_range=(0.5, 2.0), scale_style="long_side")
Pixels = NDArray[np.uint8]


def make_images(count: int = 8, side: int = 1024) -> list[Pixels]:
    """Coloured fields with texture and noise."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(count):
        fields = cv2.resize(rng.integers(0, 5, (24, 24), dtype=np.uint8), (side, side), interpolation=cv2.INTER_NEAREST)
        tones = rng.integers(40, 200, (5, 3))[fields].astype(np.float32)
        texture = cv2.resize(rng.normal(0, 20, (side // 4, side // 4, 3)).astype(np.float32), (side, side))
        images.append(np.clip(tones + texture + rng.normal(0, 4, (side, side, 3)), 0, 255).astype(np.uint8))
    return images


class Reference:
    """The published transforms, one strong view."""

    def __init__(self) -> None:
        self.jitter = ColorJitter(0.5, 0.5, 0.5, 0.25)
        self.gray = RandomGrayscale(p=0.2)
        self.normalize = Normalize(MEAN, STD)
        self.rng = np.random.default_rng(1)

    def view(self, image: Image.Image) -> Image.Image:
        if self.rng.random() < 0.8:
            image = self.jitter(image)
        image = self.gray(image)
        if self.rng.random() < 0.5:
            image = image.filter(ImageFilter.GaussianBlur(self.rng.uniform(0.1, 2.0)))
        return image

    def sample(self, pixels: Pixels) -> tuple[torch.Tensor, torch.Tensor]:
        image = Image.fromarray(pixels)
        longest = max(image.size)
        side = self.rng.integers(longest // 2, 2 * longest + 1)
        size = tuple(int(s * side / longest + 0.5) for s in image.size)
        image = image.resize(size, Image.Resampling.BILINEAR)
        image = image.crop((0, 0, max(CROP, size[0]), max(CROP, size[1])))
        left, top = (int(self.rng.integers(0, s - CROP + 1)) for s in image.size)
        image = image.crop((left, top, left + CROP, top + CROP))
        if self.rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.normalize(to_tensor(image)), self.normalize(to_tensor(self.view(image)))


class Ours:
    """The loader's own functions."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(1)
        self.config = StrongConfig()
        self.scaling = Scaling.of(TASK, MEAN, torch.device("cpu"))

    def view(self, pixels: Pixels) -> NDArray[np.generic]:
        return strong_view(self.rng, pixels, np.ones(pixels.shape[:2], np.bool_), SPACE, self.config)

    def crop(self, pixels: Pixels) -> Crop:
        size = (pixels.shape[0], pixels.shape[1])
        window, out = draw_window(self.rng, size, draw_scaled_size(self.rng, size, AUGMENT), CROP)
        geometry = draw_geometry(self.rng, window, out, AUGMENT)
        source = pixels[window.row : window.row + window.height, window.col : window.col + window.width]
        image = transform_image(source, geometry)
        mix = box_mask(draw_box(self.rng, CROP, self.config), CROP)[None]
        return Crop(image, np.ones(image.shape[:2], np.bool_), None, (self.view(image),), mix)


def rate(action: Callable[[], object], count: int) -> float:
    """Calls per second."""
    start = time.perf_counter()
    for _ in range(count):
        action()
    return count / (time.perf_counter() - start)


def benchmark(images: list[Pixels]) -> None:
    reference, ours, rng = Reference(), Ours(), np.random.default_rng(2)
    crops = [np.ascontiguousarray(image[:CROP, :CROP]) for image in images]
    pillow_crops = [Image.fromarray(crop) for crop in crops]
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))

    def pick() -> int:
        return int(rng.integers(len(images)))

    def their_batch() -> None:
        for views in zip(*(reference.sample(images[pick()]) for _ in range(BATCH)), strict=True):
            torch.stack(views)

    def host_batch() -> object:
        return collate([ours.crop(images[pick()]) for _ in range(BATCH)], CROP)

    def our_batch() -> None:
        samples = to_samples(collate([ours.crop(images[pick()]) for _ in range(BATCH)], CROP), ours.scaling)
        assert samples.strong is not None
        for views in (samples.images, samples.strong):
            (views - mean) / std

    runs: dict[str, tuple[Callable[[], object], int, int]] = {
        "view, PIL": (lambda: reference.view(pillow_crops[pick()]), 12, 1),
        "view, ours": (lambda: ours.view(crops[pick()]), 100, 1),
        "sample, PIL": (their_batch, 2, BATCH),
        "sample, ours, loader's part": (host_batch, 10, BATCH),
        "sample, ours, with the device's part on the same core": (our_batch, 5, BATCH),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, (action, count, size) in runs.items():
            rates[name].append(rate(action, count) * size)
    print(f"{len(images)} images, crop {CROP}, batch {BATCH}, one thread, {ROUNDS} rounds")
    for name, values in rates.items():
        base = rates[f"{name.split(',')[0]}, PIL"]
        ratios = [value / slow for value, slow in zip(values, base, strict=True)]
        spread = f"[{min(ratios):.1f}-{max(ratios):.1f}]"
        print(f"{name:<56}{statistics.median(values):>8.0f}/s  {statistics.median(ratios):5.1f}x {spread}")


def changes(crop: Pixels, view: Pixels) -> dict[str, float]:
    """How a view differs from its crop; luma and chroma as in YIQ, hue as a turn about the grey axis."""
    before, after = (_look(image) for image in (crop, view))
    turn = (after["hue"] - before["hue"] + 0.5) % 1 - 0.5
    found = {name: after[name] / max(before[name], 1e-6) for name in ("brightness", "contrast", "saturation")}
    # A grey view has no hue.
    return found | {"sharpness": after["edges"] / before["edges"], "hue": turn if after["saturation"] > 1 else 0.0}


def _look(image: Pixels) -> dict[str, float]:
    rgb = image.astype(np.float32)
    luma = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    i = rgb @ np.array([0.595716, -0.274453, -0.321263], np.float32)
    q = rgb @ np.array([0.211456, -0.522591, 0.311135], np.float32)
    return {
        "brightness": float(luma.mean()),
        "contrast": float(luma.std()),
        "saturation": float(np.hypot(i, q).mean()),
        "hue": float(np.arctan2(q.mean(), i.mean()) / (2 * np.pi)),
        "edges": float(np.abs(cv2.Laplacian(luma, cv2.CV_32F)).mean() / max(float(luma.std()), 1e-3)),
    }


def compare(images: list[Pixels], draws: int) -> None:
    """Quantiles of the changes under both recipes."""
    reference, ours = Reference(), Ours()
    crops = [np.ascontiguousarray(image[:256, :256]) for image in images]
    pairs = [(crop, np.asarray(reference.view(Image.fromarray(crop)))) for crop in crops * (draws // len(crops))]
    theirs = [changes(*pair) for pair in pairs]
    own = [changes(crop, ours.view(crop).astype(np.uint8)) for crop in crops * (draws // len(crops))]
    chance = 1.36 * np.sqrt(2 / len(own))
    print(f"\n{len(own)} views each; quantiles 5, 25, 50, 75, 95 % of the change; chance {chance:.3f}")
    for name in own[0]:
        values = [np.array([entry[name] for entry in entries]) for entries in (theirs, own)]
        grid = np.sort(np.concatenate(values))
        distance = np.abs(np.subtract(*(np.searchsorted(np.sort(v), grid, "right") / len(v) for v in values))).max()
        for label, v in zip(("PIL", "ours"), values, strict=True):
            print(f"{name:<12}{label:<6}" + "".join(f"{q:8.3f}" for q in np.quantile(v, (0.05, 0.25, 0.5, 0.75, 0.95))))
        print(f"{'':<12}distance {distance:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of images of at least 518 pixels; default: generated")
    parser.add_argument("--draws", type=int, default=600)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    torch.manual_seed(0)
    images = make_images()
    if arguments.data is not None:
        files = sorted(arguments.data.iterdir())[:12]
        images = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    benchmark(images)
    compare(images, arguments.draws)


if __name__ == "__main__":
    main()
