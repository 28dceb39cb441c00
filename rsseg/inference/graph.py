"""A network as an ONNX graph: written with no package but `onnx`, and for other engines checked against torch."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rsseg.errors import MachineError, RssegError, UsageError
from rsseg.files import temporary_path
from rsseg.inference.device import measure_tile
from rsseg.inference.machine import openvino_core
from rsseg.inference.network import load_segmenter, ready_to_predict
from rsseg.methods.base import Segmenter

OPSET = 17
"""Newest operator set that every target reads."""
MOST_IR = 9
"""Newest format that every target reads; older runtimes refuse 10."""
_PROBE = 512
_TOLERANCE = 1e-3
"""Largest difference to torch's logits, relative to the largest logit."""


def write_graph(
    network: nn.Module, image: Tensor, path: Path, *, any_size: bool = False, metadata: Mapping[str, str] | None = None
) -> None:
    """Trace a network and write it as ONNX.

    Args:
        network: in eval mode, (B, C, h, w) -> (B, K, h', w').
        image: float32 (B, C, H, W), to trace with.
        path: of the ONNX file; appears when it is complete.
        any_size: other batches, heights and widths may be given to the graph. What the network computes in Python from
            the size of its input is fixed nevertheless: compare the graph with the network at another size.
        metadata: key -> value.

    Raises:
        UsageError: an operation has no counterpart in ONNX.
        MachineError: the package is missing, or the file cannot be written.
    """
    onnx = _onnx()
    axes = {name: {0: "batch", 2: f"{name}_rows", 3: f"{name}_columns"} for name in ("images", "logits")}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path, ".onnx")
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter's own deprecation, and that Python values are constant
            torch.onnx.export(
                network,
                (image,),
                str(temporary),
                dynamo=False,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["logits"],
                dynamic_axes=axes if any_size else None,
            )
        model = onnx.load(str(temporary))
        model.ir_version = min(model.ir_version, MOST_IR)
        onnx.helper.set_model_props(model, dict(metadata or {}))
        onnx.checker.check_model(model)
        onnx.save(model, str(temporary))
        temporary.replace(path)
    except (OSError, RssegError):
        raise
    except Exception as error:  # the exporter raises many kinds
        message = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(f"this network cannot be written as ONNX (opset {OPSET}): {message}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _onnx() -> Any:
    try:
        import onnx
    except ImportError:
        raise MachineError("writing ONNX needs the package onnx: pip install 'rsseg[onnx]'.") from None
    return onnx


class _LowResolution(nn.Module):
    def __init__(self, network: Segmenter) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.low_resolution_logits(images).float()


def export_for_engines(file: Path, graph: Path) -> dict[str, Any]:
    """Export the network of a model file to `graph`, and return its facts once the graph has proved equal.

    Raises:
        UsageError: the network cannot be exported, or the graph computes other logits.
        MachineError: the package onnx is missing, or the folder cannot be written.
    """
    cpu = torch.device("cpu")
    network, _ = ready_to_predict(load_segmenter(file), cpu, torch.float32)
    hint, multiple = network.tile, network.input_multiple
    fixed = None if hint.flexible else -(-hint.size // multiple) * multiple
    side = fixed or max(_PROBE // 2 // multiple, 1) * multiple
    program = _LowResolution(network).eval()
    try:
        write_graph(program, _noise(network, side, side), graph, any_size=fixed is None)
        # Another size than the traced one, not square, shows what was taken for constant.
        sizes = [(side, side)] if fixed else [(side, side), (side + multiple, 2 * side - multiple)]
        for size in sizes:
            if problem := _difference(program, graph, _noise(network, *size)):
                graph.unlink()
                raise UsageError(f"{file}: exported for other engines, {problem} {size[0]} x {size[1]} pixels.")
    except UsageError as error:
        raise UsageError(f"{error} Give --engine torch.") from None
    except OSError as error:
        raise MachineError(
            f"{graph}: cannot be written: {error.strerror}. Make room, or give --engine torch."
        ) from None
    cost_side = fixed or _PROBE
    return {
        "task": network.task,
        "fill": network.fill,
        "tile": hint,
        "input_multiple": multiple,
        "side": fixed,
        "cost_side": cost_side,
        "cost": measure_tile(network, cost_side, cpu, torch.float32),
    }


def _noise(network: Segmenter, height: int, width: int) -> Tensor:
    mean = torch.tensor(network.fill)[:, None, None]
    noise = torch.rand(len(mean), height, width, generator=torch.Generator().manual_seed(0)) - 0.5
    return (mean + noise * mean.abs())[None]


def _difference(program: nn.Module, graph: Path, images: Tensor) -> str | None:
    """What is wrong with the logits of a graph, in words that the size of the images follows; None if nothing is."""
    with torch.inference_mode():
        expected = program(images).numpy()
    try:
        found = _run(graph, images.numpy())
    except Exception:  # each engine raises its own kinds, with long messages about the nodes of the graph
        return "the network does not run on images of"
    # Written so that NaN is a difference too.
    if found.shape == expected.shape and np.abs(found - expected).max() <= _TOLERANCE * np.abs(expected).max():
        return None
    return "the network computes other logits than rsseg's own for images of"


def _run(graph: Path, images: np.ndarray) -> np.ndarray:
    """By whichever engine is installed, in float32."""
    try:
        import onnxruntime
    except ImportError:
        program = openvino_core().compile_model(str(graph), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return np.array(program(images)[0])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # a graph that does not run is an error of ours
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"images": images})[0])
