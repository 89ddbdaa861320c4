"""One token of Taylor linear attention: plain step, and the step that overwrites its state."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops.dispatch import choose, path
from megatron.ops.precision import in_accumulation_dtype, outside_autocast
from megatron.ops.taylor.features import TaylorMap, features_by_definition
from megatron.ops.taylor.operator import normalised, values_and_one


@outside_autocast
def taylor_step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One token: q, k [b, h, f]; v [b, h, v]; state [b, h, e, v + 1]; log_decay [h]. Returns y [b, h, v] and the new state."""
    scale = q.shape[-1] ** -0.25
    features = features_by_definition if torch.compiler.is_compiling() else TaylorMap.apply
    phi_q, phi_k = (features(in_accumulation_dtype(x) * scale) for x in (q, k))
    if log_decay is not None:
        fall = log_decay.to(state.dtype).exp()[:, None, None]
        state = state * torch.cat([fall.expand(-1, 1, v.shape[-1]), torch.ones_like(fall)], -1)
    new = torch.addcmul(state, phi_k.unsqueeze(-1), values_and_one(v, None).unsqueeze(-2))
    return normalised((phi_q.unsqueeze(-2) @ new).squeeze(-2)).to(v.dtype), new


@path("taylor.step", "reference")
@path("taylor.step", "torch")
def taylor_step_torch(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor | None = None, slots: Tensor | None = None
) -> Tensor:
    """The plain form of `taylor_step_`."""
    y, new = taylor_step(q, k, v, state if slots is None else state[slots], log_decay)
    if slots is None:
        state.copy_(new)
    else:
        state[slots] = new
    return y


def taylor_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    log_decay: Tensor | None = None,
    *,
    slots: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`taylor_step` with `state [slots, h, e, v + 1]` overwritten; slots [b]: whose row each batch row's state is."""
    return choose("taylor.step", backend, q.device)(q, k, v, state, log_decay, slots)
