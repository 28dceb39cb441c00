"""Training streams: batches as a pure function of seed and step."""

import signal
import time
import traceback
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple, Self

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rsseg.config import BaseRecipe, SelectConfig
from rsseg.data.assembly import HostSamples, SampleKeys, StreamPlan, StreamReader
from rsseg.data.augmentation import ColorSpace
from rsseg.data.sources import Datasets, Source
from rsseg.errors import MachineError, RecipeError, RssegError
from rsseg.task import Task


@dataclass(frozen=True)
class Samples:
    """One stream's share of a batch, all on the training device.

    images  float32 (B, C, H, W), scaled by Task.scale/offset, NOT normalized: each backbone normalizes for itself
    masks   int64 (B, H, W), class index or IGNORE_INDEX; None for an unlabeled stream
    valid   bool (B, H, W), False where the crop was padded or the source has no data; images hold StreamSpec.fill there
    strong  float32 (B, V, C, H, W), V strong views of the same crops; None if the stream has none
    mix     bool (B, V, H, W), True where CutMix takes the pixel from the partner sample; None without strong views
    keys    None if an image of the batch does not repeat
    """

    images: Tensor
    valid: Tensor
    masks: Tensor | None = None
    strong: Tensor | None = None
    mix: Tensor | None = None
    keys: SampleKeys | None = None

    @property
    def labels(self) -> Tensor:
        """The masks of a labeled stream; raises `ValueError` for another."""
        if self.masks is None:
            raise ValueError("the stream came without masks; its StreamSpec must require them")
        return self.masks


Batch = Mapping[str, Samples]
"""Keyed by stream name."""


@dataclass(frozen=True)
class StreamSpec:
    """A stream that a method needs.

    name          "labeled", "unlabeled", "source", "target"
    split         default split of the index
    masks         True: a missing mask is an error; False: masks are never read
    fill          per band, scaled units: value of pixels without data
    strong_views  number of strong views
    """

    name: str
    split: str
    masks: bool
    fill: tuple[float, ...]
    strong_views: int = 0


class Scaling(NamedTuple):
    """Conversion of stored pixels to scaled units: `pixel * scale + offset`, and `fill` where there is no data.

    Each float32 (C, 1, 1), on the device of the pixels.
    """

    scale: Tensor
    offset: Tensor
    fill: Tensor

    @classmethod
    def of(cls, task: Task, fill: Sequence[float], device: torch.device) -> Self:
        """The scaling of a task."""
        values = torch.tensor([task.scale, task.offset, fill], dtype=torch.float32, device=device)
        return cls(*values[:, :, None, None])


def open_streams(recipe: BaseRecipe, specs: Sequence[StreamSpec], task: Task, datasets: Datasets) -> dict[str, Source]:
    """The images of every training stream; raises `DataError` for a stream without images."""
    selects = recipe.data.streams
    return {
        spec.name: datasets.open(selects.get(spec.name, SelectConfig()), spec.split, task, masks=spec.masks)
        for spec in specs
    }


def training_batches(
    recipe: BaseRecipe,
    specs: Sequence[StreamSpec],
    task: Task,
    *,
    device: torch.device | str,
    start_step: int,
    sources: Mapping[str, Source] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Generator[Batch]:
    """Endless batches, one per micro-step. Close the generator to end the loader processes.

    Sample k of a stream of n items is `permutation(seed, stream, k // n)[k % n]`, and its augmentation depends on
    (seed, stream, k) only: the number of loader processes has no effect, a run can start at any step, and the ranks
    split the positions of a global batch.

    Args:
        recipe: data, seed, batch sizes, accumulation and loader processes.
        specs: streams of the method.
        task: the model's task.
        device: device of the tensors.
        start_step: first optimizer step; the first batch is micro-step `start_step * grad_accum_steps`.
        sources: images of each stream; None opens those of the recipe.
        rank: this process.
        world_size: number of processes.

    Raises:
        DataError: missing or empty datasets, or other classes or bands; while iterating: unreadable files.
        RecipeError: the published distortion for images that are not 8-bit red, green, blue.
    """
    device = torch.device(device)
    if sources is None:
        sources = open_streams(recipe, specs, task, Datasets(recipe.data, recipe.seed))
    dataset = _MicroBatches([_stream_reader(recipe, spec, sources[spec.name]) for spec in specs], rank, world_size)
    scalings = {spec.name: Scaling.of(sources[spec.name].task, spec.fill, device) for spec in specs}
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=count(start_step * recipe.trainer.grad_accum_steps),
        num_workers=recipe.trainer.workers,
        collate_fn=_unchanged,
        worker_init_fn=_start_worker,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # Seeds the workers, so that the global generator does not advance.
    )
    return _on_device(loader, scalings)


def to_samples(host: HostSamples, scaling: Scaling) -> Samples:
    """Move to the device in the stored dtype, then scale and fill there."""
    device = scaling.scale.device

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    valid = moved(host.valid)
    return Samples(
        images=_scaled(moved(host.images), valid, scaling),
        valid=valid,
        masks=None if host.masks is None else moved(host.masks).long(),
        strong=None if host.strong is None else _scaled(moved(host.strong), valid[:, None], scaling),
        mix=None if host.mix is None else moved(host.mix),
        keys=host.keys,
    )


def _scaled(pixels: Tensor, valid: Tensor, scaling: Scaling) -> Tensor:
    """(..., H, W, C) of any type -> float32 (..., C, H, W)."""
    planes = pixels.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format)
    return torch.where(valid.unsqueeze(-3), torch.addcmul(scaling.offset, planes, scaling.scale), scaling.fill)


def _stream_reader(recipe: BaseRecipe, spec: StreamSpec, source: Source) -> StreamReader:
    own = source.task
    augment = recipe.data.augment_of(spec.name)
    if augment.photometric == "mmseg" and (own.dtype != "uint8" or len(own.bands) != 3):
        raise RecipeError(
            f"stream {spec.name!r}: photometric 'mmseg' needs 8-bit red, green, blue images; these have "
            f"{len(own.bands)} bands of {own.dtype}. Use photometric: fast."
        )
    plan = StreamPlan(
        name=spec.name,
        seed=recipe.seed,
        items=source.items,
        masks=spec.masks,
        strong_views=spec.strong_views,
        rare_classes=recipe.data.rare_class_sampling if spec.masks else None,
        batch_size=recipe.trainer.batch_of(spec.name),
        augment=augment,
        strong=recipe.data.strong,
        space=ColorSpace.of(own.bands, own.scale, own.offset),
        zoom=source.zoom,
    )
    return StreamReader(plan, source.reader)


_HostBatch = dict[str, HostSamples]


class _MicroBatches(Dataset[_HostBatch | Exception]):
    """Micro-step -> every stream's samples.

    Errors are returned, not raised: the loader would wrap them in a traceback.
    """

    def __init__(self, streams: Sequence[StreamReader], rank: int, world_size: int) -> None:
        self._streams, self._rank, self._world_size = streams, rank, world_size

    def __getitem__(self, micro_step: int) -> _HostBatch | Exception:
        try:
            return {
                stream.plan.name: stream.micro_batch(micro_step, rank=self._rank, world_size=self._world_size)
                for stream in self._streams
            }
        except RssegError as error:
            return error
        except Exception:  # A bug: its traceback would be lost on the way to the main process.
            return RuntimeError(traceback.format_exc())


def _unchanged(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    """One thread per worker; signals to the process group are handled by the training process alone."""
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _on_device(loader: DataLoader[_HostBatch | Exception], scalings: Mapping[str, Scaling]) -> Generator[Batch]:
    try:
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            yield {name: to_samples(host, scalings[name]) for name, host in batch.items()}
    except (ConnectionError, EOFError, FileNotFoundError) as error:  # it died while it sent a batch
        # torch's handler of the signal that follows raises wherever it finds the program: let that be here.
        with suppress(RuntimeError):
            time.sleep(1)
        raise MachineError(
            f"a loader process ended: {error!r}. The system may have stopped it; choose fewer loader workers."
        ) from None
