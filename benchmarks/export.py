"""Export of a network of about 30 M parameters with its check, beside the bare ONNX exporter on the same network.

    python -m benchmarks.export [--backbone convnext_tiny] [--side 512] [--tile 512]

ConvNeXt-T with an UPerNet decoder of 128 channels, random weights. `export` is `rsseg export MODEL --check SCENE` on a
photograph (scikit-learn's sample image), continued by reflection to the side of the scene; `exporter` loads the model,
calls torch.onnx.export alone and runs the graph on one tile. Seconds of the wall and of the processor, with imports;
each side is a process of its own. Exit code 1 above 30 s of the processor.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.scenes import make_task, write_random_model
from rsseg.checkpoint import Calibration

LIMIT_SECONDS = 30.0
RECIPE = """
name: bench
method: supervised
data: {{path: none}}
backbone: {{name: {backbone}, weights: random}}
decoder: {{type: upernet, channels: 128}}
"""
EXPORTER = """
import sys, onnxruntime, torch
import rsseg
network, side = rsseg.load(sys.argv[1]), int(sys.argv[3])
image = torch.rand(1, 3, side, side)
with torch.no_grad():
    torch.onnx.export(network, (image,), sys.argv[2], dynamo=False, opset_version=17, input_names=["images"])
onnxruntime.InferenceSession(sys.argv[2]).run(None, {"images": image.numpy()})
"""


def make_scene(folder: Path, side: int) -> Path:
    import numpy as np
    import rasterio
    from sklearn.datasets import load_sample_image

    photo = load_sample_image("china.jpg").transpose(2, 0, 1)
    pixels = np.pad(photo, ((0, 0), (0, max(side - 427, 0)), (0, max(side - 640, 0))), mode="symmetric")
    profile = {"driver": "GTiff", "height": side, "width": side, "count": 3, "dtype": "uint8", "crs": "EPSG:32631"}
    place = rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 5_700_000)
    with rasterio.open(folder / "scene.tif", "w", transform=place, **profile) as file:
        file.write(np.ascontiguousarray(pixels[:, :side, :side]))
    return folder / "scene.tif"


def seconds_of(command: list[str]) -> tuple[float, float]:
    """Seconds of the wall and of the processor."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="convnext_tiny")
    parser.add_argument("--side", type=int, default=512, help="of the scene")
    parser.add_argument("--tile", type=int, default=512)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model.safetensors"
        task = make_task().model_copy(update={"dtype": "uint8", "gsd_m": 0.5})
        calibration = Calibration((1.5,) * task.num_classes, "nothing")
        network = write_random_model(model, RECIPE.format(backbone=options.backbone), task, calibration)
        millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        scene = make_scene(folder, options.side)
        tile = ["--tile", str(options.tile)]
        ours = ["export", str(model), "-o", str(folder / "ours.onnx"), "--check", str(scene), *tile]
        commands = {
            "exporter": [
                sys.executable,
                "-W",
                "ignore",
                "-c",
                EXPORTER,
                str(model),
                str(folder / "bare.onnx"),
                tile[1],
            ],
            "export": [sys.executable, "-m", "rsseg", *ours],
        }
        found = {kind: seconds_of(command) for kind, command in commands.items()}
        size = (folder / "ours.onnx").stat().st_size / 1e6
    print(f"{options.backbone}, UPerNet with 128 channels, {millions:.1f} M parameters, {size:.0f} MB as ONNX:")
    for kind, (wall, processor) in found.items():
        print(
            f"  {kind:9} {wall:6.1f} s, {processor:6.1f} s of the processor, {processor / found['exporter'][1]:5.2f}x"
        )
    return int(found["export"][1] > LIMIT_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
