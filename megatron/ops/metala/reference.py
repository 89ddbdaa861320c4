"""The MetaLA operator: gate, key, decay, scan, self-augmentation, per-head norm and output gate token by token.

From query q, gate logits z, values v and output-gate logits g of all heads (MetaLA, arXiv 2411.10741, as its released code
computes it; w is the self-augmentation vector):

    l = logsigmoid(z) / 16        key = 1 - exp(l)        S_t = diag(exp(l_t)) S_{t-1} + key_t^T v_t
    r_t = dk^-1/2 q_t S_t  +  sigmoid( (sum_i q_i key_i w_i) v_t )          q is NOT scaled in the second term
    y_t = SiLU(g_t) * LayerNorm_head(r_t)                                   no weight, no bias, eps 1e-5

Gate and key are formed in fp32 and the key as -expm1(l): in half precision 1 - exp(l) cancels to zero for most slow
channels. `gate_round` reproduces the rounding of the originals, to score released checkpoints as they were published.

Shapes: q, z [b, s, h, k]; v, g, y [b, s, h, v]; w [h, k]; state [b, h, k, v] in fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops.dispatch import path
from megatron.ops.metala.inputs import MetaLAInputs
from megatron.ops.precision import in_accumulation_dtype
from megatron.ops.scan.operator import scan_recurrent

TAU = 16.0
EPS = 1e-5
_ROUND = {"bf16": torch.bfloat16, "fp16": torch.float16}


def decay_and_key(z: Tensor, gate_round: str = "none", mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log decay l and key 1 - exp(l) from gate logits `z [b, s, h, k]`, in fp32 (or fp64); both 0 where `mask [b, s]` is."""
    if gate_round == "none":
        log_decay = F.logsigmoid(in_accumulation_dtype(z)) / TAU
        key = -torch.expm1(log_decay)
    else:
        half = _ROUND[gate_round]
        rounded = F.logsigmoid(z.to(half)) / TAU
        log_decay, key = in_accumulation_dtype(rounded), in_accumulation_dtype(1 - torch.exp(rounded))
    if mask is None:
        return log_decay, key
    keep = mask[..., None, None].to(key.dtype)
    return log_decay * keep, key * keep


def finish_metala(o: Tensor, q: Tensor, key: Tensor, v: Tensor, g: Tensor, w: Tensor) -> Tensor:
    """Self-augmentation, per-head norm and output gate on top of the scan's output."""
    amount = (q * key * w).sum(-1, keepdim=True)
    r = o + torch.sigmoid(amount * v)
    normed = F.layer_norm(r, r.shape[-1:], eps=EPS)
    return normed * F.silu(in_accumulation_dtype(g))


@path("metala", "reference")
def metala_reference(x: MetaLAInputs) -> tuple[Tensor, Tensor]:
    """The formulas above, token by token."""
    log_decay, key = decay_and_key(x.z, x.gate_round, x.mask)
    q, v, w = in_accumulation_dtype(x.q), in_accumulation_dtype(x.v), in_accumulation_dtype(x.w)
    o, final = scan_recurrent(q, key, v, log_decay, scale=x.scale, state=x.state, segment_ids=x.segment_ids)
    return finish_metala(o, q, key, v, x.g, w).to(x.v.dtype), final
