"""Peak memory of predicting a scene, above what importing the libraries takes. Linux only.

    python benchmarks/predict_memory.py [--sides 5000 10000] [--stub] [--blend crop] [--tile N] [--max-memory-mb 500]

Each scene is predicted in a process of its own. With `--stub` the network does nothing, so that scenes may be large.
`--max-memory-mb` limits the prediction. Exits with 1 if a scene needs more, or the last one more than the first, 40 MB
and 200 bytes per column.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def memory_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


def predict(scene: Path, arguments: argparse.Namespace) -> None:
    """The measured process: prints its memory as JSON."""
    import timm  # noqa: F401 - part of the floor: every network needs it
    import torch

    from benchmarks.scenes import StubSegmenter, make_segmenter, make_task
    from rsseg.scene.options import SceneOptions
    from rsseg.scene.predict import predict_scene

    torch.set_num_threads(arguments.threads)
    floor = memory_mb("VmRSS")
    segmenter = StubSegmenter(make_task(arguments.classes)) if arguments.stub else make_segmenter(arguments.classes)
    model = memory_mb("VmRSS")
    options = SceneOptions(
        tile=arguments.tile,
        blend=arguments.blend,
        device="cpu",
        dtype=arguments.dtype,
        max_memory=int(arguments.max_memory_mb * 2**20) or None,
    )
    result = predict_scene(segmenter, scene, scene.with_name("out.tif"), options)
    measured = {
        "floor": floor,
        "model": model - floor,
        "peak": memory_mb("VmHWM") - floor,
        "seconds": result.seconds,
        "dtype": result.dtype,
    }
    print(json.dumps(measured))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[5000, 10000])
    parser.add_argument("--stub", action="store_true")
    parser.add_argument("--classes", type=int, default=6)
    parser.add_argument("--tile", type=int)
    parser.add_argument("--blend", default="crop")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-memory-mb", type=float, default=500, help="0: no limit")
    parser.add_argument("--scene", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.scene:
        predict(arguments.scene, arguments)
        return
    from benchmarks.scenes import write_scene

    print("side (px) | above imports (MB) | of this the model (MB) | imports (MB) | seconds | dtype")
    peaks = []
    for side in arguments.sides:
        with tempfile.TemporaryDirectory() as folder:
            scene = write_scene(Path(folder) / "scene.tif", side, texture=0 if arguments.stub else 16)
            command = [sys.executable, __file__, *sys.argv[1:], "--scene", str(scene)]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        m = json.loads(text)
        peaks.append(m["peak"])
        print(f"{side} | {m['peak']:.0f} | {m['model']:.0f} | {m['floor']:.0f} | {m['seconds']:.1f} | {m['dtype']}")
    growth, allowed = peaks[-1] - peaks[0], 40 + 200 * arguments.sides[-1] / 2**20
    print(f"from the first to the last: {growth:+.0f} MB; 40 MB and 200 bytes per column would be {allowed:.0f} MB")
    if 0 < arguments.max_memory_mb < max(peaks):
        sys.exit(f"{max(peaks):.0f} MB is above the limit of {arguments.max_memory_mb:.0f} MB")
    if growth > allowed:
        sys.exit("memory grows with the scene")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
