"""The network run by torch, on a CPU or a GPU; logits stay on the device until classes are decided."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsseg.inference.blend import FULL, ArrayLogits, Decision, PixelOutputs, StoredPixels, Tile
from rsseg.inference.predict import Compute, NetworkFacts, extended
from rsseg.inference.tiling import Span, resized_rows, row_parts
from rsseg.layers.blocks import resize_logits
from rsseg.methods.base import Segmenter
from rsseg.task import Task, TileHint

_CACHED_VALUES = 1 << 20
"""Logits that a CPU resizes at a time: they stay in its cache, and memory does not grow with the classes."""
_FEW_CLASSES = 32
"""Up to so many, OpenCV and NumPy compute probabilities on a CPU faster than torch; classes alone they always do."""


@dataclass(frozen=True, eq=False)
class TensorLogits:
    """Logits of a tile on the device of its network.

    low: float (1, K, h, w) of low resolution, resized bilinearly to (1, K, H, W); torch recognizes the faster
    channels_last layout only with the first axis
    full: (H, W)
    size: rows and columns of it that belong to the tile, from the upper left; the rest is padding
    features: float32 (C, h, w), last map of the backbone, if the network has a tap; covers the full size
    applicability: float32 (1, 1, h, w) in 0..1 on the grid of the features, if the network judges them
    """

    low: Tensor
    full: tuple[int, int]
    size: tuple[int, int]
    features: Tensor | None = None
    applicability: Tensor | None = None

    @classmethod
    def of(cls, logits: Tensor) -> "TensorLogits":
        """Logits (K, H, W) of full size."""
        size = (logits.shape[1], logits.shape[2])
        return cls(logits[None], size, size)

    @property
    def num_classes(self) -> int:
        """K."""
        return self.low.shape[1]

    def tensor(self) -> Tensor:
        """Float32 (K, height, width) on the device."""
        return self._rows(Span(0, self.size[0]))

    def whole(self) -> NDArray[np.float32]:
        """See `rsseg.inference.blend.TileLogits`."""
        return self.tensor().cpu().numpy()

    def decide(self, rows: Span, cols: Span, outputs: PixelOutputs) -> Decision:
        """See `rsseg.inference.blend.TileLogits`."""
        if self.low.device.type == "cpu" and (not outputs.need_probabilities or self.num_classes <= _FEW_CLASSES):
            planes = self.low[0].float().contiguous().numpy()
            kept = ArrayLogits(planes, self.full, self.size).decide(rows, cols, outputs)
        else:
            kept = Decision.empty(rows.length, cols.length, self.num_classes, outputs)
            for part, values in self.bands(rows):
                place = part.within(rows.start), slice(None)
                kept.put(place, decide(values[..., cols.area].permute(1, 2, 0), outputs))
        if self.applicability is not None and kept.applicability is not None:
            full = resize_logits(self.applicability, self.full)[0, 0]
            kept.applicability[:] = _as_bytes(full[rows.area, cols.area].clone())
        return kept

    def bands(self, rows: Span) -> Iterator[tuple[Span, Tensor]]:
        """A range of rows in parts: the rows of each, and their logits, float32 (K, n, width).

        On a GPU there is one part, because each part costs kernel launches.
        """
        on_cpu = self.low.device.type == "cpu"
        most = _CACHED_VALUES // (self.num_classes * self.full[1]) if on_cpu else rows.length
        for part in row_parts(rows, self.low.shape[2], self.full[0], most=most):
            yield part, self._rows(part)

    def _rows(self, rows: Span) -> Tensor:
        source, resized = resized_rows(rows, self.low.shape[2], self.full[0])
        logits = resize_logits(self.low[:, :, source.area], (resized.length, self.full[1]))[0]
        return logits[:, rows.within(resized.start), : self.size[1]]


def argmax_classes(logits: Tensor) -> NDArray[np.uint8]:
    """Classes of logits (h, w, K) as uint8 (h, w) in the host's memory.

    The class axis comes last, where it is contiguous for a channels_last network: argmax over a leading axis is several
    times slower.
    """
    # Faster than argmax; both return the first of equal maxima.
    return logits.max(-1).indices.to(torch.uint8).cpu().numpy()


def decide(logits: Tensor, outputs: PixelOutputs) -> Decision:
    """Compute the outputs from logits (h, w, K)."""
    if not outputs.need_probabilities:
        return Decision(argmax_classes(logits))
    classes, shares = argmax_classes(logits), probabilities_of(logits, outputs.temperatures)
    highest = shares.amax(-1) if outputs.confidence or outputs.min_confidence else None
    if highest is not None and outputs.min_confidence:
        classes[(highest < outputs.min_confidence).cpu().numpy()] = outputs.unsure
    confidence = _as_bytes(highest) if highest is not None and outputs.confidence else None
    match outputs.probabilities:
        case "none":
            return Decision(classes, confidence)
        case "float16":
            return Decision(classes, confidence, shares.half().cpu().numpy())
        case "float32":
            return Decision(classes, confidence, shares.cpu().numpy())
        case "uint8":
            return Decision(classes, confidence, _as_bytes(shares))


def probabilities_of(logits: Tensor, temperatures: Sequence[float] | None) -> Tensor:
    """float32 (..., K) of logits (..., K), each divided by the temperature of its highest class; None: by 1."""
    scaled = logits.float()
    if temperatures is not None:
        factors = torch.tensor([1 / t for t in temperatures], device=scaled.device)
        scaled = scaled * factors[scaled.max(-1, keepdim=True).indices]
    return scaled.softmax(-1)


def _as_bytes(shares: Tensor) -> NDArray[np.uint8]:
    return shares.mul_(FULL).round_().to(torch.uint8).cpu().numpy()


class Copies(Protocol):
    """Copies arrays from the host's memory to a device."""

    def send(self, arrays: Sequence[NDArray[Any]]) -> Tensor:
        """Arrays of one shape and type, stacked on the device; they may be changed afterwards."""


class PinnedCopies:
    """Copies to a GPU through two reused pinned buffers, on a stream of its own.

    The GPU's current stream waits for a copy, the host only for a buffer that is still being read.
    """

    def __init__(self, device: torch.device) -> None:
        """Of one thread."""
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._free: deque[tuple[Tensor, Any]] = deque()
        for _ in range(2):
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._free.append((torch.empty(0, dtype=torch.uint8), copied))

    def send(self, arrays: Sequence[NDArray[Any]]) -> Tensor:
        """See `Copies`."""
        size, shape = sum(array.nbytes for array in arrays), (len(arrays), *arrays[0].shape)
        buffer, copied = self._free.popleft()
        copied.synchronize()
        if buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        host = buffer[:size].view(torch.from_numpy(arrays[0]).dtype).view(shape)
        for place, array in zip(host, arrays, strict=True):
            place.copy_(torch.from_numpy(array))
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            sent = host.to(self._device, non_blocking=True)
            copied.record()
        current.wait_event(copied)
        sent.record_stream(current)
        self._free.append((buffer, copied))
        return sent


class Uploads:
    """Brings tiles to a device in the type of the file, and scales and fills them there, as `Task.scaled` does."""

    def __init__(self, network: NetworkFacts, copies: Copies) -> None:
        """For the scaling of a network."""
        self._copies = copies
        values = (network.task.scale, network.task.offset, network.fill)
        self._scale, self._offset, self._fill = copies.send([np.array(each, np.float32) for each in values])

    def images(self, tiles: Sequence[StoredPixels]) -> Tensor:
        """float32 (B, C, h, w) of tiles of one size and type, in scaled units, channels last."""
        images = self._copies.send([tile.pixels for tile in tiles])
        # Two roundings, as in NumPy: the same image, bit by bit.
        images = images.to(torch.float32) * self._scale + self._offset
        if not all(tile.good.all() for tile in tiles):
            good = self._copies.send([tile.good for tile in tiles])
            images = torch.where(good[..., None], images, self._fill)
        return images.permute(0, 3, 1, 2)


_CPU = torch.device("cpu")


@dataclass(frozen=True)
class TorchNetwork:
    """See `rsseg.inference.predict.Network`.

    segmenter: on the device, in eval mode
    precision: autocast type; float32: no autocast
    uploads: brings tiles to the device and scales them there; None: they are scaled in the host's memory
    tap: returns the last map of the backbone in the calling thread's last forward pass, see `FeatureTap`
    judge: features of a tile -> its applicability, see `TensorLogits`
    """

    segmenter: Segmenter
    place: torch.device = _CPU
    precision: torch.dtype = torch.float32
    uploads: "Uploads | None" = None
    tap: Callable[[], Tensor] | None = None
    judge: Callable[[Tensor], Tensor] | None = None

    @property
    def task(self) -> Task:
        """Of the segmenter."""
        return self.segmenter.task

    @property
    def fill(self) -> tuple[float, ...]:
        """Of the segmenter."""
        return self.segmenter.fill

    @property
    def tile(self) -> TileHint:
        """Of the segmenter."""
        return self.segmenter.tile

    @property
    def input_multiple(self) -> int:
        """Of the segmenter."""
        return self.segmenter.input_multiple

    @property
    def engine(self) -> str:
        """This program."""
        return "torch"

    @property
    def device(self) -> str:
        """Name of the device."""
        return str(self.place)

    @property
    def dtype(self) -> str:
        """Name of the type that it computes in."""
        return str(self.precision).removeprefix("torch.")

    @property
    def asynchronous(self) -> bool:
        """A GPU computes while Python continues."""
        return self.place.type == "cuda"

    def threads(self) -> int:
        """Of a CPU."""
        return torch.get_num_threads()

    def use_threads(self, count: int) -> None:
        """Set the threads of the batches that the calling thread runs."""
        torch.set_num_threads(count)

    def logits(self, images: Sequence[NDArray[np.float32]], compute: Compute) -> list[TensorLogits]:
        """See `Network.logits`."""
        tensors = [torch.from_numpy(image) for image in images]
        return self.of(tensors[0][None] if len(tensors) == 1 else torch.stack(tensors), compute)

    def tile_logits(self, tiles: Sequence[Tile], compute: Compute) -> list[TensorLogits]:
        """See `Network.tile_logits`."""
        stored = [tile.stored for tile in tiles if tile.stored is not None]
        if self.uploads is None or len(stored) < len(tiles):
            return self.logits([tile.load() for tile in tiles], compute)
        return self.of(self.uploads.images(stored), compute)

    def of(self, images: Tensor, compute: Compute) -> list[TensorLogits]:
        """The logits of each image of (B, C, h, w); a batch that does not fit into memory is halved."""
        try:
            return self._forward(images, compute)
        except torch.OutOfMemoryError:
            if len(images) == 1:
                raise
        # Outside the except clause: the exception would hold the tensors of the failed forward pass.
        return [logits for half in images.chunk(2) for logits in self.of(half, compute)]

    @torch.inference_mode()
    def _forward(self, images: Tensor, compute: Compute) -> list[TensorLogits]:
        if self.place.type == "cuda" and images.device.type == "cpu":
            # From pinned memory the copy overlaps with the last batch's forward pass.
            images = images.pin_memory().to(self.place, non_blocking=True)
        if len(compute.poses) == 1:
            return self._logits(images, compute)
        total: Any = sum(
            pose.undo(self._probabilities(pose.apply(images, torch), compute), torch) for pose in compute.poses
        )
        # Logarithms of probabilities serve as logits.
        logits: Tensor = (total / len(compute.poses)).clamp_min(1e-30).log()
        return [TensorLogits.of(values) for values in logits.contiguous(memory_format=torch.channels_last)]

    def _probabilities(self, images: Tensor, compute: Compute) -> Tensor:
        """(B, K, h, w)."""
        return torch.stack([logits.tensor().softmax(0) for logits in self._logits(images, compute)])

    def _logits(self, images: Tensor, compute: Compute) -> list[TensorLogits]:
        height, width = images.shape[-2:]
        least = compute.least
        images = extended(images, max(height, least), max(width, least))
        images = self.segmenter.padded(images.to(self.place).contiguous(memory_format=torch.channels_last))
        with torch.autocast(self.place.type, self.precision, enabled=self.precision != torch.float32):
            low = self.segmenter.low_resolution_logits(images)
        full = (images.shape[-2], images.shape[-1])
        maps = [None] * len(low) if self.tap is None else self.tap()
        return [
            TensorLogits(
                values,
                full,
                (height, width),
                features,
                None if self.judge is None or features is None else self.judge(features),
            )
            for values, features in zip(torch.split(low, 1), maps, strict=True)
        ]
