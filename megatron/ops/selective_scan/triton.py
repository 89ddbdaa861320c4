"""The selective scan on a GPU: custom operators that `torch.compile` keeps in its graph, and the decode step in place.

The backward recomputes the states from those before every chunk, which the forward stores: a number per state, channel and 64
tokens. Inputs may be views of a packed projection (B and C are): each token's row must be dense, rows may be strided.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from megatron.ops.dispatch import path
from megatron.ops.kernel_arguments import check_in_place, device_guard, fit, token_rows, token_stride
from megatron.ops.precision import outside_autocast
from megatron.ops.selective_scan import triton_gate as triton_gate  # registers its paths
from megatron.ops.selective_scan import triton_kernels as kernels
from megatron.ops.selective_scan.operator import same_as_before, selective_scan_chunked, selective_step_torch

CHUNK = 64
"""Tokens between two stored states."""
MOST_STATES = 64
"""Largest number of states per channel in a warp; with more the scan takes the plain path."""
_FULL, _PARTS = 1024, 32
"""Programs, of one warp each, that fill a GPU; largest number of parts that a sequence is split into."""


def layout(n: int, d: int) -> dict[str, int]:
    """Layout of the tile of states [n, channels] in a warp: see `triton_kernels.py`.

    Args:
        n: states per channel.
        d: channels.
    """
    width = max(4, triton.next_power_of_2(n))
    if width > MOST_STATES:
        raise ValueError(f"the fused selective scan takes up to {MOST_STATES} states per channel, not {n}")
    lanes = 8 if width == 64 else 4  # of a channel: a thread has eight states, the backward spills with sixteen
    channels = max(1, min(32 // width, 4)) if d > 8 else 1
    return {"RN": width // lanes, "RC": channels, "LN": lanes, "LC": 32 // lanes}


def parts_for(programs: int, chunks: int) -> int:
    """How many parts a sequence of `chunks` is split into if `programs` would process whole sequences."""
    return max(1, min(_FULL // max(programs, 1), chunks // 4, _PARTS))


class _Launch:
    """Sizes, strides and constants that all kernels of a call share."""

    def __init__(self, u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, segment_ids: Tensor | None) -> None:
        self.u, self.dt = token_rows(u), token_rows(dt)
        # the programs of all channels read the same rows: cast once here instead of in each program
        self.b, self.c = b.float().contiguous(), c.float().contiguous()
        self.a = a.contiguous()
        self.batch, self.length, self.d = u.shape
        self.n = a.shape[1]
        self.same = None if segment_ids is None else same_as_before(segment_ids).float().contiguous()
        self.tile = layout(self.n, self.d)
        self.blocks = triton.cdiv(self.d, self.tile["RC"] * self.tile["LC"])
        self.programs = self.batch * self.blocks
        self.chunks = triton.cdiv(self.length, CHUNK)
        self.per = max(1, triton.cdiv(self.chunks, parts_for(self.programs, self.chunks)))
        self.parts = triton.cdiv(self.chunks, self.per)
        self.constants: dict[str, Any] = self.tile | {
            "N": self.n, "CHUNK": CHUNK, "HAS_SEG": segment_ids is not None, "num_warps": 1,
        }  # fmt: skip

    def empty(self, *shape: int) -> Tensor:
        """fp32 on the inputs' device."""
        return torch.empty(*shape, dtype=torch.float32, device=self.u.device)

    def states(self, count: int) -> Tensor:
        """Buffer for `count` states of all channels."""
        return self.empty(count, self.batch, self.d, self.n)

    def strides(self, *tensors: Tensor) -> tuple[int, ...]:
        """Elements from one token to the next."""
        return tuple(token_stride(x) for x in tensors)


@torch.library.custom_op("linear_neox::selective_scan_forward", mutates_args=())
def scan_forward(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None, segment_ids: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y [b, t, d] and the last state [b, d, n] in fp32; with `keep` also the states before every chunk, [b, chunks, d, n]."""
    x = _Launch(u, dt, a, b, c, segment_ids)
    y, last = x.empty(*u.shape), x.states(1)[0]
    chunk_states = x.empty(x.batch, x.chunks, x.d, x.n) if keep else x.empty(0)
    if not y.numel():
        return y, torch.zeros_like(last) if state is None else last.copy_(state), chunk_states
    ends, factors = (x.states(x.parts), x.states(x.parts)) if x.parts > 1 else (None, None)
    with device_guard(u):
        if x.parts > 1:
            kernels.part_ends[(x.programs, x.parts - 1)](
                x.u, x.dt, x.a, x.b, x.same, ends, factors, x.length, x.d, *x.strides(x.u, x.dt, x.b), x.per, **x.constants
            )
        kernels.scan_forward[(x.programs, x.parts)](
            x.u, x.dt, x.a, x.b, x.c, x.same, state, ends, factors, y, chunk_states, last,
            x.length, x.d, *x.strides(x.u, x.dt, x.b, x.c), x.per, x.parts,
            HAS_H0=state is not None, KEEP=keep, SPLIT=x.parts > 1, **x.constants,
        )  # fmt: skip
    return y, last, chunk_states


@scan_forward.register_fake
def _(u: Any, dt: Any, a: Any, b: Any, c: Any, state: Any, segment_ids: Any, keep: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = {"dtype": torch.float32, "device": u.device}
    last = torch.empty(u.shape[0], *a.shape, **wide)
    chunks = (u.shape[1] + CHUNK - 1) // CHUNK
    chunk_states = torch.empty(u.shape[0], chunks, *a.shape, **wide) if keep else torch.empty(0, **wide)
    return torch.empty(u.shape, **wide), last, chunk_states


@torch.library.custom_op("linear_neox::selective_scan_backward", mutates_args=())
def scan_backward(
    dy: Tensor,
    dlast: Tensor | None,
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    segment_ids: Tensor | None,
    chunk_states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, a, b, c (dense, in their dtypes) and of the initial state (fp32)."""
    x = _Launch(u, dt, a, b, c, segment_ids)
    dy = token_rows(dy)
    du, ddt = (torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in (u, dt))
    da, dstate = x.states(x.parts), x.states(1)[0]
    db, dc = (x.empty(x.blocks, x.batch, x.length, x.n) for _ in range(2))
    if not u.numel():
        zeros = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in (a, b, c)]
        return du, ddt, zeros[0], zeros[1], zeros[2], torch.zeros_like(dstate) if dlast is None else dstate.copy_(dlast)
    ends, factors = (x.states(x.parts), x.states(x.parts)) if x.parts > 1 else (None, None)
    tile = 32 * x.tile["RN"] * x.tile["RC"]
    scratch = x.empty(x.programs * x.parts * (CHUNK // 4) * tile)
    with device_guard(u):
        if x.parts > 1:
            kernels.part_gradients[(x.programs, x.parts - 1)](
                dy, x.dt, x.a, x.c, x.same, ends, factors, x.length, x.d, *x.strides(dy, x.dt, x.c), x.per, **x.constants
            )
        kernels.scan_backward[(x.programs, x.parts)](
            dy, None if dlast is None else dlast.contiguous(), x.u, x.dt, x.a, x.b, x.c, x.same, chunk_states, ends, factors,
            scratch, du, ddt, da, db, dc, dstate,
            x.length, x.d, *x.strides(dy, x.u, x.dt, x.b, x.c), x.per, x.parts,
            HAS_LAST=dlast is not None, SPLIT=x.parts > 1, **x.constants,
        )  # fmt: skip
    return du, ddt, da.sum((0, 1)).to(a.dtype), db.sum(0).to(b.dtype), dc.sum(0).to(c.dtype), dstate


@scan_backward.register_fake
def _(dy: Any, dlast: Any, u: Any, dt: Any, a: Any, b: Any, c: Any, segment_ids: Any, chunk_states: Any) -> Any:
    like = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (u, dt, a, b, c)]
    return (*like, torch.empty(u.shape[0], *a.shape, dtype=torch.float32, device=u.device))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    u, dt, a, b, c, state, segment_ids, _ = inputs
    ctx.save_for_backward(u, dt, a, b, c, segment_ids, output[2])
    ctx.has_state = state is not None
    ctx.set_materialize_grads(False)


@outside_autocast
def _gradient(ctx: Any, dy: Tensor | None, dlast: Tensor | None, dchunk_states: Tensor | None) -> Any:
    u, dt, a, b, c, segment_ids, chunk_states = ctx.saved_tensors
    dy = torch.zeros(u.shape, dtype=torch.float32, device=u.device) if dy is None else dy
    *gradients, dstate = scan_backward(dy, dlast, u, dt, a, b, c, segment_ids, chunk_states)
    return *gradients, dstate if ctx.has_state else None, None, None


scan_forward.register_autograd(_gradient, setup_context=_setup)


@path("selective_scan", "triton")
def selective_scan_fused(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The fused path; arguments as `selective_scan` in `ops/selective_scan/operator.py`. fp64, and more states per channel than
    the kernels take, take the plain path."""
    if u.dtype == torch.float64 or a.shape[1] > MOST_STATES:
        return selective_scan_chunked(u, dt, a, b, c, state, segment_ids)
    (rows, t, d), n = u.shape, a.shape[1]
    dt, a, b, c = fit(dt, rows, t, d), fit(a, d, n), fit(b, rows, t, n), fit(c, rows, t, n)
    state, segment_ids = fit(state, rows, d, n, dense=True, dtype=torch.float32), fit(segment_ids, rows, t)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (u, dt, a, b, c, state))
    y, last, _ = scan_forward(u, dt, a, b, c, state, segment_ids, keep)
    return y, last


def step_channels(n: int) -> int:
    """Channels per program of the step: 1,024 states or more."""
    return max(8, 1024 // int(triton.next_power_of_2(n)))


@path("selective_scan.step", "triton")
def selective_step_in_place(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, slots: Tensor | None = None
) -> Tensor:
    """One token per row; the state is updated in place.

    Args:
        u: [b, d].
        dt: step sizes, [b, d].
        a: rates, [d, n].
        b: [b, n].
        c: [b, n].
        state: fp32 [slots, d, n], each row dense; fp64 for fp64, which takes the plain path.
        slots: int [b], the row of `state` that belongs to each batch row; None means row i for row i.

    Returns:
        y [b, d] in fp32 (fp64).

    Raises:
        ValueError: the state is not an fp32 tensor of this shape on this device with dense rows, or `slots` does not fit.
    """
    if u.dtype == torch.float64:
        return selective_step_torch(u, dt, a, b, c, state, slots)
    rows, d = u.shape
    n = a.shape[1]
    check_in_place(state, (d, n), torch.float32, u, slots)
    u, dt, b, c = (x if x.stride(1) == 1 else x.contiguous() for x in (u, dt, b, c))
    y = torch.empty(rows, d, dtype=torch.float32, device=u.device)
    if y.numel():
        block = step_channels(n)
        with device_guard(u):
            kernels.scan_step[(rows, triton.cdiv(d, block))](
                u, dt, a.contiguous(), b, c, state, slots, y,
                d, u.stride(0), dt.stride(0), b.stride(0), c.stride(0), state.stride(0),
                N=n, BN=triton.next_power_of_2(n), BD=block, HAS_SLOTS=slots is not None, num_warps=4,
            )  # fmt: skip
    return y
