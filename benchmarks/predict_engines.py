"""Whole processes of `rsseg predict` with each engine, and of the geodeep command, with the same network.

    python benchmarks/predict_engines.py [--sides 256 2048 5000] [--rounds 3] [--threads 2] [--dtype float32] [--int8]

The programs take turns within a round, so that other load on the machine hits all of them; ratios are taken within a
round. Engines are warm: their graph was exported by a run before. geodeep is measured if its command is found: it
filters the classes and writes no overviews. `import` is a process that imports torch and ends. `--dtype` is that of
torch and openvino; onnx and geodeep compute in float32. `--int8` adds both engines in int8, calibrated on noise.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENGINES = ("torch", "onnx", "openvino")


def write_images(folder: Path) -> Path:
    """A dataset of images without labels, to calibrate int8 with."""
    from benchmarks.scenes import make_task, write_scene
    from rsseg.data.index import IndexItem, LabelMap, SegmentationIndex

    folder.mkdir()
    write_scene(folder / "image.tif", 512)
    items = (IndexItem(image="image.tif", split="train"),)
    SegmentationIndex(task=make_task(), label_map=LabelMap(), items=items).save(folder)
    return folder


def seconds(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Wall-clock and processor seconds of a process."""
    before, start = os.times(), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=environment)
    wall, after = time.perf_counter() - start, os.times()
    return wall, sum(after[2:4]) - sum(before[2:4])


def main() -> None:
    from benchmarks.scenes import RECIPE, make_task, processor, write_random_model, write_scene

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 2048, 5000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--format", default="cog")
    arguments = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "PYTHONPATH": str(ROOT)}
    environment["PYTHONDONTWRITEBYTECODE"] = ""  # what pip installs is compiled
    geodeep = shutil.which("geodeep") or shutil.which("geodeep", path=str(Path(sys.executable).parent))
    print(f"{processor()}, {arguments.threads} threads, torch and openvino: {arguments.dtype}")
    rsseg = [sys.executable, "-m", "rsseg"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model.safetensors"
        write_random_model(model, RECIPE, make_task().model_copy(update={"gsd_m": 0.5}))
        subprocess.run([*rsseg, "export", str(model), "--for", "geodeep"], check=True, capture_output=True)
        images = write_images(folder / "images") if arguments.int8 else folder
        for side in arguments.sides:
            scene = write_scene(folder / f"{side}.tif", side)
            output = ["-o", str(folder / "out.tif"), "--overwrite", "--format", arguments.format]
            ours = [*rsseg, "predict", str(scene), "--model", str(model), *output, "--engine"]
            programs = {
                engine: [*ours, engine, *(() if engine == "onnx" else ("--dtype", arguments.dtype))]
                for engine in ENGINES
            }
            if arguments.int8:
                quantized = ["--quantize", "int8", "--calibrate", str(images)]
                programs |= {f"{engine} int8": [*ours, engine, *quantized] for engine in ENGINES[1:]}
            warm = list(programs.values())
            programs["import"] = [sys.executable, "-c", "import torch"]
            if geodeep:
                theirs = [geodeep, str(scene), str(folder / "model.onnx"), "-t", "mask", "-q"]
                programs["geodeep"] = [*theirs, "-o", str(folder / "theirs.tif")]
                programs["geodeep"] += ["--max-threads", str(arguments.threads)]
            for command in warm:
                seconds(command, environment)
            rounds = []
            for number in range(arguments.rounds):
                rounds.append({name: seconds(command, environment) for name, command in programs.items()})
                row = ", ".join(f"{name} {wall:.1f} ({cpu:.1f})" for name, (wall, cpu) in rounds[-1].items())
                print(f"{side} px, round {number + 1}: wall s (processor s): {row}", flush=True)
            base = "geodeep" if geodeep else "torch"
            for name in programs:
                for what, index in (("wall", 0), ("processor", 1)):
                    ratios = [r[base][index] / r[name][index] for r in rounds]
                    print(
                        f"{side} px, {name}: {statistics.median(ratios):.2f} times as fast as {base} "
                        f"[{min(ratios):.2f}-{max(ratios):.2f}], {what}",
                        flush=True,
                    )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
