"""Prepares one large scene with labels into tiles, against the loop of the published scripts; and reads labels.

    python benchmarks/prepare.py [--side 6000] [--tile 512] [--rounds 3]

The loop is what ISPRS conversion scripts do: Pillow and NumPy, the whole image in memory, one pass over the label per
colour, a PNG per tile and label. Each run is a process of its own with two threads at most.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import rasterio
from PIL import Image

from rsseg.data.index import LabelMap
from rsseg.data.labels import LabelTable
from rsseg.datasets.measure import count_classes
from rsseg.datasets.prepare.options import PrepareOptions
from rsseg.datasets.prepare.run import prepare

COLORS = ((255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0))
PARTS = ("2_10", "2_13")
"""One scene to measure, and a small one so that the split rule has a test image."""


def make_source(folder: Path, side: int) -> Path:
    """A scene like an aerial image: smooth tones, noise, blobs of classes; uncompressed strips."""
    rng = np.random.default_rng(1)
    for name, size in zip(PARTS, (side, 64), strict=True):
        coarse = rng.random((6, size // 50 + 2, size // 50 + 2), np.float32)
        classes = np.stack([cv2.resize(layer, (size, size)) for layer in coarse]).argmax(0)
        tones = np.array(COLORS, np.float32)[classes] * 0.4 + 60
        image = (tones + rng.normal(0, 8, tones.shape).astype(np.float32)).clip(1, 255).astype(np.uint8)
        label = np.array(COLORS, np.uint8)[classes]
        for folder_name, suffix, pixels in (("2_Ortho_RGB", "RGB", image), ("5_Labels_all", "label", label)):
            path = folder / folder_name / f"top_potsdam_{name}_{suffix}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            with rasterio.open(path, "w", driver="GTiff", height=size, width=size, count=3, dtype="uint8",
                               interleave="pixel", photometric="RGB") as file:  # fmt: skip
                file.write(pixels.transpose(2, 0, 1))
    return folder


def loop(source: Path, out: Path, tile: int) -> None:
    """The conversion that the published scripts make, without their framework."""
    Image.MAX_IMAGE_PIXELS = None
    for folder, suffix in (("2_Ortho_RGB", "RGB"), ("5_Labels_all", "label")):
        for path in sorted((source / folder).iterdir()):
            image = np.array(Image.open(path))
            if suffix == "label":
                weights = np.array([4, 3, 2])
                keys = image.reshape(-1, 3) @ weights
                values = np.zeros_like(keys)
                for index, color in enumerate(COLORS, start=1):
                    values[keys == np.array(color) @ weights] = index
                image = values.reshape(image.shape[:2]).astype(np.uint8)
            (out / suffix).mkdir(parents=True, exist_ok=True)
            height, width = image.shape[:2]
            for row in [*range(0, height - tile, tile), max(height - tile, 0)]:
                for col in [*range(0, width - tile, tile), max(width - tile, 0)]:
                    part = Image.fromarray(image[row : row + tile, col : col + tile])
                    part.save(out / suffix / f"{path.stem}_{col}_{row}.png")


def ours(source: Path, out: Path, tile: int, jobs: int) -> None:
    options = PrepareOptions(src=source, out=out, tile=tile, jobs=jobs)
    prepare("potsdam", options, lambda *_: None)


def read_labels(source: Path, out: Path) -> float:
    """Megapixels per second of `verify`'s label pass over uncompressed 8-bit labels, one thread."""
    with rasterio.open(source / "5_Labels_all" / f"top_potsdam_{PARTS[0]}_label.tif") as file:
        labels = (file.read(1) // 64).astype(np.uint8)
    out.mkdir()
    paths = [out / f"{number}.tif" for number in range(4)]
    for path in paths:
        profile = {"driver": "GTiff", "height": len(labels), "width": len(labels), "count": 1, "dtype": "uint8"}
        with rasterio.open(path, "w", **profile) as file:
            file.write(labels, 1)
    table = LabelTable(LabelMap(values={i: i for i in range(4)}), 4)
    started = time.perf_counter()
    for path in paths:
        count_classes(path, table, 4, None)
    return len(paths) * labels.size / 1e6 / (time.perf_counter() - started)


def measured(arguments: list[str]) -> dict[str, float]:
    """Run this file in a process of its own; seconds of the work and peak memory."""
    command = [sys.executable, __file__, "--run", *arguments]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(answer.stdout.splitlines()[-1])


def run_one(kind: str, source: Path, out: Path, tile: int) -> None:
    started, busy = time.perf_counter(), time.process_time()
    found = {}
    if kind == "make":
        make_source(source, tile)
    elif kind == "loop":
        loop(source, out, tile)
    elif kind == "labels":
        found["rate"] = read_labels(source, out)
    else:
        ours(source, out, tile, int(kind))
    seconds = time.perf_counter() - started
    # not getrusage: that begins with the peak of the process that started this one
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024
    print(json.dumps({"seconds": seconds, "cpu": time.process_time() - busy, "mb": peak, **found}))


def same_files(first: Path, second: Path) -> bool:
    names = [sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file()) for root in (first, second)]
    return names[0] == names[1] and all((first / n).read_bytes() == (second / n).read_bytes() for n in names[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=6000)
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", nargs=4, metavar=("KIND", "SOURCE", "OUT", "TILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        kind, source, out, tile = options.run
        run_one(kind, Path(source), Path(out), int(tile))
        return
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        source = root / "source"
        measured(["make", str(source), "", str(options.side)])
        results: dict[str, list[dict[str, float]]] = {}
        for number in range(options.rounds):
            for kind in ("loop", "1", "2", "labels"):
                out = root / f"{kind}-{number}"
                results.setdefault(kind, []).append(measured([kind, str(source), str(out), str(options.tile)]))
        seconds = {kind: statistics.median(r["seconds"] for r in runs) for kind, runs in results.items()}
        side = options.side
        print(f"{side} x {side} RGB with labels into {options.tile}-pixel tiles, median of {options.rounds}:")
        for kind, title in (("loop", "Pillow and NumPy loop"), ("1", "rsseg, --jobs 1"), ("2", "rsseg, --jobs 2")):
            peak, cpu = max(r["mb"] for r in results[kind]), statistics.median(r["cpu"] for r in results[kind])
            ratio = seconds["loop"] / seconds[kind]
            print(f"  {title:22} {seconds[kind]:6.2f} s  {ratio:5.2f}x  processor {cpu:6.2f} s  peak {peak:5.0f} MB")
        print(f"  same bytes for --jobs 1 and 2: {same_files(root / '1-0', root / '2-0')}")
        rates = [r["rate"] for r in results["labels"]]
        print(f"  verify, uncompressed uint8 labels, one thread: {statistics.median(rates):.0f} Mpx/s")


if __name__ == "__main__":
    main()
