"""Which device trains and in which number format."""

import sys
from dataclasses import dataclass

import torch

from rsseg.config import TrainerConfig
from rsseg.errors import MachineError
from rsseg.training.distributed import Ranks


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


def choose_device(wanted: str, *, local_rank: int = 0) -> torch.device:
    """`auto` takes this process's GPU if there is one, else the CPU.

    Raises:
        MachineError: the wanted device does not exist here.
    """
    available = torch.cuda.is_available()
    if wanted == "auto":
        wanted = "cuda" if available else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise MachineError(f"device {wanted!r} is unknown. Use auto, cpu, cuda or cuda:N.") from None
    if device.type != "cuda":
        return device
    index = local_rank if device.index is None else device.index
    count = torch.cuda.device_count() if available else 0
    if index >= count:
        raise MachineError(f"device cuda:{index} is not here; torch sees {count} GPUs. Use --device cpu or another.")
    return torch.device("cuda", index)


def choose_hardware(config: TrainerConfig, ranks: Ranks) -> Hardware:
    """Resolve `auto` of device and autocast type.

    Raises:
        MachineError: device or number format do not exist here.
    """
    device = choose_device(config.device, local_rank=ranks.local)
    match config.amp_dtype:
        case "none":
            return Hardware(device)
        case "fp16":
            return Hardware(device, torch.float16)
        case "bf16":
            return Hardware(device, torch.bfloat16)
        case "auto":
            return Hardware(device, torch.bfloat16 if computes_bf16(device) else None)


def computes_bf16(device: torch.device) -> bool:
    """True where bfloat16 runs on units of its own instead of being emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # Asked by kernel name, since torch's own question is private on the CPU.
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:  # noqa: PTH123 - a device file
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory so far, MB: of the GPU's tensors, or resident in this process (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return 0.0
    import resource  # exists on Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
