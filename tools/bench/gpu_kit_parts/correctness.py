"""The fused MetaLA operator against the recurrence in fp64, token by token, in three dtypes: outputs, state, gradients.

Exact answers are formed on the CPU. The limits are those of the tests: fp32 2e-5; bf16 6e-3 (output) and 4e-2 (gradients),
which plain rounding to bf16 reaches where a row is nearly constant before its norm.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron.ops.metala import metala
from tools.bench.gpu_kit_parts.part import Part, error

# b, t, h, k, v, gate, documents, mask, initial state
CASES: dict[str, tuple[int, int, int, int, int, float, bool, bool, bool]] = {
    "one token, state": (1, 1, 1, 16, 32, 2, False, False, True),
    "one token, batch": (3, 1, 2, 64, 128, 2, False, False, False),
    "chunk - 1": (1, 63, 2, 64, 128, 4, False, False, True),
    "chunk + 1": (1, 65, 2, 64, 128, 4, False, False, True),
    "documents": (2, 65, 1, 32, 64, 2, True, False, True),
    "k = v": (1, 129, 1, 64, 64, 2, False, False, True),
    "odd v": (1, 45, 1, 64, 200, 2, False, False, True),
    "odd k and v": (2, 47, 2, 20, 36, 0, False, False, True),
    "widest": (1, 137, 1, 128, 256, 4, False, False, True),
    "strong decay": (1, 130, 1, 64, 128, -6, False, False, True),
    "slow decay": (1, 130, 1, 64, 128, 8, False, False, True),
    "extreme decay": (1, 70, 1, 32, 64, -20, False, False, True),
    "parts and documents": (1, 300, 1, 64, 128, 4, True, False, True),
    "parts": (1, 517, 1, 16, 32, 3, False, False, True),
    "left padding": (2, 50, 1, 32, 64, 2, False, True, True),
    "large": (2, 700, 4, 64, 128, 4, True, True, True),
}
_REHEARSED = ("one token, batch", "documents", "left padding")


def _errors(part: Part, name: str, dtype: torch.dtype) -> dict[str, Any]:
    b, t, h, k, v, gate, documents, padded, initial = CASES[name]
    generator = torch.Generator().manual_seed(len(name))

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    q, z, x, g = numbers(b, t, h, k), numbers(b, t, h, k) * 1.5 + gate, numbers(b, t, h, v), numbers(b, t, h, v)
    w, state, up, dfinal = numbers(h, k) * 0.3, numbers(b, h, k, v) * 0.1, numbers(b, t, h, v), numbers(b, h, k, v)
    ids = (torch.rand(b, t, generator=generator) < 0.06).cumsum(1) if documents else None
    mask = (torch.arange(t) >= torch.arange(b)[:, None] * 7).long() if padded else None
    found = []
    for exact in (True, False):
        device, form = ("cpu", torch.float64) if exact else (part.device, dtype)
        # both start from the numbers as `dtype` holds them
        leaves = [p.to(dtype).to(device, form).requires_grad_() for p in (q, z, x, g, w)]
        leaves += [state.to(device, form if exact else torch.float32).requires_grad_()] if initial else []
        y, final = metala(
            *leaves[:5],
            state=leaves[5] if initial else None,
            segment_ids=None if ids is None else ids.to(device),
            mask=None if mask is None else mask.to(device),
            backend="reference" if exact else "triton",
        )
        seen = 1.0 if mask is None else mask[..., None, None].to(y.device, y.dtype)
        total = (y * up.to(y.device, y.dtype) * seen).sum() + (final * dfinal.to(final.device, final.dtype)).sum()
        found.append([y * seen, final, *torch.autograd.grad(total, leaves)])
    names = ("y", "final", "dq", "dz", "dv", "dg", "dw", "dstate")
    return {"dtype": str(dtype).removeprefix("torch."), **{n: error(a, b) for n, b, a in zip(names, *found, strict=False)}}


def run(part: Part) -> None:
    """A row per case, in the dtype that the name of the part ends with."""
    dtype = (
        torch.float32
        if part.rehearse
        else {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[part.name.partition("-")[2]]
    )
    for name in _REHEARSED if part.rehearse else CASES:
        part.row(name, _errors, part, name, dtype)
