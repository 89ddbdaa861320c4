"""MetaLA on flash-linear-attention's gated-linear-attention kernels (version 0.6.0), when that package is installed.

It has the scan alone: gate and key are formed in front of it and augmentation, norm and output gate behind it by torch. Keys
are stored in the compute dtype there, so bf16 results are coarser than our fused kernels'. Useful as a second opinion on a
GPU, and as what `tools/bench/metala_gpu.py` measures against. Its signature, as of 0.6.0:

    chunk_gla(q, k, v, g, scale, initial_state, output_final_state, ..., cu_seqlens)    [b, t, h, k | v], g = log decay, base e
    initial_state, final state   [rows or sequences, h, k, v] in fp32; with cu_seqlens b is 1 and each sequence has its state
"""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops.dispatch import path
from megatron.ops.metala.inputs import MetaLAInputs
from megatron.ops.metala.reference import decay_and_key, finish_metala
from megatron.ops.precision import in_accumulation_dtype

chunk_gla = importlib.import_module("fla.ops.gla").chunk_gla


def sequences(segment_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Documents [b, t] as fla wants them: boundaries [n + 1] in the rows put one behind the other; each row's first, last
    [b]."""
    b, t = segment_ids.shape
    starts = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
    boundaries = F.pad(starts.reshape(-1).nonzero().squeeze(1), (0, 1), value=b * t)
    last = starts.sum(1).cumsum(0) - 1
    return boundaries, F.pad(last[:-1] + 1, (1, 0)), last


@path("metala", "fla")
def metala_by_fla(x: MetaLAInputs) -> tuple[Tensor, Tensor]:
    """The adapter."""
    log_decay, key = decay_and_key(x.z, x.gate_round, x.mask)
    inputs = [x.q, key.to(x.v.dtype), x.v, log_decay]
    start = None if x.state is None else x.state.float().contiguous()
    b, t = x.q.shape[:2]
    boundaries = last = None
    if x.segment_ids is not None:
        boundaries, first, last = sequences(x.segment_ids)
        inputs = [part.reshape(1, b * t, *part.shape[2:]) for part in inputs]
        if start is not None:
            start = torch.zeros(len(boundaries) - 1, *start.shape[1:], device=start.device).index_copy(0, first, start)
    o, final = chunk_gla(
        *(part.contiguous() for part in inputs),
        scale=x.scale,
        initial_state=start,
        output_final_state=True,
        cu_seqlens=boundaries,
    )
    final = final if last is None else final.index_select(0, last)
    q, v, w = (in_accumulation_dtype(part) for part in (x.q, x.v, x.w))
    y = finish_metala(in_accumulation_dtype(o.reshape(x.v.shape)), q, key, v, x.g, w)
    return y.to(x.v.dtype), final
