"""The device of a run: choice, batches copied ahead, float32 arithmetic."""

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rsseg.config import TrainerConfig
from rsseg.data.streams import Batch, Samples
from rsseg.distributed import Ranks
from rsseg.errors import RecipeError
from rsseg.inference.device import own_device, resolve_precision


@dataclass(frozen=True)
class Hardware:
    """Device of the tensors and autocast type; None computes in float32."""

    device: torch.device
    amp_dtype: torch.dtype | None = None


def choose_hardware(config: TrainerConfig, ranks: Ranks) -> Hardware:
    """Resolve `auto` for device and autocast type; each process gets its own GPU.

    Raises:
        MachineError: the device does not exist here.
        UsageError: several processes would share a device.
    """
    device = own_device(config.device, ranks.local if ranks.world_size > 1 else None)
    match config.amp_dtype:
        case "none":
            return Hardware(device)
        case "fp16":
            return Hardware(device, torch.float16)
        case "bf16":
            return Hardware(device, torch.bfloat16)
        case "auto":
            native = resolve_precision("auto", device) == torch.bfloat16
            return Hardware(device, torch.bfloat16 if native else None)


def check_gpu(hardware: Hardware, key: str, remedy: str) -> None:
    """Raise `RecipeError` for a recipe's key that needs a GPU, if there is none."""
    if hardware.device.type != "cuda":
        raise RecipeError(f"{key}: needs a GPU, but this run uses the {hardware.device}. {remedy}.")


def prefetched(batches: Generator[Batch], device: torch.device) -> Generator[Batch]:
    """The batches; those for a GPU are copied and scaled one step ahead, on a stream of their own."""
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def load() -> tuple[Batch, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            return next(batches), stream.record_event()

    try:
        ahead = load()
        while True:
            batch, ready = ahead
            current = torch.cuda.current_stream(device)
            current.wait_event(ready)
            for tensor in tensors_of(batch):
                tensor.record_stream(current)
            ahead = load()
            yield batch
    finally:
        batches.close()


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Let a GPU compute float32 matrix products and convolutions in TF32, or not."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = tf32
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def tensors_of(batch: Batch) -> Iterator[Tensor]:
    """All tensors of a batch."""
    for samples in batch.values():
        yield from tensors_by_name(samples).values()


def tensors_by_name(samples: Samples) -> Mapping[str, Tensor]:
    """The tensors that a stream has."""
    values = {field.name: getattr(samples, field.name) for field in fields(samples)}
    return {name: value for name, value in values.items() if value is not None}
