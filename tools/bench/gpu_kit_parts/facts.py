"""Versions, the device, and the two ceilings that everything else is measured against: copy bandwidth and product rate."""

from __future__ import annotations

import inspect
import platform
import subprocess
from typing import Any

import torch
import triton

from tools.bench.gpu_kit_parts.part import Part


def _device() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
    return {
        "device": torch.cuda.get_device_name(),
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": properties.L2_cache_size / 2**20,
        "nvidia_smi": subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout.strip(),
    }


def _attention() -> dict[str, Any]:
    from torch.nn.attention import varlen

    return {"varlen_attn": str(inspect.signature(varlen.varlen_attn))}


def run(part: Part) -> None:
    """Rows: versions, device, attention, copy, product."""
    part.row(
        "versions", lambda: {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    )
    part.row("device", lambda: {"device": platform.machine()} if part.rehearse else _device())
    part.row("attention", _attention)
    size, side = (1 << 16, 64) if part.rehearse else (1 << 30, 8192)
    source = torch.empty(size, dtype=torch.uint8, device=part.device)
    target = torch.empty_like(source)
    part.row("copy", lambda: {"tb_per_s": 2 * size / part.ms(lambda: target.copy_(source)) / 1e9})
    a = part.random(side, side)
    part.row("product", lambda: {"tflop_per_s": 2 * side**3 / part.ms(lambda: a @ a) / 1e9})
