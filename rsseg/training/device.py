"""The device of a run: choice, batches copied ahead, float32 arithmetic, parameters shared among processes."""

import copy
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from rsseg.backbones.backbone import Backbone
from rsseg.config import TrainerConfig
from rsseg.data.streams import Batch, Samples
from rsseg.distributed import Ranks
from rsseg.errors import RecipeError
from rsseg.inference.device import own_device, resolve_precision
from rsseg.methods.base import Method, Segmenter

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

SMALLEST_SHARD = 1_000_000
"""Parameters of a backbone's block from which it is gathered on its own; smaller ones with the rest of the network."""


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
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def shard(method: Method, averages: Sequence[nn.Module], device: torch.device, processes: int) -> None:
    """Divide the parameters of a method and its teachers among all processes, which must all call it, by torch's FSDP2.

    The blocks of a backbone are gathered while they compute, one after the other; the rest of a teacher's backbone
    during its forward pass; all other parameters from the beginning of the method's forward pass to the end of its
    backward pass. `averages` are divided alike; they do not compute.
    """
    # Importing it takes half as long as importing torch.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes,))
    # Two teachers may read one backbone.
    taught = dict.fromkeys(body for teacher in method.frozen_teachers() for body in _bodies(teacher.module))
    for body in (*taught, *_bodies(method)):
        groups = [part for part in body.modules() if isinstance(part, nn.Sequential | nn.ModuleList)]
        for block in reversed([child for group in groups for child in group.children()]):
            if sum(parameter.numel() for parameter in block.parameters()) >= SMALLEST_SHARD:
                fully_shard(block, mesh=mesh)
    for module in taught:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for module in (*averages, method):
        fully_shard(module, mesh=mesh)


def _bodies(module: nn.Module) -> list[nn.Module]:
    return [part.body for part in module.modules() if isinstance(part, Backbone)]


def is_shared(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Whether a tensor is divided among the processes."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the shares of all processes, which must all call this in the same order."""
    return tensor.full_tensor() if is_shared(tensor) else tensor


def shared_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A complete tensor, divided among the processes as `like` if they have the same shape."""
    if not is_shared(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(like.device, like.dtype)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def without_weights(segmenter: Segmenter) -> Segmenter:
    """A copy whose parameters need no memory, see `with_weights`; buffers are copied."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in segmenter.parameters()}
    return copy.deepcopy(segmenter, empty)


def with_weights(template: Segmenter, sharded: Segmenter) -> Segmenter:
    """A complete copy of a network whose parameters are divided among the processes, which must all call this."""
    segmenter = copy.deepcopy(template)
    segmenter.load_state_dict({name: whole(tensor) for name, tensor in sharded.state_dict().items()}, assign=True)
    return segmenter.requires_grad_(False)
