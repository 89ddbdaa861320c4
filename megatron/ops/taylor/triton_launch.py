"""Runs the Triton kernels of Taylor linear attention on tensors: shapes, strides, grids, formats of products and states."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.ops.kernel_arguments import device_guard, token_rows, token_stride
from megatron.ops.taylor import triton_backward_kernels as backward_kernels
from megatron.ops.taylor import triton_kernels as kernels
from megatron.ops.taylor.features import feature_count
from megatron.ops.taylor.inputs import TaylorInputs
from megatron.ops.taylor.operator import TAYLOR_EPS
from megatron.ops.tuning import TaylorTiles, padded, taylor_cut

WIDEST_VALUE, WIDEST_FEATURE = 128, 32


class Form(NamedTuple):
    """What the format of a model decides: that of products and of numerators at chunk borders, and how fp32 is multiplied."""

    name: str
    products: torch.dtype
    triton: tl.dtype
    precision: str


# An fp16 model multiplies in tf32, which has fp16's precision and fp32's range: scores of 30 x 30 x 16 squared and sums over a
# text leave fp16's. fp32 takes three tf32 products each, an error of about 1e-6.
FORMS = {
    torch.float32: Form("fp32", torch.float32, tl.float32, "tf32x3"),
    torch.bfloat16: Form("bf16", torch.bfloat16, tl.bfloat16, "tf32"),
    torch.float16: Form("fp16", torch.float32, tl.float32, "tf32"),
}


def _dense(x: Tensor | None) -> Tensor | None:
    """x in fp32 without gaps."""
    return None if x is None else x.float().contiguous()


def fits(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels take heads of these widths in this format."""
    return v.dtype in FORMS and v.shape[-1] <= WIDEST_VALUE and q.shape[-1] <= WIDEST_FEATURE


class Inputs(TaylorInputs):
    """`TaylorInputs` with dense heads and evenly spaced tokens; optional inputs in fp32, document numbers in int32."""

    @classmethod
    def of(cls, *inputs: Any) -> Inputs:
        """From the fields of `TaylorInputs`; copied or converted where layout and format are not as the kernels need them."""
        x = TaylorInputs(*inputs)
        q, k, v = token_rows(x.q), token_rows(x.k), token_rows(x.v)
        ids = None if x.segment_ids is None else x.segment_ids.to(torch.int32).contiguous()
        return cls(q, k, v, _dense(x.keep), _dense(x.log_decay), ids, _dense(x.state), x.divide)

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """b, t, h, f, e, v."""
        b, t, h, f = self.q.shape
        return b, t, h, f, feature_count(f), self.v.shape[-1]

    @property
    def form(self) -> Form:
        """What the format of the model decides."""
        return FORMS[self.v.dtype]

    @property
    def tiles(self) -> TaylorTiles:
        """Tuned tile sizes for this width and dtype."""
        return taylor_cut(self.v.shape[-1], self.form.name)

    @property
    def decay_stride(self) -> int:
        """Elements between the log decays of two rows of the batch, 0 where all have the same."""
        return 0 if self.log_decay is None or self.log_decay.shape[0] == 1 else self.log_decay.stride(0)

    def flags(self) -> dict[str, bool]:
        """Which optional inputs there are."""
        given = {"HAS_KEEP": self.keep, "HAS_DECAY": self.log_decay, "HAS_SEG": self.segment_ids}
        return {name: x is not None for name, x in given.items()}

    def constants(self, rows: int) -> dict[str, Any]:
        """What the kernels with matrix products are specialised on; `rows` features at a time."""
        _, _, _, f, e, v = self.sizes
        widths = {"F": f, "V": v, "E": e, "BF": padded(f), "BE": rows, "BV": padded(v), "C": self.tiles.chunk}
        return {**widths, "DT": self.form.triton, "PREC": self.form.precision, **self.flags()}


def _wide(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _walk(
    x: Inputs, rows: Tensor, values: Tensor, counts: Tensor | None, first: Tensor | None, end: Tensor, back: bool, store: bool
) -> tuple[Tensor, Tensor]:
    """Numerators [b, n, h, e, v] and denominators [b, n, h, e] at the borders of chunks; fills `end` [b, h, e, v + 1]."""
    b, t, h, _, e, v = x.sizes
    tiles = x.tiles
    chunks = -(-t // tiles.chunk) if store else 0
    numerators = torch.empty(b, chunks, h, e, v, dtype=x.form.products, device=x.v.device)
    denominators = _wide(x.v, b, chunks, h, e)
    constants = x.constants(tiles.walk_rows) | {"BV": min(padded(v), tiles.walk_columns)}
    if back:
        constants["HAS_KEEP"] = False
    programs = triton.cdiv(e, constants["BE"]) * triton.cdiv(v, constants["BV"]) * b * h
    kernels.walk[(programs,)](
        rows, values, counts, x.log_decay, x.segment_ids, first, numerators, denominators, end,
        token_stride(rows), token_stride(values), x.decay_stride, t, h,
        **constants, HAS_FIRST=first is not None, BACK=back, STORE=store,
        num_warps=tiles.walk_warps, num_stages=tiles.stages,
    )  # fmt: skip
    return numerators, denominators


def forward(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """y [b, t, h, v] (without `divide` sums [b, t, h, v + 1] in fp32), the last state, and denominators [b, t, h]."""
    b, t, h, _, _, _ = x.sizes
    y, final = x.empty_results()
    below = _wide(x.v, b, t, h) if x.divide else _wide(x.v, 0)
    if y.numel() == 0:
        return y, final.zero_() if x.state is None else final.copy_(x.state), below
    tiles = x.tiles
    with device_guard(x.v):
        numerators, denominators = _walk(x, x.k, x.v, x.keep, x.state, final, back=False, store=True)
        kernels.output[(numerators.shape[1] * b * h,)](
            x.q, x.k, x.v, x.keep, x.log_decay, x.segment_ids, numerators, denominators, y, below,
            token_stride(x.q), token_stride(x.k), token_stride(x.v), x.decay_stride, TAYLOR_EPS, t, h,
            **x.constants(tiles.rows), DIVIDE=x.divide, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return y, final, below


def end_state(x: Inputs) -> Tensor:
    """The last state alone, [b, h, e, v + 1] in fp32, from an empty one; x.q is not read."""
    b, _, h, _, e, v = x.sizes
    final = _wide(x.v, b, h, e, v + 1)
    if x.v.numel() == 0:
        return final.zero_()
    with device_guard(x.v):
        _walk(x, x.k, x.v, x.keep, None, final, back=False, store=False)
    return final


def end_state_backward(x: Inputs, dfinal: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of k and v (dense, in their formats) from that of `end_state`."""
    b, t, h, _, _, _ = x.sizes
    dk, dv = (torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in (x.k, x.v))
    if x.v.numel() == 0:
        return dk.zero_(), dv
    tiles = x.tiles
    constants = x.constants(tiles.back_rows)
    constants = {name: value for name, value in constants.items() if name not in ("HAS_DECAY", "HAS_SEG")}
    with device_guard(x.v):
        backward_kernels.state_backward[(triton.cdiv(t, tiles.chunk) * b * h,)](
            x.k, x.v, x.keep, _dense(dfinal), dk, dv, token_stride(x.k), token_stride(x.v), t, h,
            **constants, num_warps=tiles.back_warps, num_stages=tiles.stages,
        )  # fmt: skip
    return dk, dv


def _sums_backward(x: Inputs, dy: Tensor, y: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the numerators [b, t, h, v] (in the format of products) and of the denominators [b, t, h] from that of y."""
    b, t, h, _, _, v = x.sizes
    form = x.form.products
    if not x.divide:
        return dy[..., :v].to(form).contiguous(), dy[..., v].float().contiguous()
    dy = token_rows(dy)
    dn, dd = torch.empty(x.v.shape, dtype=form, device=x.v.device), _wide(x.v, b, t, h)
    count, rows = b * t * h, max(1, 4096 // padded(v))
    backward_kernels.division_backward[(triton.cdiv(count, rows),)](
        dy, y, below, dn, dd, token_stride(dy), TAYLOR_EPS, count, h, V=v, BV=padded(v), ROWS=rows, num_warps=4
    )
    return dn, dd


def backward(x: Inputs, dy: Tensor, dfinal: Tensor | None, y: Tensor, below: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v (dense, in their formats) and of the initial state (fp32); y and `below` as `forward` gave them."""
    b, t, h, _, e, v = x.sizes
    dq, dk, dv = (torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in (x.q, x.k, x.v))
    dstate = _wide(x.v, b, h, e, v + 1)
    if x.v.numel() == 0:
        return dq.zero_(), dk.zero_(), dv, dstate.zero_() if dfinal is None else dstate.copy_(dfinal)
    tiles = x.tiles
    with device_guard(x.v):
        dn, dd = _sums_backward(x, dy, y, below)
        states = _walk(x, x.k, x.v, x.keep, x.state, torch.empty_like(dstate), back=False, store=True)
        dstates = _walk(x, x.q, dn, dd, _dense(dfinal), dstate, back=True, store=True)
        backward_kernels.input_backward[(states[0].shape[1] * b * h,)](
            x.q, x.k, x.v, x.keep, x.log_decay, x.segment_ids, dn, dd, *states, *dstates, dq, dk, dv,
            token_stride(x.q), token_stride(x.k), token_stride(x.v), x.decay_stride, t, h,
            **x.constants(tiles.back_rows), num_warps=tiles.back_warps, num_stages=tiles.stages,
        )  # fmt: skip
    return dq, dk, dv, dstate
