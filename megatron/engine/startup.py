"""What a process does once before its engine is built: fast floating point, and no import it will not use."""

from __future__ import annotations

import sys
from typing import Any

import torch

from megatron.engine.cpu import tune_cpu


def prepare_process() -> None:
    """Set the CPU up (`engine/cpu.py`) and leave torch._dynamo out; call before any parallel torch operation.

    OpenMP's threads inherit the floating-point mode.
    """
    tune_cpu()
    skip_dynamo_import()


def skip_dynamo_import() -> None:
    """Keep the optimizer from importing torch._dynamo (1.2 to 3 s per process); recomputation imports it all the same.

    Torch marks a few eager functions as "not to be compiled" and imports its compiler at their first call in order to say so;
    the mark is then cached in the attribute written here. Nothing of an engine is compiled. If torch renames the attribute,
    only the time is lost; if somebody has imported the compiler already, torch's own marks are left alone.
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
