"""Lets flash-linear-attention's kernels run in Triton's CPU interpreter: what they need besides it. Only tests use it.

Its kernels are autotuned, for which there is no benchmark without a GPU (the first configuration is taken), and call `.to` on
the variables of their loops, which are Python integers in the interpreter.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from triton.runtime.autotuner import Autotuner


class _Number(int):
    """A loop variable that accepts `.to(dtype)`, also after arithmetic."""

    def to(self, *_: Any, **__: Any) -> int:
        return int(self)


def _keeping(name: str) -> Any:
    plain = getattr(int, name)

    def operation(self: int, other: Any) -> Any:
        result = plain(self, other)
        return result if result is NotImplemented else _Number(result)

    return operation


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "mod"):
    setattr(_Number, f"__{_name}__", _keeping(f"__{_name}__"))


def _integer(x: Any) -> int:
    return int(x.handle.data.item()) if hasattr(x, "handle") else int(getattr(x, "value", x))


def _range(*bounds: Any) -> Iterator[int]:
    return (_Number(i) for i in range(*map(_integer, bounds)))


def patch_fla() -> None:
    """Call after the package's modules are imported."""
    Autotuner._bench = lambda self, *a, config, **m: [0.0, 0.0, 0.0]
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.") and hasattr(module, "tl"):
            module.range = _range
