"""Export of a network of about 30 M parameters with its check, beside the bare ONNX exporter on the same network.

    python benchmarks/export.py [--backbone convnext_tiny] [--side 512] [--tile 512]

ConvNeXt-T with an UPerNet decoder of 128 channels, random weights. `export` is `rsseg export MODEL --check SCENE` on
a photograph (scikit-learn's sample image), repeated to the side of the scene, which has one tile with `--side` = `--tile`;
`exporter` loads the model, calls torch.onnx.export alone and runs the graph once on one tile. Seconds of the wall and of the
processor, with imports; each side a process of its own. Exit code 1 above 30 s of the processor.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def make_model(folder: Path, backbone: str) -> tuple[Path, float]:
    """A model file, and its parameters in millions."""
    import torch

    from rsseg.checkpoint import ModelHeader, write_model
    from rsseg.methods.registry import segmenter_for
    from rsseg.recipe import RecipeSource, parse_recipe
    from rsseg.task import ClassInfo, Task

    task = Task(
        name="bench",
        classes=tuple(ClassInfo(name=f"class {i}", value=i, color=(40 * i, 0, 0)) for i in range(6)),
        bands=("red", "green", "blue"), dtype="uint8", scale=(1 / 255,) * 3, offset=(0.0,) * 3, gsd_m=0.5,
    )  # fmt: skip
    recipe = parse_recipe(RecipeSource("bench", RECIPE.format(backbone=backbone)))
    torch.manual_seed(0)
    network = segmenter_for(recipe, task)
    # Classes of random weights are nearly equal everywhere: spread them, or rounding decides.
    for parameter in network.decoder.classifier.parameters():
        torch.nn.init.normal_(parameter)
    header = ModelHeader(
        recipe=recipe.model_dump(mode="json"),
        task=task,
        backbones={"backbone": {"name": backbone, "timm_name": backbone, "license": "none"}},
        training={"calibration": {"temperatures": (1.5,) * 6, "fitted_on": "nothing"}},
        made_with={"rsseg": "0.1.0", "torch": torch.__version__},
    )
    write_model(folder / "model.safetensors", network.state_dict(), header)
    return folder / "model.safetensors", sum(p.numel() for p in network.parameters()) / 1e6


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
        model, millions = make_model(folder, options.backbone)
        scene = make_scene(folder, options.side)
        tile = ["--tile", str(options.tile)]
        ours = ["export", str(model), "-o", str(folder / "ours.onnx"), "--check", str(scene), *tile]
        commands = {
            "exporter": [sys.executable, "-W", "ignore", "-c", EXPORTER, str(model), str(folder / "bare.onnx"), tile[1]],
            "export": [sys.executable, "-m", "rsseg", *ours],
        }
        found = {kind: seconds_of(command) for kind, command in commands.items()}
        size = (folder / "ours.onnx").stat().st_size / 1e6
    print(f"{options.backbone}, UPerNet with 128 channels, {millions:.1f} M parameters, {size:.0f} MB as ONNX:")
    for kind, (wall, processor) in found.items():
        print(f"  {kind:9} {wall:6.1f} s, {processor:6.1f} s of the processor, {processor / found['exporter'][1]:5.2f}x")
    return int(found["export"][1] > LIMIT_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
