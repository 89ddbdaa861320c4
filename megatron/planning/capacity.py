"""How much memory one rank of this machine has, for the verdict of `--dry-run`."""

from __future__ import annotations

import torch

from megatron.planning.dry_run import DeviceLimits

_GIB = 2**30


def limits(device_memory: float | None, tflops: float | None, mfu: float, ranks_here: int) -> DeviceLimits:
    """What was asked for, else this machine's accelerator, else a share of its memory, which is no verdict about others.

    Args:
        device_memory: GiB of one rank, of `--device-memory`. tflops: peak of one device. ranks_here: processes that share a
        CPU's memory.
    """
    if device_memory:
        return DeviceLimits(device_memory, "--device-memory", True, tflops, mfu)
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        return DeviceLimits(device.total_memory / _GIB, device.name, True, tflops, mfu)
    share = _total_memory() / max(1, ranks_here)
    said = f"this machine's memory over {ranks_here} rank{'s' if ranks_here > 1 else ''}; --device-memory GIB plans for another"
    return DeviceLimits(share / _GIB, said, False, tflops, mfu)


def _total_memory() -> float:
    with open("/proc/meminfo", encoding="ascii") as file:
        return float(file.readline().split()[1]) * 1024
