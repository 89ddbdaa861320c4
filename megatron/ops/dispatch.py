"""Which path of an operator runs, and why: reference | torch | triton | fla, with one override.

An operator registers its paths here under its name; `chosen` picks one from the override (`kernel_backend` in the YAML) and
the device. Operators `x`, `x.y` and `x.z` share the folder `ops/x/`: their fused paths are in `ops/x/triton.py`, the adapter of
`x` to flash-linear-attention in `ops/x/fla.py`. Both are imported when a GPU or the override asks for them and may be absent (a
packed folder, a machine without the package).
The choice is logged once per operator and reason, so that a run says what it computes with. A compiler takes it for a constant.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch

BACKENDS = ("auto", "reference", "torch", "triton", "fla")
_paths: dict[str, dict[str, Callable[..., Any]]] = {}
_said: set[tuple[str, str]] = set()
_absent: dict[tuple[str, str], str] = {}


def path(op: str, backend: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: register a function as the `backend` path of operator `op`."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        paths = _paths.setdefault(op, {})
        if backend in paths:
            raise ValueError(f"operator {op} has two paths called {backend}")
        paths[backend] = function
        return function

    return add


def _path_module(op: str, backend: str) -> str:
    """Where the `backend` path of `op` is defined, when it is not always there."""
    return f"megatron.ops.{op.partition('.')[0]}.{backend}"


def _missing(op: str, backend: str) -> str:
    """Import the module of a path that is not always there; the reason why there is none, empty when there is."""
    if backend not in ("triton", "fla") or backend in _paths[op]:
        return ""
    if (op, backend) not in _absent:
        # A packed folder has tables of its own, which the trainer's modules, where they are installed too, do not fill.
        _absent[op, backend] = f"no {backend} path in this copy"
        try:
            importlib.import_module(_path_module(op, backend))
        except ImportError as error:
            _absent[op, backend] = f"no {backend} path here: {error}"
    return "" if backend in _paths[op] else _absent[op, backend]


def _has_adapter(op: str) -> bool:
    """Whether operator `op` was ever meant to run on flash-linear-attention."""
    try:
        return "." not in op and importlib.util.find_spec(_path_module(op, "fla")) is not None
    except ImportError:
        return False


def _constant_when_compiled(function: Callable[..., str]) -> Callable[..., str]:
    """`torch.compiler.assume_constant_result` without importing the compiler, which costs every process seconds at its start.

    A graph can hold no import and no log line; what they lead to is the same in every pass.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_when_compiled
def chosen(op: str, asked: str, device: torch.device) -> str:
    """Name of the path of `op` to run on `device`.

    `auto` takes the fused kernel on a GPU where there is one and the chunked torch form elsewhere. `fla` is about the operators
    that the package has; the others are chosen as by `auto`.

    Raises:
        ValueError: the path asked for does not exist for this operator, or cannot be used here.
    """
    automatic = asked == "auto" or (asked == "fla" and not _has_adapter(op))
    name = ("triton" if device.type == "cuda" else "torch") if automatic else asked
    why = f"automatic choice on {device.type}" if automatic else "asked for by kernel_backend"
    missing = _missing(op, name)
    if automatic and missing:
        name, why = "torch", missing
    if name not in _paths[op]:
        known = ", ".join(sorted(_paths[op]))
        raise ValueError(
            f"kernel_backend '{name}' has no path for operator '{op}'; it has {known}" + (f" ({missing})" if missing else "")
        )
    if (op, name) not in _said:
        _said.add((op, name))
        logging.getLogger("megatron").info("operator %s: %s path (%s)", op, name, why)
    return name


def choose(op: str, asked: str, device: torch.device) -> Callable[..., Any]:
    """The path of `op` to run on `device`; see `chosen`."""
    return _paths[op][chosen(op, asked, device)]
