"""Programs that run an exported network: what they can do, and the metadata that they read."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

import rsseg
from rsseg.checkpoint import ModelHeader
from rsseg.errors import UsageError
from rsseg.task import Task

TargetName = Literal["onnx", "deepness", "geodeep", "torch-export", "stac-mlm"]
TARGETS: tuple[TargetName, ...] = ("onnx", "deepness", "geodeep", "torch-export", "stac-mlm")
ENDINGS = {"torch-export": ".pt2", "stac-mlm": ".stac.json"}
"""Others are `.onnx`."""
_GEODEEP_BANDS = 3


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


def metadata_of(header: ModelHeader, geometry: Geometry) -> dict[str, str]:
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
