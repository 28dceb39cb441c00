"""Predicting a scene against the usual slide inference, each in a process of its own with equal weights and threads.

    python benchmarks/predict_slide.py [--sides 5000 10000] [--tile 512] [--overlap 128] [--threads 2] [--rounds 5]

The usual way: the whole image in memory as float32, a window after the other, the logits of each padded to the whole
image and added to a canvas of all classes, at last a division and an argmax. Its cost per window is the same all along:
`--windows` of them are run and the rest is computed. Reading, canvases, division, argmax and writing are run in full.
Seconds are whole processes, imports included; "loop" leaves out the imports. Needs 75 bytes of memory per pixel.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def slide(scene: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """The usual way."""
    import numpy as np
    import rasterio
    import torch
    import torch.nn.functional as F

    from benchmarks.scenes import make_segmenter
    from rsseg.inference.tiling import tile_origins

    torch.set_num_threads(arguments.threads)
    segmenter = make_segmenter().eval()
    warm_up = torch.rand(1, 3, arguments.tile, arguments.tile)
    with torch.inference_mode():
        segmenter(warm_up)
    start = time.perf_counter()
    with rasterio.open(scene) as file:
        image = torch.from_numpy(file.read().astype(np.float32))[None] / 255
        profile = file.profile
    height, width = image.shape[-2:]
    classes = segmenter.task.num_classes
    rows, cols = (tile_origins(n, arguments.tile, arguments.tile - arguments.overlap) for n in (height, width))
    windows = [(top, left) for top in rows for left in cols]
    with torch.inference_mode():
        canvas = torch.zeros(1, classes, height, width)
        count = torch.zeros(1, 1, height, width)
        tiled = time.perf_counter()
        # Windows from all over the image: padding costs the same everywhere, page faults only where it is new.
        for top, left in windows[:: max(1, len(windows) // arguments.windows)][: arguments.windows]:
            logits = segmenter(image[:, :, top : top + arguments.tile, left : left + arguments.tile])
            right, bottom = width - left - logits.shape[3], height - top - logits.shape[2]
            canvas += F.pad(logits, (left, right, top, bottom))
            count[:, :, top : top + arguments.tile, left : left + arguments.tile] += 1
        per_window = (time.perf_counter() - tiled) / arguments.windows
        tiled = time.perf_counter() - tiled
        result = (canvas / count.clamp(min=1)).argmax(1)[0].to(torch.uint8).numpy()
    profile.update(count=1, nodata=255, predictor=1, photometric=None)
    del profile["photometric"]
    with rasterio.open(scene.with_name("slide.tif"), "w", **profile) as file:
        file.write(result, 1)
    rest = time.perf_counter() - start - tiled
    return {"loop": rest + per_window * len(windows), "rest": rest, "tiled": tiled}


def ours(scene: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """rsseg, in full."""
    import torch

    from benchmarks.scenes import make_segmenter
    from rsseg.scene.options import SceneOptions
    from rsseg.scene.predict import predict_scene

    torch.set_num_threads(arguments.threads)
    segmenter = make_segmenter().eval()
    start = time.perf_counter()
    options = SceneOptions(tile=arguments.tile, overlap=arguments.overlap, device="cpu", overwrite=True)
    predict_scene(segmenter, scene, scene.with_name("ours.tif"), options)
    return {"loop": time.perf_counter() - start, "tiled": 0.0}


def measure(what: str, scene: Path, arguments: list[str]) -> tuple[float, float]:
    """Seconds of a whole process and of its loop."""
    start = time.perf_counter()
    command = [sys.executable, __file__, *arguments, "--measure", what, "--scene", str(scene)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    wall = time.perf_counter() - start
    m = json.loads(text)
    if what == "slide":
        wall += m["loop"] - m["rest"] - m["tiled"]
    return wall, m["loop"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[5000, 10000])
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--overlap", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--scene", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        run = slide if arguments.measure == "slide" else ours
        print(json.dumps(run(arguments.scene, arguments)))
        return
    from benchmarks.scenes import write_scene

    print("side | round | usual (s) | rsseg (s) | faster | usual loop (s) | rsseg loop (s) | faster")
    for side in arguments.sides:
        whole, loop = [], []
        with tempfile.TemporaryDirectory() as folder:
            scene = write_scene(Path(folder) / "scene.tif", side)
            for number in range(arguments.rounds):
                usual = measure("slide", scene, sys.argv[1:])
                mine = measure("ours", scene, sys.argv[1:])
                whole.append(usual[0] / mine[0])
                loop.append(usual[1] / mine[1])
                print(
                    f"{side} | {number + 1} | {usual[0]:.0f} | {mine[0]:.1f} | {whole[-1]:.1f} "
                    f"| {usual[1]:.0f} | {mine[1]:.1f} | {loop[-1]:.1f}",
                    flush=True,
                )
        print(
            f"{side} px: {statistics.median(whole):.1f} times as fast [{min(whole):.1f}-{max(whole):.1f}], "
            f"loop alone {statistics.median(loop):.1f}",
            flush=True,
        )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
