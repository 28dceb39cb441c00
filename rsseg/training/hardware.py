"""Which device trains and in which number format."""

import sys
from dataclasses import dataclass

import torch

from rsseg.config import TrainerConfig
from rsseg.distributed import Ranks
from rsseg.inference.device import own_device, resolve_precision


@dataclass(frozen=True)
class Hardware:
    """Where tensors live, and the autocast type (None computes in float32)."""

    device: torch.device
    amp_dtype: torch.dtype | None = None

    @property
    def name(self) -> str:
        """For people: the GPU's name, or "CPU"."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    @property
    def amp_name(self) -> str:
        """`bf16`, `fp16` or `none`, as in the recipe."""
        return {torch.bfloat16: "bf16", torch.float16: "fp16", None: "none"}[self.amp_dtype]


def choose_hardware(config: TrainerConfig, ranks: Ranks) -> Hardware:
    """Resolve `auto` of device and autocast type; without a number, every process takes a GPU of its own.

    Raises:
        MachineError: the device does not exist here.
    """
    device = own_device(config.device, ranks.local)
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


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory so far, MB: of the GPU's tensors, or resident in this process (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return 0.0
    import resource  # exists on Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
