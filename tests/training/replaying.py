"""A recorder that does on the CPU what CUDA graphs do: a replay repeats the recorded kernels on the recorded tensors.

Numbers, shapes and branches of Python stay those of the recording, and operations that would make the host wait for a
GPU are refused, so that a step that passes here differs from one on a GPU by its kernels only.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

Result = TypeVar("Result")


class NoSynchronization(TorchDispatchMode):
    """Refuses operations that make the host wait for a GPU: reading values, shapes that depend on values, constants."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "lift_fresh")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.WAITING or masks:
            raise RuntimeError(f"{func} waits for the device")
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


class _Recording(NoSynchronization):
    """Runs operations once, keeps them, and undoes what they did to tensors from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Any], list[bool]]] = []
        self._changed: dict[int, tuple[Tensor, Tensor]] = {}

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        arguments = func._schema.arguments
        given = {a.name: value for a, value in zip(arguments, args, strict=False)} | dict(kwargs)
        written = [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        if "batch_norm" in func.overloadpacket.__name__:  # its schema does not say so
            written += [given.get("running_mean"), given.get("running_var")]
        for tensor in tree_leaves(written):
            if isinstance(tensor, Tensor) and id(tensor) not in self._changed:
                self._changed[id(tensor)] = (tensor, tensor.detach().clone())
        result = func(*args, **kwargs)
        fresh = [returned.alias_info is None for returned in func._schema.returns]
        returned = _listed(result, len(fresh))
        # Detached: a replay writes below autograd.
        detached = tree_map(_detached, (args, kwargs))
        self.calls.append((func, *detached, [tree_map(_detached, value) for value in returned], fresh))
        return result

    def undo(self) -> None:
        for tensor, before in self._changed.values():
            tensor.data.copy_(before)  # unlike detach(), without a new version, which autograd would refuse


def _listed(result: Any, count: int) -> list[Any]:
    """The returned values of an operation with this many."""
    return list(result) if count > 1 else [result][:count]


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


class CpuRecorder:
    """See the module."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replays = 0

    def warm_up(self) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, work: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        recording, state = _Recording(), torch.get_rng_state()
        with recording:
            result = work()
        recording.undo()
        torch.set_rng_state(state)
        self.recorded += 1

        def replay() -> None:
            self.replays += 1
            with torch.no_grad():
                for func, args, kwargs, outputs, fresh in recording.calls:
                    again = func(*args, **kwargs)
                    for old, new, is_fresh in zip(outputs, _listed(again, len(fresh)), fresh, strict=True):
                        for target, value in zip(tree_leaves(old), tree_leaves(new), strict=True):
                            if is_fresh and isinstance(target, Tensor):
                                target.copy_(value)

        return result, replay
