"""The network run by onnxruntime or OpenVINO on a CPU. Free of torch once the network has been exported.

A network is exported once, beside its model file: the graph, and a JSON file with what tiles depend on. Both names
contain the hash of the model file.
"""

import importlib.util
import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

import rsseg
from rsseg.checkpoint import Calibration, calibration_of, find_model, read_header
from rsseg.errors import MachineError, RssegError, UsageError, WeightsError
from rsseg.fields import Result
from rsseg.files import content_hash, hidden_path, write_json
from rsseg.inference.blend import ArrayLogits, Tile
from rsseg.inference.machine import Cost, has_native_bfloat16, openvino_core, thread_count
from rsseg.inference.predict import Compute, extended
from rsseg.task import Task, TileHint

Program = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""float32 (1, C, H, W) -> (1, K, h, w)."""
EngineName = Literal["torch", "onnx", "openvino", "auto"]
_PACKAGES: dict[Literal["openvino", "onnx"], str] = {"openvino": "openvino", "onnx": "onnxruntime"}
"""In the order of preference of `auto`."""


class ExportedFacts(BaseModel):
    """JSON file beside an exported graph."""

    model_config = ConfigDict(frozen=True)

    model: str
    """Hash of the model file."""
    rsseg: str
    task: Task
    fill: tuple[float, ...]
    tile: TileHint
    input_multiple: int
    side: int | None
    """Of the square images that the graph computes; None: any multiple of `input_multiple`."""
    cost_side: int
    """Side of the tile that was measured."""
    cost: Cost
    """Of that tile, by torch in float32."""


class Quantization(Result):
    """How a network was quantized to int8, and what that costs."""

    calibrated_on: str
    """Dataset."""
    images: int
    """Of the calibration."""
    split: str | None = None
    """Labeled images on which both networks were scored; None: not measured."""
    scored: int = 0
    """Number of these images."""
    miou_float32: float | None = None
    miou_int8: float | None = None
    miou_loss: float | None = None
    """The first minus the second."""
    reason: str = ""
    """Why nothing was measured."""

    def text(self) -> str:
        """One sentence."""
        made = f"int8, calibrated on {self.images} images of {self.calibrated_on}"
        if self.miou_loss is None:
            return f"{made}; loss of mIoU not measured: {self.reason}"
        return (
            f"{made}; loss of mIoU {self.miou_loss:.4f}: {self.miou_int8:.4f} instead of "
            f"{self.miou_float32:.4f} on {self.scored} images of the split {self.split}"
        )


@dataclass(eq=False)
class EngineNetwork:
    """See `rsseg.inference.predict.Network`: an exported graph.

    start: threads of a batch and number of parallel batches -> a program, which may be called by several threads
    calibration: of the model's probabilities
    """

    facts: ExportedFacts
    engine: str
    dtype: str
    start: Callable[[int, int], Program]
    calibration: Calibration | None = None
    device: str = "cpu"
    asynchronous: bool = False
    _local: threading.local = field(default_factory=threading.local)
    _program: Program | None = None
    _lock: Any = field(default_factory=threading.Lock)

    @property
    def task(self) -> Task:
        """Of the model."""
        return self.facts.task

    @property
    def fill(self) -> tuple[float, ...]:
        """Of the model."""
        return self.facts.fill

    @property
    def tile(self) -> TileHint:
        """Of the model."""
        return self.facts.tile

    @property
    def input_multiple(self) -> int:
        """Of the model."""
        return self.facts.input_multiple

    def threads(self) -> int:
        """See `thread_count`."""
        return thread_count()

    def use_threads(self, count: int) -> None:
        """See `Network`."""
        self._local.threads = count

    def logits(self, images: Sequence[NDArray[np.float32]], compute: Compute) -> list[ArrayLogits]:
        """See `Network.logits`; one image at a time, as batches are no faster on a CPU."""
        return [self._averaged(image, compute) for image in images]

    def tile_logits(self, tiles: Sequence[Tile], compute: Compute) -> list[ArrayLogits]:
        """See `Network.tile_logits`."""
        return self.logits([tile.load() for tile in tiles], compute)

    def _averaged(self, image: NDArray[np.float32], compute: Compute) -> ArrayLogits:
        if len(compute.poses) == 1:
            return self._logits(image, compute)
        total: Any = sum(pose.undo(self._shares(pose.apply(image, np), compute), np) for pose in compute.poses)
        # Logarithms of probabilities serve as logits.
        mean = np.log(np.maximum(total / np.float32(len(compute.poses)), np.float32(1e-30)))
        return ArrayLogits(mean, image.shape[1:], image.shape[1:])

    def _shares(self, image: NDArray[np.float32], compute: Compute) -> NDArray[np.float32]:
        logits = self._logits(image, compute).whole()
        shares = np.exp(logits - logits.max(0))
        return shares / shares.sum(0)  # type: ignore[no-any-return]

    def _logits(self, image: NDArray[np.float32], compute: Compute) -> ArrayLogits:
        size = (image.shape[1], image.shape[2])
        least, multiple = compute.least, self.input_multiple
        image = extended(image, max(size[0], least), max(size[1], least))
        bottom, right = (-length % multiple for length in image.shape[1:])
        if bottom or right:
            mode: Any = "reflect" if bottom < image.shape[1] and right < image.shape[2] else "edge"
            image = np.pad(image, ((0, 0), (0, bottom), (0, right)), mode)
        full = (image.shape[1], image.shape[2])
        if self.facts.side not in (None, *full) or (self.facts.side and full[0] != full[1]):
            raise UsageError(
                f"--engine {self.engine} computes this network in tiles of {self.facts.side} pixels, not of "
                f"{full[0]} x {full[1]}. Leave out --tile, or give --engine torch."
            )
        low = self._started()(np.ascontiguousarray(image)[None])
        return ArrayLogits(np.asarray(low[0], np.float32), full, size)

    def _started(self) -> Program:
        """One program for all parallel batches, each with the number of threads of the first."""
        with self._lock:
            if self._program is None:
                count = getattr(self._local, "threads", self.threads())
                self._program = self.start(count, max(self.threads() // count, 1))
        return self._program


@dataclass(frozen=True)
class ReadyEngine:
    """An engine with its network; see `PreparedNetwork`."""

    network: EngineNetwork
    model: str
    weights_bytes: int
    quantization: Quantization | None = None

    def measure(self, side: int) -> Cost:
        """Cost of a square tile, from the one that was measured at the export."""
        facts = self.network.facts
        return facts.cost.scaled((side / facts.cost_side) ** 2)


def open_engine(model: Path, engine: EngineName, device: str, precision: str) -> ReadyEngine | None:
    """The engine of that name with the network of a model; None where torch is to run it.

    Raises:
        WeightsError: there is no model, or it is damaged.
        UsageError: the engine cannot run this network, or not on this device or in this precision.
        MachineError: it is not installed.
    """
    if engine == "torch" or (engine == "auto" and device.startswith("cuda")):
        return None
    if device.startswith("cuda"):
        raise UsageError(f"--engine {engine} runs on CPUs. Leave out --device {device}, or give --engine torch.")
    if engine == "onnx" and precision == "bfloat16":
        raise UsageError("--engine onnx computes in float32. Give --engine openvino or torch for bfloat16.")
    if engine == "auto":
        able = [name for name in _PACKAGES if name != "onnx" or precision != "bfloat16"]
        installed = next((name for name in able if importlib.util.find_spec(_PACKAGES[name])), None)
        # In automatic mode a GPU is better than any of these; torch has to be asked.
        if installed is None or (device == "auto" and Path("/dev/nvidiactl").exists()):
            return None
        try:
            return open_engine(model, installed, device, precision)
        except WeightsError:
            raise
        except RssegError:  # all engines read the same graph: what one cannot run, another cannot either
            return None
    if importlib.util.find_spec(_PACKAGES[engine]) is None:
        raise MachineError(f"--engine {engine} needs the package {_PACKAGES[engine]}: pip install 'rsseg[{engine}]'.")
    file = find_model(model)
    graph, facts = exported_graph(file)
    wide = precision == "bfloat16" or (precision == "auto" and has_native_bfloat16())
    dtype = "bfloat16" if engine == "openvino" and wide else "float32"
    calibration = calibration_of(read_header(file), file)
    network = EngineNetwork(facts, engine, dtype, partial(PROGRAMS[engine], graph, dtype), calibration)
    return ReadyEngine(network, facts.model, graph.stat().st_size)


def exported_graph(file: Path) -> tuple[Path, ExportedFacts]:
    """The exported graph of a model file and its facts; exported now if that has not happened yet.

    Raises:
        WeightsError: the model is damaged.
        UsageError: the network cannot be exported.
        MachineError: the package onnx is missing, or no folder can be written.
    """
    digest = content_hash(file).hex()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rsseg" / "engines"
    places = [hidden_path(file, f".{digest[:16]}.onnx"), cache / f"{digest}.onnx"]
    for graph in places:
        if (facts := _read_facts(graph, digest)) is not None:
            return graph, facts
    from rsseg.inference.graph import export_for_engines

    graph = places[0] if os.access(file.parent, os.W_OK) else places[1]
    found = {**export_for_engines(file, graph), "model": digest, "rsseg": rsseg.__version__}
    facts = ExportedFacts.model_validate(found)
    write_json(_facts_path(graph), facts.model_dump(mode="json"))
    return graph, facts


def _facts_path(graph: Path) -> Path:
    """The JSON file beside a graph, which is written last."""
    return graph.with_suffix(".json")


def _read_facts(graph: Path, digest: str) -> ExportedFacts | None:
    try:
        facts = ExportedFacts.model_validate(json.loads(_facts_path(graph).read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        return None
    return facts if graph.is_file() and (facts.model, facts.rsseg) == (digest, rsseg.__version__) else None


def _onnx_program(graph: Path, _dtype: str, threads: int, _parallel_batches: int) -> Program:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Spinning threads take the cores from the reader, the writer and other programs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def _openvino_program(graph: Path, dtype: str, threads: int, parallel_batches: int) -> Program:
    core, local, lock = openvino_core(), threading.local(), threading.Lock()
    compiled: dict[tuple[int, ...], Any] = {}
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == "bfloat16" else "f32",
        "INFERENCE_NUM_THREADS": threads * parallel_batches,
        "NUM_STREAMS": parallel_batches,
    }

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with lock:
            if images.shape not in compiled:
                compiled.clear()  # a scene has tiles of one size
                model = core.read_model(str(graph))
                model.reshape(list(images.shape))
                compiled[images.shape] = core.compile_model(model, "CPU", settings)
            program = compiled[images.shape]
        if getattr(local, "program", None) is not program:
            local.program, local.request = program, program.create_infer_request()
        result = local.request.infer([images], share_inputs=True)
        return np.array(result[0], np.float32)

    return run


PROGRAMS = {"onnx": _onnx_program, "openvino": _openvino_program}
