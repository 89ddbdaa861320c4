"""Setup of a process before its engine is built: fast floating point, and no unnecessary imports."""

from __future__ import annotations

import sys
from typing import Any

import torch

from megatron.engine.cpu import tune_cpu


def prepare_process() -> None:
    """Set the CPU up (`engine/cpu.py`) and avoid the import of torch._dynamo; call before any parallel torch operation.

    OpenMP's threads inherit the floating-point mode.
    """
    tune_cpu()
    skip_dynamo_import()


def skip_dynamo_import() -> None:
    """Keep the optimizer from importing torch._dynamo (1.2 to 3 s per process); recomputation imports it anyway.

    Torch marks a few eager functions as "not to be compiled" and imports its compiler for that at their first
    call; the mark is then cached in the attribute that is set here. Engines do not compile anything. If torch renames the
    attribute, only the time is lost; if the compiler has already been imported, torch's own marks are not changed.
    """
    if "torch._dynamo" in sys.modules:
        return
    marked: tuple[Any, ...] = (
        torch.optim.Optimizer.add_param_group,
        torch.optim.Optimizer.zero_grad,
        torch.optim.Optimizer.state_dict,
        torch.optim.Optimizer.load_state_dict,
    )
    for function in marked:
        inner = getattr(function, "__wrapped__", None)
        if inner is not None:
            inner.__dynamo_disable = inner
