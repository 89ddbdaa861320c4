"""One token of the MetaLA operator: plain step, and the step that overwrites its state."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops.dispatch import choose, path
from megatron.ops.metala.reference import decay_and_key, finish_metala
from megatron.ops.precision import in_accumulation_dtype, outside_autocast


@outside_autocast
def metala_step(
    q: Tensor, z: Tensor, v: Tensor, g: Tensor, w: Tensor, state: Tensor, gate_round: str = "none"
) -> tuple[Tensor, Tensor]:
    """One token: q, z [b, h, k]; v, g [b, h, v]; state [b, h, k, v]. Returns y [b, h, v] and the new state."""
    log_decay, key = decay_and_key(z, gate_round)
    qw, vw = in_accumulation_dtype(q), in_accumulation_dtype(v)
    new = torch.addcmul(key.unsqueeze(-1) * vw.unsqueeze(-2), log_decay.exp().unsqueeze(-1), state)
    o = (qw.unsqueeze(-2) @ new).squeeze(-2) * q.shape[-1] ** -0.5
    return finish_metala(o, qw, key, vw, g, in_accumulation_dtype(w)).to(v.dtype), new


@path("metala.step", "reference")
@path("metala.step", "torch")
def metala_step_torch(
    q: Tensor, z: Tensor, v: Tensor, g: Tensor, w: Tensor, state: Tensor, slots: Tensor | None = None, gate_round: str = "none"
) -> Tensor:
    """The plain form of `metala_step_`."""
    y, new = metala_step(q, z, v, g, w, state if slots is None else state[slots], gate_round)
    if slots is None:
        state.copy_(new)
    else:
        state[slots] = new
    return y


def metala_step_(
    q: Tensor,
    z: Tensor,
    v: Tensor,
    g: Tensor,
    w: Tensor,
    state: Tensor,
    *,
    slots: Tensor | None = None,
    gate_round: str = "none",
    backend: str = "auto",
) -> Tensor:
    """`metala_step` with `state [slots, h, k, v]` (fp32) overwritten; slots [b]: whose row each batch row's state is."""
    return choose("metala.step", backend, q.device)(q, z, v, g, w, state, slots, gate_round)
