"""Optimizer steps of whole models: tokens per second, share of the matrix-product rate (MFU), memory, the dearest kernels."""

from __future__ import annotations

import time
from typing import Any

import torch

from tools.bench.gpu_kit_parts.kernels import profiled
from tools.bench.gpu_kit_parts.models import Trainee, backend_of, model_config
from tools.bench.gpu_kit_parts.part import Part


def _steps(part: Part, mixer: str, size: str, backend: str, micro_batch: int, steps: int) -> dict[str, Any]:
    """Steps on the clock of the host: what launches cost counts here."""
    length = 24 if part.rehearse else 2048
    if part.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainee = Trainee(part.device, model_config(mixer, size, part.rehearse), length)
    trainee.use("torch" if backend == "torch" else backend_of(part, mixer))
    losses = [trainee.step(micro_batch) for _ in range(2)]  # compiles
    begin = time.perf_counter()
    losses += [trainee.step(micro_batch) for _ in range(steps)]
    seconds = (time.perf_counter() - begin) / steps
    flops = trainee.matmul_flops_per_token()
    rate = flops * micro_batch * length / seconds
    product = part.fact("product", "tflop_per_s")
    row = {
        "micro_batch": micro_batch, "length": length, "step_ms": seconds * 1e3, "tokens_per_s": micro_batch * length / seconds,
        "matmul_flops_per_token": flops, "of_989_tflop_per_s": rate / 989e12, "losses": losses,
        "of_measured_product": rate / (product * 1e12) if product else None,
    }  # fmt: skip
    if part.device == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row | {"kernels": profiled(lambda: trainee.step(micro_batch), 1 if part.rehearse else 2, part.device)[:25]}


def run(part: Part) -> None:
    """Rows `mixer size backend`."""
    cases = [
        ("metala", "1.3B", "auto", 8), ("hybrid", "1.3B", "auto", 8), ("metala", "380M", "auto", 16),
        ("mamba", "380M", "auto", 8), ("global", "1.3B", "auto", 8), ("metala", "1.3B", "torch", 8),
    ]  # fmt: skip
    for mixer, size, backend, micro_batch in cases:
        b, steps = (1, 1) if part.rehearse or part.warming else (micro_batch, 8)
        part.row(f"{mixer} {size} {backend}", _steps, part, mixer, size, backend, b, steps)
