"""Rate of predicting a scene against that of the bare network on tiles in memory.

    python benchmarks/predict_speed.py [--side 4000] [--tile N] [--dtype auto] [--threads 2] [--rounds 3]

Both run in one process in turn, with equal weights, tiles, dtype and threads. The rate counts the pixels that the
network computes, overlaps included. 1.0 would be a pipeline that costs nothing; the median over the rounds counts.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def forward_rate(segmenter: torch.nn.Module, batch: torch.Tensor, dtype: torch.dtype, seconds: float) -> float:
    """Megapixels per second of forwards alone."""
    pixels, start = 0, time.perf_counter()
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32, cache_enabled=False):
        while time.perf_counter() - start < seconds:
            segmenter(batch)
            pixels += batch.shape[0] * batch.shape[2] * batch.shape[3]
    return pixels / 1e6 / (time.perf_counter() - start)


def main() -> None:
    from benchmarks.scenes import make_segmenter, write_scene
    from rsseg.inference.device import keep_heap, ready_to_predict, resolve_precision
    from rsseg.scene.options import SceneOptions
    from rsseg.scene.predict import plan_scene, predict_scene

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=4000)
    parser.add_argument("--tile", type=int)
    parser.add_argument("--blend", default="crop")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    keep_heap()
    segmenter, cpu = make_segmenter(), torch.device("cpu")
    network, dtype = ready_to_predict(segmenter, cpu, resolve_precision(arguments.dtype, cpu))
    choices = {"tile": arguments.tile, "blend": arguments.blend, "dtype": arguments.dtype, "device": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        scene, output = write_scene(Path(folder) / "scene.tif", arguments.side), Path(folder) / "out.tif"
        plan = plan_scene(segmenter, scene, output, SceneOptions(**choices))
        batch = torch.rand(plan.batch_size, 3, plan.tile, plan.tile).contiguous(memory_format=torch.channels_last)
        forward_rate(network, batch, dtype, 2)
        print(plan.text())
        print("round | network alone (Mpx/s) | scene (Mpx/s) | ratio | with COG (Mpx/s) | ratio")
        ratios = []
        for number in range(arguments.rounds):
            before = forward_rate(network, batch, dtype, 4)
            rates = []
            for file_format in ("gtiff", "cog"):
                options = SceneOptions(**choices, format=file_format, overwrite=True)
                result = predict_scene(segmenter, scene, output, options)
                rates.append(result.megapixels_per_second * plan.redundancy)
            alone = (before + forward_rate(network, batch, dtype, 4)) / 2
            ratios.append(rates[0] / alone)
            print(
                f"{number + 1} | {alone:.2f} | {rates[0]:.2f} | {rates[0] / alone:.3f} "
                f"| {rates[1]:.2f} | {rates[1] / alone:.3f}"
            )
    print(f"median ratio {statistics.median(ratios):.3f} [{min(ratios):.3f}-{max(ratios):.3f}]")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
