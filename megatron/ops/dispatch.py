"""Which path of an operator runs, and why: reference | torch | triton | fla, with one override.

An operator registers its paths here under its name; `chosen` picks one from the override (`kernel_backend` in the YAML) and
the device. Operators `x`, `x.y` and `x.z` share the folder `ops/x/`: their fused paths are in `ops/x/triton.py`, the adapter of
`x` to flash-linear-attention in `ops/x/fla.py`. Both are imported when a GPU or the override selects them and may be absent (a
packed folder, a machine without the package).
The choice is logged once per operator, so that the log of a run names its kernels. `torch.compile` treats it as a constant.
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
_logged: set[tuple[str, str]] = set()
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
    """Name of the optional module that defines the `backend` path of `op`."""
    return f"megatron.ops.{op.partition('.')[0]}.{backend}"


def _missing(op: str, backend: str) -> str:
    """Import the optional module of a path; returns why the path is unavailable, or an empty string."""
    if backend not in ("triton", "fla") or backend in _paths[op]:
        return ""
    if (op, backend) not in _absent:
        # A packed folder has its own registry, which the modules of an installed trainer do not fill.
        _absent[op, backend] = f"no {backend} path in this copy"
        try:
            importlib.import_module(_path_module(op, backend))
        except ImportError as error:
            _absent[op, backend] = f"no {backend} path here: {error}"
    return "" if backend in _paths[op] else _absent[op, backend]


def _has_adapter(op: str) -> bool:
    """Whether operator `op` has an adapter to flash-linear-attention."""
    try:
        return "." not in op and importlib.util.find_spec(_path_module(op, "fla")) is not None
    except ImportError:
        return False


def _constant_when_compiled(function: Callable[..., str]) -> Callable[..., str]:
    """`torch.compiler.assume_constant_result` without importing the compiler, which costs every process seconds at its start.

    A graph cannot contain imports or logging; their result is the same in every pass.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_when_compiled
def chosen(op: str, requested: str, device: torch.device) -> str:
    """Name of the path of `op` to run on `device`.

    `auto` selects the fused kernel on a GPU if there is one, else the chunked torch form. `fla` applies to the operators of the
    package; for the others it is the same as `auto`.

    Raises:
        ValueError: the requested path does not exist for this operator, or is unavailable here.
    """
    automatic = requested == "auto" or (requested == "fla" and not _has_adapter(op))
    name = ("triton" if device.type == "cuda" else "torch") if automatic else requested
    why = f"automatic choice on {device.type}" if automatic else "asked for by kernel_backend"
    missing = _missing(op, name)
    if automatic and missing:
        name, why = "torch", missing
    if name not in _paths[op]:
        known = ", ".join(sorted(_paths[op]))
        raise ValueError(
            f"kernel_backend '{name}' has no path for operator '{op}'; it has {known}" + (f" ({missing})" if missing else "")
        )
    if (op, name) not in _logged:
        _logged.add((op, name))
        logging.getLogger("megatron").info("operator %s: %s path (%s)", op, name, why)
    return name


def choose(op: str, requested: str, device: torch.device) -> Callable[..., Any]:
    """The path of `op` to run on `device`; see `chosen`."""
    return _paths[op][chosen(op, requested, device)]
