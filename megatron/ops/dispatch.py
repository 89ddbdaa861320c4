"""Which path of an operator runs, and why: reference | torch | triton | fla, with one override.

An operator registers its paths here under its name; `choose` picks one from the override (`kernel_backend` in the YAML) and
the device. The fused path of operator x lives in `ops/x_triton.py`, which is imported when a GPU or the override asks for it
and may be absent (a packed folder, a machine without Triton). The choice is logged once per operator and reason, so that a run
says what it computes with.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch

BACKENDS = ("auto", "reference", "torch", "triton", "fla")
_paths: dict[str, dict[str, Callable[..., Any]]] = {}
_said: set[tuple[str, str]] = set()


def path(op: str, backend: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: register a function as the `backend` path of operator `op`."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        paths = _paths.setdefault(op, {})
        if backend in paths:
            raise ValueError(f"operator {op} has two paths called {backend}")
        paths[backend] = function
        return function

    return add


@functools.cache
def _fused(op: str) -> str:
    """Import the fused path of `op`; the reason why there is none, empty when there is."""
    try:
        importlib.import_module(f"megatron.ops.{op}_triton")
    except ImportError as error:
        return f"no fused kernel here: {error}"
    return ""


def choose(op: str, asked: str, device: torch.device) -> Callable[..., Any]:
    """The path of `op` to run on `device`.

    `auto` takes the fused kernel on a GPU where there is one and the chunked torch form elsewhere.

    Raises:
        ValueError: the path asked for does not exist for this operator.
    """
    paths = _paths[op]
    wanted = ("triton" if device.type == "cuda" else "torch") if asked == "auto" else asked
    missing = _fused(op) if wanted == "triton" else ""
    name, why = wanted, f"automatic choice on {device.type}" if asked == "auto" else "asked for by kernel_backend"
    if asked == "auto" and missing:
        name, why = "torch", missing
    if name not in paths:
        known = ", ".join(sorted(paths))
        raise ValueError(
            f"kernel_backend '{name}' has no path for operator '{op}'; it has {known}" + (f" ({missing})" if missing else "")
        )
    if (op, name) not in _said:
        _said.add((op, name))
        logging.getLogger("megatron").info("operator %s: %s path (%s)", op, name, why)
    return paths[name]
