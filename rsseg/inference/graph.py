"""A network as an ONNX graph, by the exporter that needs no package but `onnx`."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rsseg.errors import MachineError, RssegError, UsageError
from rsseg.files import temporary_path

OPSET = 17
"""Newest operator set that every target reads."""
MOST_IR = 9
"""Newest format that every target reads; older runtimes refuse 10."""


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
        raise UsageError(f"{path}: this network cannot be written as ONNX (opset {OPSET}): {message}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _onnx() -> Any:
    try:
        import onnx
    except ImportError:
        raise MachineError("writing ONNX needs the package onnx: pip install 'rsseg[onnx]'.") from None
    return onnx
