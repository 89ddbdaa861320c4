"""What a shard of a row leaves behind in MetaLA: `ops/summary/gated.py` with keys and log decays from the gate logits.

    l = logsigmoid(z) / 16        k = 1 - exp(l)

Only z and v are kept for the backward, which the operator keeps as well. Shapes as in `ops/metala/reference.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops.dispatch import choose, path
from megatron.ops.metala.reference import TAU, decay_and_key
from megatron.ops.precision import in_accumulation_dtype, outside_autocast
from megatron.ops.summary.gated import (
    KeysOf,
    gated_backward,
    gated_forward,
    gated_summary_reference,
    gated_summary_torch,
)


@outside_autocast
class _MetaLASummary(torch.autograd.Function):
    """Forward and backward without a tensor [b, s, h, k] besides the gradients."""

    @staticmethod
    def keys_of(z: Tensor) -> KeysOf:
        """Keys and log decays of a block's logits."""

        def keys(at: slice) -> tuple[Tensor, Tensor]:
            log_decay = F.logsigmoid(in_accumulation_dtype(z[:, at])).div_(TAU)
            return torch.expm1(log_decay).neg_(), log_decay

        return keys

    @staticmethod
    def forward(ctx: Any, z: Tensor, v: Tensor, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        state, decay, right_sums = gated_forward(v, z.shape, _MetaLASummary.keys_of(z), segment_ids)
        ctx.save_for_backward(z, v, segment_ids, decay, right_sums)
        return state, decay

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, v, segment_ids, decay, right_sums = ctx.saved_tensors
        dz, dv = torch.empty_like(z), torch.empty_like(v)
        dtotal = (grads[1] * decay).squeeze(-1)
        keys_of = _MetaLASummary.keys_of(z)
        for at, key, dkey, dl in gated_backward(v, keys_of, segment_ids, right_sums, grads[0], dtotal, dv):
            dl.addcmul_(dkey, key - 1)  # d(1 - exp(l)) / dl = -exp(l) = key - 1
            dz[:, at] = dl.mul_(torch.sigmoid(-in_accumulation_dtype(z[:, at]))).div_(TAU)
        return dz, dv, None


@path("metala.summary", "reference")
def _metala_summary_reference(z: Tensor, v: Tensor, segment_ids: Tensor | None, gate_round: str) -> tuple[Tensor, Tensor]:
    log_decay, key = decay_and_key(z, gate_round)
    return gated_summary_reference(key, v, log_decay, segment_ids)


@path("metala.summary", "triton")
@path("metala.summary", "torch")
def _metala_summary_torch(z: Tensor, v: Tensor, segment_ids: Tensor | None, gate_round: str) -> tuple[Tensor, Tensor]:
    if gate_round == "none":
        return _MetaLASummary.apply(z, v, segment_ids)
    log_decay, key = decay_and_key(z, gate_round)
    return gated_summary_torch(key, v, log_decay, segment_ids)


def metala_summary(
    z: Tensor, v: Tensor, segment_ids: Tensor | None = None, gate_round: str = "none", backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """What a shard leaves behind in `metala`; arguments as the fields of `MetaLAInputs`, results as of `gated_summary`."""
    return choose("metala.summary", backend, z.device)(z, v, segment_ids, gate_round)
