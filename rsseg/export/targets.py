"""Programs that run an exported network: what they can do, and the metadata that they read, such as a STAC item.

The item follows the machine learning model extension (MLM) 1.5.2.
"""

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import rsseg
from rsseg.checkpoint import Calibration, ModelHeader, calibration_of
from rsseg.errors import UsageError
from rsseg.files import write_json
from rsseg.methods.base import Segmenter
from rsseg.task import Task

TargetName = Literal["onnx", "deepness", "geodeep", "torch-export", "stac-mlm"]
TARGETS: tuple[TargetName, ...] = ("onnx", "deepness", "geodeep", "torch-export", "stac-mlm")
ENDINGS = {"torch-export": ".pt2", "stac-mlm": ".stac.json"}
"""Others are `.onnx`."""
_GEODEEP_BANDS = 3
MLM_SCHEMA = "https://stac-extensions.github.io/mlm/v1.5.2/schema.json"
_FILE_SCHEMA = "https://stac-extensions.github.io/file/v2.1.0/schema.json"
_CLASSES_SCHEMA = "https://stac-extensions.github.io/classification/v2.0.0/schema.json"


@dataclass(frozen=True)
class Geometry:
    """Tile of an exported network.

    tile: side in pixels
    overlap: pixels that neighbouring tiles should share
    resolution_cm: centimetres per pixel
    """

    tile: int
    overlap: int
    resolution_cm: float | None


def divisor(task: Task) -> float:
    """The exported network expects pixels divided by this: 255 for 8 bits, as QGIS Deepness feeds them, 1 otherwise."""
    return 255.0 if task.dtype == "uint8" else 1.0


def check_target(target: TargetName, task: Task, geometry: Geometry) -> None:
    """Raise `UsageError` if the target cannot run a network of this task."""
    if target not in ("deepness", "geodeep"):
        return
    if task.dtype != "uint8":
        raise UsageError(
            f"--for {target}: it divides pixels by 255, so it runs networks of 8-bit images only; this one was trained "
            f"on {task.dtype}. Give --for onnx."
        )
    if target == "geodeep" and len(task.bands) != _GEODEEP_BANDS:
        raise UsageError(
            f"--for geodeep: it reads exactly three bands, this network has {len(task.bands)} "
            f"({', '.join(task.bands)}). Give --for deepness or --for onnx."
        )
    if geometry.resolution_cm is None:
        raise UsageError(
            f"--for {target}: it resamples images to the ground resolution of the network, which this model does not "
            "know. Give --resolution, in centimetres per pixel."
        )


def metadata_of(header: ModelHeader, geometry: Geometry, calibration: Calibration | None) -> dict[str, str]:
    """Metadata of an ONNX file for QGIS Deepness, geodeep and rsseg; every value is JSON."""
    task = header.task
    # Both spellings of the tile's side: Deepness reads one and documents the other. No standardization_*: the graph
    # normalizes.
    values: dict[str, Any] = {
        "model_type": "Segmentor",
        "class_names": {str(index): name for index, name in enumerate(task.class_names)},
        "tile_size": geometry.tile,
        "tiles_size": geometry.tile,
        "tiles_overlap": round(100 * geometry.overlap / geometry.tile),
        "seg_thresh": 0,
        "seg_small_segment": 0,
        "rsseg_version": rsseg.__version__,
        "rsseg_recipe": recipe_hash(header),
        "rsseg_license": licenses(header),
        "rsseg_bands": list(task.bands),
        "rsseg_class_values": [c.value for c in task.classes],
        "rsseg_input": f"pixels of type {task.dtype} divided by {divisor(task):g}",
        "rsseg_temperatures": None if calibration is None else calibration.temperatures,
        "rsseg_calibrated_on": None if calibration is None else calibration.fitted_on,
    }
    if geometry.resolution_cm is not None:
        values["resolution"] = geometry.resolution_cm
    return {name: json.dumps(value) for name, value in values.items()}


def recipe_hash(header: ModelHeader) -> str:
    """Hash of the recipe that a model was trained with."""
    text = json.dumps(header.recipe, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def licenses(header: ModelHeader) -> dict[str, str]:
    """Licence of the pretrained weights of each backbone, by its name."""
    return {str(info.get("name")): str(info.get("license")) for info in header.backbones.values()}


def write_item(model: Path, header: ModelHeader, segmenter: Segmenter, output: Path) -> None:
    """Write the item; files beside the model with its name, such as an ONNX export, become assets too."""
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, item_of(model, header, segmenter, output.parent))


def item_of(model: Path, header: ModelHeader, segmenter: Segmenter, folder: Path) -> dict[str, Any]:
    """A STAC item, as JSON values; `folder` is where it will lie."""
    task = header.task
    name = str(header.recipe.get("name", model.stem))
    made = datetime.fromtimestamp(model.stat().st_mtime, UTC)
    properties: dict[str, Any] = {
        "datetime": made.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "mlm:name": name,
        "mlm:architecture": architecture(header),
        "mlm:tasks": ["semantic-segmentation"],
        "mlm:framework": "PyTorch",
        "mlm:framework_version": header.made_with.get("torch", ""),
        "mlm:total_parameters": sum(p.numel() for p in segmenter.parameters()),
        "mlm:memory_size": sum(p.numel() * p.element_size() for p in segmenter.parameters()),
        "mlm:pretrained": True,
        "mlm:hyperparameters": {"recipe": recipe_hash(header), "seed": header.recipe.get("seed")},
        "mlm:input": [_input(header, segmenter)],
        "mlm:output": [_output(header)],
        "bands": [{"name": band} for band in task.bands],
        "rsseg:version": header.made_with.get("rsseg", rsseg.__version__),
        "rsseg:weights_licenses": licenses(header),
    }
    if (calibration := calibration_of(header, model)) is not None:
        # The output of the weights are logits: whoever wants probabilities divides by these first.
        properties |= {"rsseg:temperatures": calibration.temperatures, "rsseg:calibrated_on": calibration.fitted_on}
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": [MLM_SCHEMA, _FILE_SCHEMA, _CLASSES_SCHEMA],
        "id": f"{name}-{recipe_hash(header)[:12]}",
        # A model file does not know where its training images lie.
        "geometry": None,
        "properties": properties,
        "links": [],
        "assets": _assets(model, folder),
    }


def architecture(header: ModelHeader) -> str:
    """Such as "ktda: resnet18"."""
    backbones = ", ".join(str(info.get("timm_name")) for info in header.backbones.values())
    return f"{header.recipe.get('method')}: {backbones or 'unknown'}"


def _input(header: ModelHeader, segmenter: Segmenter) -> dict[str, Any]:
    task = header.task
    side = -1 if segmenter.tile.flexible else segmenter.tile.size
    scaling = [
        {"type": "processing", "format": "python", "expression": f"pixel * {scale!r} + {offset!r}"}
        for scale, offset in zip(task.scale, task.offset, strict=True)
    ]
    return {
        "name": "image",
        "bands": list(task.bands),
        "input": {
            "shape": [-1, len(task.bands), side, side],
            "dim_order": ["batch", "bands", "height", "width"],
            "data_type": "float32",
        },
        "value_scaling": scaling,
        "description": (
            f"Pixels of type {task.dtype}, per band times {list(task.scale)} plus {list(task.offset)}; the network "
            f"normalizes by itself. Height and width are multiples of {segmenter.input_multiple}."
        ),
    }


def _output(header: ModelHeader) -> dict[str, Any]:
    task = header.task
    return {
        "name": "logits",
        "tasks": ["semantic-segmentation"],
        "result": {
            "shape": [-1, task.num_classes, -1, -1],
            "dim_order": ["batch", "class", "height", "width"],
            "data_type": "float32",
        },
        "classification:classes": [
            {
                "value": c.value,
                "name": _identifier(c.name),
                "description": c.name,
                "color_hint": "".join(f"{v:02X}" for v in c.color),
            }
            for c in task.classes
        ],
    }


def _identifier(name: str) -> str:
    """The classification extension allows letters, digits, - and _ in names."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in name)


def _assets(model: Path, folder: Path) -> dict[str, Any]:
    kinds = (
        ("weights", model, "application/octet-stream; application=safetensors", "safetensors.torch.save_file"),
        ("onnx", model.with_suffix(".onnx"), "application/octet-stream; framework=onnx", "onnx"),
        ("program", model.with_suffix(".pt2"), "application/zip; application=pytorch", "torch.export.save"),
    )
    return {
        key: {
            "href": _relative(file, folder),
            "type": media,
            "title": file.name,
            "roles": ["mlm:model", "mlm:weights"] if key == "weights" else ["mlm:model"],
            "mlm:artifact_type": artifact,
            "file:size": file.stat().st_size,
            "file:checksum": "1220" + hashlib.sha256(file.read_bytes()).hexdigest(),  # multihash: SHA-256, 32 bytes
        }
        for key, file, media, artifact in kinds
        if file.is_file()
    }


def _relative(file: Path, folder: Path) -> str:
    try:
        return f"./{file.absolute().relative_to(folder.absolute())}"
    except ValueError:
        return str(file.absolute())
