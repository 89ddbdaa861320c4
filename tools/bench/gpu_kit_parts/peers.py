"""flash-linear-attention 0.6.0 around the same operator, its glue eager or compiled, in a process of its own.

Its tuner tries hundreds of configurations at the first call of a shape: minutes. Here each kernel keeps at most `_TRIED` of
them, spread over its list, and the row says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton

from tools.bench.gpu_kit_parts.part import Part

_TRIED = 8
_tune = triton.autotune


def _prune(part: Part) -> None:
    """Let `triton.autotune` try every n-th of its likely configurations; a process that compiles ahead has only its own."""

    def fewer(configs: list[Any], *args: Any, **kwargs: Any) -> Any:
        likely = [c for c in configs if c.num_warps in (2, 4, 8) and c.num_stages in (2, 3)] or configs
        tried = likely[:: -(-len(likely) // _TRIED)]
        return _tune(tried if part.warming is None else [tried[part.warming[0] % len(tried)]], *args, **kwargs)

    triton.autotune = fewer


def _times(part: Part, run: Callable[..., Any], packed: torch.Tensor, w: torch.Tensor) -> dict[str, Any]:
    row: dict[str, Any] = part.forward_and_backward(lambda: run(packed, w), (packed, w))
    return row | {"configurations_tried": f"at most {_TRIED} for each kernel"}


def _based(part: Part, b: int, t: int, h: int, v: int) -> dict[str, Any]:
    from fla.ops.based import parallel_based

    q, k, x = (part.random(b, t, h, n, seed=i).requires_grad_() for i, n in enumerate((16, 16, v)))
    return part.forward_and_backward(lambda: parallel_based(q, k, x), (q, k, x), 10)


def run(part: Part) -> None:
    """A row per variant and shape; ours is measured in the same process, for the ratio."""
    _prune(part)
    part.all_rows = True
    from tools.bench.gpu_kit_parts.glue import by_fla, ours  # imports the peer: not before its tuner is pruned

    if part.rehearse:  # the peer's kernels do not run in the interpreter on a CPU
        part.row("ours 8 heads", _times, part, ours("triton"), *part.metala(1, 20, 1, 16, 32))
        return
    for h in (8, 16):
        shape = part.metala(8, 2048, h, 64, 128)
        variants = {"ours": ours("triton"), "fla + eager glue": by_fla(False), "fla + compiled glue": by_fla(True)}
        if part.warming and part.warming[0]:  # torch.compile of the glue is the same in all of them: one is enough
            del variants["fla + compiled glue"]
        for name, variant in variants.items():
            part.row(f"{name} {h} heads", _times, part, variant, *shape)
        b, t = (4, 8192) if h == 8 else (8, 2048)
        part.row(f"fla parallel_based {b} x {t} x 16 x 64", _based, part, b, t, 16, 64)
