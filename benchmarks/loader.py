"""Loader against a PIL pipeline in the style of torchvision v1, images per second of one core.

Both decode, resize by 0.5 to 2, crop 512 px, mirror, change each of four colour properties with probability 0.5, and
make a batch. The PIL pipeline resizes the whole image and normalizes on the processor; ours reads the window that the
crop needs, in uint8, and leaves the step to normalized float32 to the device ("+ normalized" adds it on this
processor). Rounds are interleaved; ratios are taken within a round.

    python benchmarks/loader.py [--data FOLDER_WITH_images_AND_masks]
    python benchmarks/loader.py --small 128

`--small` compares ways to store 1500 small images of this side, more than a reader keeps mapped: the cache, all pixels
packed in one memory-mapped array, and the PNG files. Prints processor time in milliseconds per image and mask.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from rsseg.config import AugmentConfig, StrongConfig
from rsseg.data.assembly import StreamPlan, StreamReader
from rsseg.data.augmentation import ColorSpace
from rsseg.data.dataset import SampleReader
from rsseg.data.index import IndexItem, LabelMap, SegmentationIndex
from rsseg.data.streams import Scaling, to_samples
from rsseg.task import ClassInfo, Task

CROP = 512
BATCH = 8
ROUNDS = 5
MEAN, STD = torch.tensor((0.485, 0.456, 0.406))[:, None, None], torch.tensor((0.229, 0.224, 0.225))[:, None, None]


def make_images(folder: Path, count: int = 12, side: int = 1024) -> None:
    """JPEG images with fields, texture and noise, and PNG masks."""
    rng = np.random.default_rng(0)
    for number in range(count):
        fields = cv2.resize(rng.integers(0, 5, (24, 24), dtype=np.uint8), (side, side), interpolation=cv2.INTER_NEAREST)
        tones = rng.integers(40, 200, (5, 3))[fields].astype(np.float32)
        texture = cv2.resize(rng.normal(0, 20, (side // 4, side // 4, 3)).astype(np.float32), (side, side))
        pixels = np.clip(tones + texture + rng.normal(0, 4, (side, side, 3)), 0, 255).astype(np.uint8)
        for kind, array, suffix in (("images", pixels, "jpg"), ("masks", fields, "png")):
            (folder / kind).mkdir(exist_ok=True)
            Image.fromarray(array).save(folder / kind / f"{number:02d}.{suffix}", quality=92)


def pil_batch(pairs: list[tuple[Path, Path]], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Eight crops, normalized float32."""
    images, masks = [], []
    for _ in range(BATCH):
        image_file, mask_file = pairs[rng.integers(len(pairs))]
        image, mask = Image.open(image_file).convert("RGB"), Image.open(mask_file)
        factor = rng.uniform(0.5, 2.0)
        size = round(image.width * factor), round(image.height * factor)
        image = image.resize(size, Image.Resampling.BILINEAR)
        mask = mask.resize(size, Image.Resampling.NEAREST)
        right, bottom = max(size[0], CROP), max(size[1], CROP)
        image, mask = image.crop((0, 0, right, bottom)), mask.crop((0, 0, right, bottom))
        left, top = rng.integers(0, right - CROP + 1), rng.integers(0, bottom - CROP + 1)
        box = (left, top, left + CROP, top + CROP)
        image, mask = image.crop(box), mask.crop(box)
        if rng.random() < 0.5:
            flip = Image.Transpose.FLIP_LEFT_RIGHT
            image, mask = image.transpose(flip), mask.transpose(flip)
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            if rng.random() < 0.5:
                image = enhance(image).enhance(rng.uniform(0.5, 1.5))
        if rng.random() < 0.5:
            hue, saturation, value = image.convert("HSV").split()
            shift = int(rng.integers(-25, 26))
            hue = hue.point([(i + shift) % 256 for i in range(256)])
            image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        images.append((pixels - MEAN) / STD)
        masks.append(torch.from_numpy(np.array(mask)).long())
    return torch.stack(images), torch.stack(masks)


def open_stream(folder: Path, pairs: list[tuple[Path, Path]], *, cache: bool) -> tuple[StreamReader, Task]:
    classes = tuple(ClassInfo(name=f"c{i}", value=i, color=(i, i, i)) for i in range(8))
    task = Task(
        name="benchmark", classes=classes, bands=("red", "green", "blue"), scale=(1 / 255,) * 3, offset=(0.0,) * 3
    )
    items = tuple(
        IndexItem(image=str(image.resolve()), mask=str(mask.resolve()), split="train") for image, mask in pairs
    )
    labels = LabelMap(values={i: i for i in range(8)} | {255: 255})
    index = SegmentationIndex(task=task, label_map=labels, items=items, root=folder)
    plan = StreamPlan(
        name="labeled",
        seed=0,
        items=items,
        masks=True,
        strong_views=0,
        batch_size=BATCH,
        augment=AugmentConfig(crop_size=CROP, scale_range=(0.5, 2.0), photometric="fast"),
        strong=StrongConfig(),
        space=ColorSpace.of(task.bands, task.scale, task.offset),
    )
    return StreamReader(plan, SampleReader(index, task.bands, cache=cache)), task


def rate(make_batch: Callable[[int], object], batches: int, start: int) -> float:
    """Images per second."""
    begin = time.perf_counter()
    for step in range(start, start + batches):
        make_batch(step)
    return batches * BATCH / (time.perf_counter() - begin)


def compare_stores(side: int, count: int = 1500) -> None:
    """Reading small images from the cache, from a packed array, and from their files."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texture = cv2.resize(rng.normal(100, 30, (side // 4, side // 4, 3)).astype(np.float32), (side, side))
        pairs = []
        for number in range(count):
            pixels = np.clip(texture + rng.normal(0, 4, (side, side, 3)), 0, 255).astype(np.uint8)
            pair = folder / f"{number}.png", folder / f"{number}-mask.png"
            for array, file in zip((pixels, rng.integers(0, 5, (side, side), np.uint8)), pair, strict=True):
                Image.fromarray(array).save(file)
            pairs.append(pair)
        cached, direct = (open_stream(folder, pairs, cache=cache)[0] for cache in (True, False))
        items = cached.plan.items
        packed = [
            np.lib.format.open_memmap(folder / name, "w+", np.uint8, (count, side, side, *bands))
            for name, bands in (("images.npy", (3,)), ("masks.npy", ()))
        ]
        for number, item in enumerate(items):  # every image is converted once
            pixels, _, packed[1][number] = cached._reader.sample(item)
            packed[0][number] = pixels.transpose(1, 2, 0)

        def read(stream: StreamReader, number: int) -> None:
            for array in stream._reader.sample(items[number]):
                np.array(array)

        def milliseconds(take: Callable[[int], object], numbers: np.ndarray) -> float:
            begin = time.process_time()
            for number in numbers:
                take(int(number))
            return 1e3 * (time.process_time() - begin) / len(numbers)

        times: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            some = rng.permutation(count)[:300]
            cached._reader._images.clear()
            cached._reader._masks.clear()
            runs = {
                "cache, mapped anew": lambda number: read(cached, number),
                "cache, still mapped": lambda number: read(cached, number),
                "packed": lambda number: [np.array(array[number]) for array in packed],
                "files": lambda number: read(direct, number),
            }
            for name, take in runs.items():
                times.setdefault(name, []).append(milliseconds(take, some))
    print(f"{count} images of {side} x {side}, {ROUNDS} rounds")
    for name, values in times.items():
        print(f"{name:<20}{statistics.median(values):>8.3f} ms   {min(values):.3f}-{max(values):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with images/ and masks/ of equal stems; default: generated")
    parser.add_argument("--small", type=int, metavar="SIDE", help="compare stores of small images instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    if arguments.small is not None:
        compare_stores(arguments.small)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.data is None:
            make_images(folder)
        source = arguments.data or folder
        images = sorted((source / "images").iterdir())
        pairs = [(image, source / "masks" / f"{image.stem}.png") for image in images]
        cached, task = open_stream(folder, pairs, cache=True)
        direct, _ = open_stream(folder, pairs, cache=False)
        scaling = Scaling.of(task, (0.5,) * 3, torch.device("cpu"))
        rng = np.random.default_rng(0)
        for step in range(-(-len(pairs) // BATCH)):  # every image is converted once
            cached.micro_batch(step, rank=0, world_size=1)

        runs: dict[str, tuple[Callable[[int], object], int]] = {
            "PIL": (lambda _: pil_batch(pairs, rng), 2),
            "cached": (lambda step: cached.micro_batch(step, rank=0, world_size=1), 40),
            "cached + normalized": (
                lambda step: (to_samples(cached.micro_batch(step, rank=0, world_size=1), scaling).images - MEAN) / STD,
                20,
            ),
            "not cached": (lambda step: direct.micro_batch(step, rank=0, world_size=1), 4),
        }
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(ROUNDS):
            for name, (make_batch, batches) in runs.items():
                rates[name].append(rate(make_batch, batches, turn * batches))
    print(f"{len(pairs)} images, crop {CROP}, batch {BATCH}, one thread, {ROUNDS} rounds")
    print(f"{'loader':<20}{'images/s':>10}{'ratio to PIL':>14}   range")
    for name, values in rates.items():
        ratios = [value / pil for value, pil in zip(values, rates["PIL"], strict=True)]
        spread = f"{min(ratios):.1f}-{max(ratios):.1f}"
        print(f"{name:<20}{statistics.median(values):>10.0f}{statistics.median(ratios):>14.1f}   {spread}")


if __name__ == "__main__":
    main()
