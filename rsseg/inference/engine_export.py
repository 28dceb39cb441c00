"""Export of a network for other engines, checked against torch."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rsseg.errors import MachineError, UsageError
from rsseg.inference.device import measure_tile
from rsseg.inference.graph import write_graph
from rsseg.inference.network import load_segmenter, ready_to_predict
from rsseg.methods.base import Segmenter

_PROBE = 512
_TOLERANCE = 1e-3
"""Largest difference to torch's logits, relative to the largest logit."""


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
        import openvino

        program = openvino.Core().compile_model(str(graph), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return np.array(program(images)[0])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # a graph that does not run is an error of ours
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"images": images})[0])
