"""int8 arithmetic for exported networks: calibrated on images of a dataset, its loss of mIoU measured on labeled ones.

The quantized graph lies beside the exported one, and a JSON file with its loss for each engine. Both names contain the
hash of the model and of the calibration data. Free of torch once they are there.
"""

import hashlib
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

import rsseg
from rsseg.checkpoint import find_model, read_header
from rsseg.config import SelectConfig
from rsseg.data.dataset import SampleReader
from rsseg.data.index import IndexItem, SegmentationIndex
from rsseg.data.sources import Datasets
from rsseg.errors import DataError, MachineError, UsageError
from rsseg.files import content_hash, temporary_path, write_text
from rsseg.inference.engines import (
    PROGRAMS,
    EngineName,
    EngineNetwork,
    ExportedFacts,
    Quantization,
    ReadyEngine,
    exported_graph,
    open_engine,
)
from rsseg.inference.predict import extended
from rsseg.task import task_with_bands

Quantize = Literal["none", "int8"]
_CALIBRATION_IMAGES = 32
_SCORED_IMAGES = 100
_SIDE = 512
"""Largest side of a calibration image in pixels; of larger ones the middle is taken."""


def open_network(
    model: Path,
    engine: EngineName,
    device: str,
    precision: str,
    *,
    quantize: Quantize = "none",
    calibrate: Path | None = None,
) -> ReadyEngine | None:
    """`open_engine`, in int8 arithmetic if wanted.

    Args:
        model: model file or run folder.
        engine: see `open_engine`.
        device: see `open_engine`.
        precision: see `open_engine`; without effect on int8.
        quantize: `int8` computes convolutions and matrix products with 8-bit weights and activations.
        calibrate: prepared dataset whose images show the ranges of the activations; needs no labels.

    Raises:
        UsageError: options that do not fit together; an engine that cannot run this network.
        DataError: the dataset has no images, lacks bands, or cannot be read.
        WeightsError: there is no model, or it is damaged.
        MachineError: a package is missing, or no folder can be written.
    """
    if engine not in get_args(EngineName):
        raise UsageError(f"--engine {engine}: choose {', '.join(get_args(EngineName))}.")
    if quantize not in get_args(Quantize):
        raise UsageError(f"--quantize {quantize}: choose {' or '.join(get_args(Quantize))}.")
    if quantize == "none":
        if calibrate is not None:
            raise UsageError(f"--calibrate {calibrate}: has no effect without --quantize int8.")
        return open_engine(model, engine, device, precision)
    if calibrate is None:
        raise UsageError("--quantize int8 needs images to calibrate with: give --calibrate DATASET.")
    ready = open_engine(model, engine, device, "float32")
    if ready is None:
        raise UsageError("--quantize int8 is not computed by torch. Give --engine openvino or onnx.")
    return _quantized(find_model(model), ready, calibrate)


def _quantized(model: Path, ready: ReadyEngine, dataset: Path) -> ReadyEngine:
    network = ready.network
    images = _Images(dataset, network.facts)
    graph, _ = exported_graph(model)
    key = images.digest()
    stored = graph.with_name(f"{graph.stem}.int8-{key}.onnx")
    facts = stored.with_name(f"{stored.stem}.{network.engine}.json")
    start = partial(PROGRAMS[network.engine], stored, "float32")
    found = EngineNetwork(network.facts, network.engine, "int8", start, network.calibration)
    quantization = _read_facts(facts) if stored.is_file() else None
    if quantization is None:
        if not stored.is_file():
            _write_quantized(graph, stored, list(images.read()))
        quantization = _measure(model, network, found, dataset, len(images.items))
        write_text(facts, quantization.model_dump_json() + "\n")
    return ReadyEngine(found, f"{ready.model} int8 {key}", stored.stat().st_size, quantization)


def _read_facts(file: Path) -> Quantization | None:
    try:
        return Quantization.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


class _Images:
    """The images of a dataset that a network is calibrated with."""

    def __init__(self, dataset: Path, facts: ExportedFacts) -> None:
        """Choose images of the split `train`, or of all splits if it is empty, evenly distributed over their list."""
        self._index, self._facts = SegmentationIndex.load(dataset), facts
        pool = [item for item in self._index.items if item.split == "train"] or list(self._index.items)
        if not pool:
            raise DataError(f"--calibrate {dataset}: the dataset has no images.")
        self.items = _spread(pool, _CALIBRATION_IMAGES)
        self._dataset, bands = dataset, facts.task.bands
        if missing := [band for band in bands if band not in self._index.task.bands]:
            raise DataError(
                f"--calibrate {dataset}: the model needs the band {missing[0]!r}, the dataset has "
                f"{', '.join(self._index.task.bands)}. Give a dataset with the bands {', '.join(bands)}."
            )

    def digest(self) -> str:
        """Hash of the images, the index, which lists the labels that the loss is measured with, and this version."""
        digest = hashlib.blake2b(rsseg.__version__.encode(), digest_size=8)
        digest.update(self._index.model_dump_json().encode())
        try:
            for item in self.items:
                for file in self._index.image_files(item):
                    digest.update(content_hash(file))
        except OSError as error:
            raise DataError(f"--calibrate {self._dataset}: {error.filename}: {error.strerror}.") from None
        return digest.hexdigest()

    def read(self) -> Iterator[NDArray[np.float32]]:
        """(1, C, h, w) in scaled units, of sides that the graph computes."""
        task, facts = task_with_bands(self._index.task, self._facts.task.bands), self._facts
        reader, most = SampleReader(self._index, task.bands, cache=False), facts.side or _SIDE
        for item in self.items:
            middle = [slice(max((n - most) // 2, 0), max((n - most) // 2, 0) + most) for n in reader.size(item)]
            pixels, valid = (array[..., middle[0], middle[1]] for array in reader.image(item))
            image = task.scaled(pixels.transpose(1, 2, 0), valid, facts.fill).transpose(2, 0, 1)
            sides = [facts.side or -(-n // facts.input_multiple) * facts.input_multiple for n in image.shape[1:]]
            yield np.ascontiguousarray(extended(image, *sides))[None]


def _spread(items: Sequence[IndexItem], most: int) -> tuple[IndexItem, ...]:
    """At most so many items, evenly distributed."""
    count = min(len(items), most)
    return tuple(items[i * len(items) // count] for i in range(count))


def _write_quantized(graph: Path, target: Path, images: Sequence[NDArray[np.float32]]) -> None:
    """Insert the conversions to and from int8 (QDQ) that both engines read; the ranges are the extrema of the images.

    Raises:
        UsageError: the network cannot be quantized.
        MachineError: onnxruntime is missing, or the folder cannot be written.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise MachineError("--quantize int8 needs the package onnxruntime: pip install 'rsseg[onnx]'.")
    import onnxruntime
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(images)

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            image = next(self._left, None)
            return None if image is None else {"images": image}

    plain, quantized = (temporary_path(target, f"-{name}.onnx") for name in ("plain", "int8"))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Biases that share one constant would stay in float32, and onnxruntime then computes whole convolutions in it.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(plain)
    try:
        onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        with _quiet():
            quantize_static(
                str(plain),
                str(quantized),
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        logits = PROGRAMS["onnx"](quantized, "float32", 1, 1)(images[0])
        if not np.isfinite(logits).all():
            raise ValueError("its logits are not finite")
        quantized.replace(target)
    except OSError as error:
        raise MachineError(f"{target}: cannot be written: {error.strerror}. Make room.") from None
    except Exception as error:  # the quantizer raises many kinds
        message = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(f"--quantize int8: this network cannot be quantized: {message}") from None
    finally:
        plain.unlink(missing_ok=True)
        quantized.unlink(missing_ok=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantizer's warnings, which it sends to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _measure(model: Path, wide: EngineNetwork, narrow: EngineNetwork, dataset: Path, images: int) -> Quantization:
    """Score both networks on labeled images of the dataset: of `val`, else of `test`, else of another split."""
    from rsseg.evaluation.model import evaluate
    from rsseg.recipe import recipe_from_dict

    made = Quantization(calibrated_on=str(dataset), images=images)
    splits = {item.split for item in SegmentationIndex.load(dataset).items if item.mask is not None}
    if not splits:
        return made.model_copy(update={"reason": "the dataset has no labels"})
    split = min(splits, key=lambda name: ({"val": 0, "test": 1, "train": 3}.get(name, 2), name))
    try:
        recipe = recipe_from_dict(read_header(model).recipe, str(model))
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": dataset})})
        source = Datasets(recipe.data, recipe.seed).open(SelectConfig(split=split), split, wide.task, masks=True)
        source = source._replace(items=_spread(source.items, _SCORED_IMAGES))
        before, after = (evaluate(network, recipe, source, device="cpu").scores.miou for network in (wide, narrow))
    except (DataError, UsageError) as error:
        return made.model_copy(update={"reason": str(error)})
    if before is None or after is None:
        return made.model_copy(update={"reason": f"the labels of the split {split} are all ignored"})
    scored = {"split": split, "scored": len(source.items), "miou_float32": before, "miou_int8": after}
    scored["miou_loss"] = before - after
    return made.model_copy(update=scored)
