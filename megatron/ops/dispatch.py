"""Which path of an operator runs, and why: reference | torch | triton | fla, with one override.

An operator registers its paths here under its name; `choose` picks one from the override (`kernel_backend` in the YAML) and
the device. The choice is logged once per operator and reason, so that a run says what it computes with.
"""

from __future__ import annotations

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


def choose(op: str, asked: str, device: torch.device) -> Callable[..., Any]:
    """The path of `op` to run on `device`.

    `auto` takes the fused kernel on a GPU where one is registered and the chunked torch form elsewhere.

    Raises:
        ValueError: the path asked for does not exist for this operator.
    """
    paths = _paths[op]
    if asked == "auto":
        name = "triton" if device.type == "cuda" and "triton" in paths else "torch"
        why = f"automatic choice on {device.type}"
    else:
        name, why = asked, "asked for by kernel_backend"
    if name not in paths:
        raise ValueError(f"kernel_backend '{name}' has no path for operator '{op}'; it has {', '.join(sorted(paths))}")
    if (op, name) not in _said:
        _said.add((op, name))
        logging.getLogger("megatron").info("operator %s: %s path (%s)", op, name, why)
    return paths[name]
