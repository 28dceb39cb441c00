"""Rate of predicting a scene against that of the bare network on tiles in memory, and how it grows with the scene.

    python benchmarks/predict_speed.py [--side 5000] [--large 10000] [--tile N] [--threads 2] [--rounds 5]

All run in one process in turn, with equal weights, tiles, dtype and threads; the network alone is measured before and
after each round, twice: as it is usually run, all threads on one batch, and in parallel batches, as the
prediction runs it where memory suffices. Rates count the pixels that the network computes, overlaps included: 1.0 would
be a pipeline that costs nothing. "Steady" is the plain GeoTIFF, whose work is that of the pipeline; a COG adds its
overviews at the end. "Bound" is the ratio of a pipeline that only decompresses the scene and compresses the classes,
with perfect use of all threads.
"""

import argparse
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import rasterio
import torch

ROOT = Path(__file__).parents[1]
SECONDS = 3.0


def forward_rate(network: torch.nn.Module, batch: torch.Tensor, dtype: torch.dtype, parallel_batches: int) -> float:
    """Megapixels per second of forwards alone, during a few seconds."""
    end = time.perf_counter() + SECONDS

    def compute(_: int) -> int:
        pixels = 0
        with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            while time.perf_counter() < end:
                network(batch)
                pixels += batch.shape[0] * batch.shape[2] * batch.shape[3]
        return pixels

    threads = (torch.get_num_threads() // parallel_batches,)
    start = time.perf_counter()
    with ThreadPoolExecutor(parallel_batches, initializer=torch.set_num_threads, initargs=threads) as pool:
        pixels = sum(pool.map(compute, range(parallel_batches)))
    return pixels / 1e6 / (time.perf_counter() - start)


def codec_seconds(scene: Path, classes: Path) -> float:
    """Processor time of reading a scene and writing its classes, block by block, with GDAL alone."""
    copy = classes.with_name("copy.tif")
    start = time.thread_time()
    with (
        rasterio.open(scene) as source,
        rasterio.open(classes) as made,
        rasterio.open(copy, "w", **made.profile) as out,
    ):
        for _, window in made.block_windows():
            source.read(window=window)
            out.write(made.read(window=window), window=window)
    seconds = time.thread_time() - start
    copy.unlink()
    return seconds


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} [{min(values):.3f}-{max(values):.3f}]"


def main() -> None:
    from benchmarks.scenes import make_segmenter, processor, write_scene
    from rsseg.inference.device import resolve_precision
    from rsseg.inference.machine import keep_heap
    from rsseg.inference.network import ready_to_predict
    from rsseg.scene.memory import prepare_network
    from rsseg.scene.options import SceneOptions
    from rsseg.scene.plan import prepare_scene
    from rsseg.scene.predict import predict_scene

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=5000)
    parser.add_argument("--large", type=int, default=10000, help="0 leaves it out")
    parser.add_argument("--tile", type=int)
    parser.add_argument("--blend", default="crop")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    keep_heap()
    segmenter, cpu = make_segmenter(), torch.device("cpu")
    network, dtype = ready_to_predict(segmenter, cpu, resolve_precision(arguments.dtype, cpu))
    choices = {"tile": arguments.tile, "blend": arguments.blend, "dtype": arguments.dtype, "device": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        scene, output = write_scene(Path(folder) / "scene.tif", arguments.side), Path(folder) / "out.tif"
        runs = [(scene, "gtiff"), (scene, "cog")]
        if arguments.large:
            runs.append((write_scene(Path(folder) / "large.tif", arguments.large), "cog"))
        options = SceneOptions(**choices)
        plan = prepare_scene(prepare_network(segmenter, options), scene, output, options).describe()
        batch = torch.rand(plan.batch_size, 3, *plan.tile).contiguous(memory_format=torch.channels_last)
        forward_rate(network, batch, dtype, plan.parallel_batches)
        print(f"{processor()}, {arguments.threads} threads, {plan.dtype}")
        print(plan.text())
        print(
            "round | network alone, usual / parallel (Mpx/s) | steady (Mpx/s), over usual / parallel | with COG | s/Mpx"
        )
        ratios: dict[str, list[float]] = {
            "steady rate over the network alone, usual": [],
            "steady rate over the network alone, parallel": [],
            "with COG and overviews over the network alone, usual": [],
        }
        growth: list[float] = []
        bounds: list[float] = []
        for number in range(arguments.rounds):
            before = [forward_rate(network, batch, dtype, count) for count in (1, plan.parallel_batches)]
            rates, costs = [], []
            for file, file_format in runs:
                options = SceneOptions(**choices, format=file_format, overwrite=True)
                result = predict_scene(segmenter, file, output, options)
                rates.append(result.megapixels_per_second * plan.redundancy)
                costs.append(1 / result.megapixels_per_second)
            after = [forward_rate(network, batch, dtype, count) for count in (1, plan.parallel_batches)]
            usual, parallel = ((a + b) / 2 for a, b in zip(before, after, strict=True))
            row = (rates[0] / usual, rates[0] / parallel, rates[1] / usual)
            network_seconds = arguments.side**2 / 1e6 * plan.redundancy / parallel * arguments.threads
            bounds.append(network_seconds / (network_seconds + codec_seconds(scene, output)))
            for column, value in zip(ratios.values(), row, strict=True):
                column.append(value)
            if arguments.large:
                growth.append(costs[2] / costs[1])
            print(
                f"{number + 1} | {usual:.2f} / {parallel:.2f} | {rates[0]:.2f}, {row[0]:.3f} / {row[1]:.3f} "
                f"| {rates[1]:.2f}, {row[2]:.3f} | {', '.join(f'{cost:.3f}' for cost in costs[1:])}",
                flush=True,
            )
    for name, column in ratios.items():
        print(f"{name}: median {spread(column)}")
    print(f"bound of the second ratio, decompression and compression alone: median {spread(bounds)}")
    if growth:
        print(f"seconds per megapixel, large over small: median {spread(growth)}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
