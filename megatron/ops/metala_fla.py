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
from megatron.ops.metala import decay_and_key, finish_metala, wide

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
def metala_by_fla(
    q: Tensor,
    z: Tensor,
    v: Tensor,
    g: Tensor,
    w: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    segment_ids: Tensor | None,
    gate_round: str,
) -> tuple[Tensor, Tensor]:
    """The adapter; arguments and results as `metala` in `ops/metala.py`."""
    log_decay, key = decay_and_key(z, gate_round, mask)
    given = [q, key.to(v.dtype), v, log_decay]
    start = None if state is None else state.float().contiguous()
    b, t = q.shape[:2]
    boundaries = last = None
    if segment_ids is not None:
        boundaries, first, last = sequences(segment_ids)
        given = [x.reshape(1, b * t, *x.shape[2:]) for x in given]
        if start is not None:
            start = torch.zeros(len(boundaries) - 1, *start.shape[1:], device=q.device).index_copy(0, first, start)
    o, final = chunk_gla(
        *(x.contiguous() for x in given),
        scale=q.shape[-1] ** -0.5,
        initial_state=start,
        output_final_state=True,
        cu_seqlens=boundaries,
    )
    final = final if last is None else final.index_select(0, last)
    y = finish_metala(wide(o.reshape(v.shape)), wide(q), key, wide(v), g, wide(w))
    return y.to(v.dtype), final
