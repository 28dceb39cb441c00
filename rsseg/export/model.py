"""Write a trained network for programs that cannot run rsseg, and compare it with rsseg's own classes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rsseg.checkpoint import calibration_of, find_model, read_header
from rsseg.errors import CheckFailed, MachineError, UsageError
from rsseg.export.targets import Geometry, TargetName, check_target, divisor, metadata_of, write_item
from rsseg.files import check_outputs, replaced
from rsseg.inference.graph import write_graph
from rsseg.inference.network import load_segmenter, ready_to_predict
from rsseg.inference.predict import Compute, extended
from rsseg.inference.tiling import Panel, Span, plan_tiles
from rsseg.inference.torch_network import TorchNetwork
from rsseg.layers.blocks import resize_logits
from rsseg.methods.base import Segmenter
from rsseg.raster import match_bands
from rsseg.scene.options import SceneOptions
from rsseg.scene.source import open_scene, read_tiles, source_files
from rsseg.task import Task

_LARGEST_TILE = 1024
LEAST_AGREEMENT = 0.999
"""Share of pixels that must have rsseg's own class."""
_CHECKED_TILES = 64
"""Tiles of a scene that are compared, evenly spread."""
Runner = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""float32 (1, C, S, S), as the exported network expects it -> probabilities (1, K, S, S)."""


@dataclass(frozen=True)
class Exported:
    """A written file.

    agreement: share of pixels with rsseg's own class, and their number; None if it was not checked
    """

    output: Path
    target: TargetName
    geometry: Geometry
    agreement: tuple[float, int] | None


class Deployed(nn.Module):
    """A network with its normalization, calibration and softmax, for square images of one size.

    `temperatures` are those of the classes, as in `rsseg.inference.blend.PixelOutputs`; None: 1.
    """

    def __init__(self, segmenter: Segmenter, temperatures: tuple[float, ...] | None = None) -> None:
        super().__init__()
        self.network = segmenter
        self.factor: Tensor
        self.offset: Tensor
        factor = torch.tensor(segmenter.task.scale) * divisor(segmenter.task)
        self.register_buffer("factor", factor.reshape(-1, 1, 1))
        self.register_buffer("offset", torch.tensor(segmenter.task.offset).reshape(-1, 1, 1))
        self.inverse: Tensor | None
        # A single temperature needs no look-up of the class of each pixel.
        known = temperatures if temperatures is None or len(set(temperatures)) > 1 else temperatures[:1]
        self.register_buffer("inverse", None if known is None else torch.tensor([1 / t for t in known]))

    def forward(self, pixels: Tensor) -> Tensor:
        """float32 (1, C, S, S), pixels over `divisor` -> probabilities (1, K, S, S)."""
        size = pixels.shape[-2:]
        logits = resize_logits(self.network.low_resolution_logits(pixels * self.factor + self.offset), size)
        if self.inverse is not None:
            each = self.inverse if len(self.inverse) == 1 else self.inverse[logits.argmax(1, keepdim=True)]
            logits = logits * each
        return logits.softmax(1)


def export_model(
    model: Path,
    target: TargetName,
    output: Path,
    *,
    tile: int | None = None,
    resolution_cm: float | None = None,
    check: Path | str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a model for another program.

    Args:
        model: model file or run folder.
        target: the program.
        output: file to write.
        tile: side of the images that the network will get, a multiple of its stride; None: 1024, or the training size
            of a network that is bound to it.
        resolution_cm: centimetres per pixel; None takes that of the training data.
        check: scene on which classes are compared with rsseg's own.
        overwrite: replace an existing file.

    Raises:
        UsageError: the target cannot run this network, the tile does not fit it, or the output exists or is an input.
        DataError: the scene cannot be read or lacks bands.
        CheckFailed: fewer than 99.9 % of the pixels have rsseg's own class.
        MachineError: a package is missing.
        WeightsError: the model file is damaged.
    """
    file = find_model(model)
    header = read_header(file)
    calibration = calibration_of(header, file)
    check_outputs([("--output", output)], [file, *source_files([str(check)] if check else ())], overwrite=overwrite)
    if check is not None:
        _bands_of(check, header.task)  # a scene that cannot be compared is known before anything is written
    known = None if header.task.gsd_m is None else 100 * header.task.gsd_m
    resolution = resolution_cm or known
    check_target(target, header.task, Geometry(1, 0, resolution))
    if target == "stac-mlm":
        write_item(file, header, load_segmenter(file), output)
        return Exported(output, target, Geometry(0, 0, resolution), None)
    network, _ = ready_to_predict(load_segmenter(file), torch.device("cpu"), torch.float32)
    side = _side(network, tile)
    geometry = Geometry(side, min(network.tile.overlap, side // 4), resolution)
    deployed = Deployed(network, None if calibration is None else calibration.temperatures).eval()
    metadata = metadata_of(header, geometry, calibration)
    image = torch.full((1, len(header.task.bands), side, side), 0.5) * 255 / divisor(header.task)
    agreement = program = None
    output.parent.mkdir(parents=True, exist_ok=True)
    with replaced(output, ending=output.suffix) as temporary:
        if target == "torch-export":
            program = _write_program(deployed, image, temporary, metadata)
        else:
            write_graph(deployed, image, temporary, metadata=metadata)
        if check is not None:
            agreement = compare(network, program or onnx_runner(temporary), check, geometry)
            if agreement[0] < LEAST_AGREEMENT:
                raise CheckFailed(
                    f"{output}: {agreement[0]:.3%} of {agreement[1]} pixels of {check} have rsseg's own class, below "
                    f"{LEAST_AGREEMENT:.1%}. It was not written."
                )
    return Exported(output, target, geometry, agreement)


def _side(network: Segmenter, tile: int | None) -> int:
    multiple = network.input_multiple
    side = tile or (_LARGEST_TILE // multiple * multiple if network.tile.flexible else network.tile.size)
    if side % multiple or side < multiple:
        lower = max(side // multiple, 1) * multiple
        raise UsageError(f"--tile {side}: the network needs a multiple of {multiple}, such as {lower}.")
    return side


def _write_program(deployed: Deployed, image: Tensor, file: Path, metadata: dict[str, str]) -> Runner:
    try:
        with torch.no_grad():
            program = torch.export.export(deployed, (image,))
            torch.export.save(program, file, extra_files=metadata)
    except RuntimeError as error:
        message = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(f"torch.export cannot write this network: {message}") from None
    module: Any = program.module()

    def run(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            return module(torch.from_numpy(pixels)).numpy()  # type: ignore[no-any-return]

    return run


def onnx_runner(path: Path) -> Runner:
    """Run an exported ONNX file with onnxruntime.

    Raises:
        MachineError: onnxruntime is missing.
    """

    try:
        import onnxruntime
    except ImportError:
        raise MachineError("--check needs the package onnxruntime: pip install 'rsseg[onnx]'.") from None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"images": pixels})[0]


def compare(network: Segmenter, run: Runner, scene: Path | str, geometry: Geometry) -> tuple[float, int]:
    """Share of a scene's pixels to which an exported network gives rsseg's own class, and number of pixels compared.

    Raises:
        DataError: the scene cannot be read or lacks bands.
        UsageError: it has no pixel with data.
    """
    own_network = TorchNetwork(network)
    task, side = network.task, geometry.tile
    scale, offset = (np.array(values, np.float32)[:, None, None] for values in (task.scale, task.offset))
    same = total = 0
    for image, valid in _tiles(network, scene, side):
        own = own_network.of(image[None], Compute())[0].tensor().argmax(0).numpy()
        pixels = np.ascontiguousarray((image.numpy() - offset) / scale / divisor(task), np.float32)
        theirs = run(pixels[None])[0].argmax(0)
        same += int((own == theirs)[valid].sum())
        total += int(valid.sum())
    if not total:
        raise UsageError(f"--check {scene}: no pixel with data. Give another scene.")
    return same / total, total


def _bands_of(scene: Path | str, task: Task) -> tuple[int, ...]:
    with open_scene(scene, SceneOptions(), None) as raster:
        return match_bands(raster.info, task.bands, None)


def _tiles(network: Segmenter, scene: Path | str, side: int) -> Iterator[tuple[Tensor, NDArray[np.bool_]]]:
    """Square tiles, extended by reflection where the scene is smaller, and where they have data."""
    with open_scene(scene, SceneOptions(), _bands_of(scene, network.task)) as raster:
        plan = plan_tiles(raster.info.height, raster.info.width, tile=side, overlap=0)
        panel = Panel(plan, 0, Span(0, raster.info.width))
        step = max(plan.count // _CHECKED_TILES, 1)
        for number, tile in enumerate(read_tiles([raster], [panel], network)):
            if number % step or tile.is_empty or tile.valid is None:
                continue
            image = torch.from_numpy(tile.load())
            valid = np.zeros((side, side), np.bool_)
            valid[: image.shape[1], : image.shape[2]] = tile.valid
            yield extended(image, side, side), valid
