"""Summary of gated linear attention: the state that a shard leaves behind, and its total decay.

    A = sum_t (exp(a_t) k_t)^T v_t        D = exp(l_1 + ... + l_s)        a_t = l_{t+1} + ... + l_s

All factors are relative to the end and therefore at most 1: one matrix product over all tokens, and nothing can overflow. The
hand-written backward keeps the inputs only and recomputes the factors, block by block:

    dk_t = exp(a_t) (dA v_t)      dv_t = (exp(a_t) k_t) dA      dl_t = dD D + sum_{j<t} dk_j k_j

`gated_forward` and `gated_backward` are for mixers whose keys and log decays are functions of something else: they ask for
them block by block (`ops/metala/summary.py`).

Shapes: k, l [b, s, h, k] with l <= 0, v [b, s, h, v], A [b, h, k, v], D [b, h, k, 1]; A and D in fp32 (fp64 for fp64).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops.dispatch import choose, path
from megatron.ops.opaque import unvisited_like, visited
from megatron.ops.precision import in_accumulation_dtype, outside_autocast, sum_dtype
from megatron.ops.scan.operator import scan_recurrent
from megatron.ops.summary.suffix import exclusive_sums, last_document, runs_from_the_right

_BLOCK_TOKENS = {"cpu": 256}
"""Tokens of a block: intermediates that fit a CPU's cache, or a bounded share of a GPU's memory."""

KeysOf = Callable[[slice], tuple[Tensor, Tensor]]
"""Tokens of a block -> its keys and log decays [b, c, h, k] in the accumulation dtype."""


def _block_runs(x: Tensor) -> list[slice]:
    return runs_from_the_right(x.shape[1], _BLOCK_TOKENS.get(x.device.type, 16384))


def _decay_behind(log_decay: Tensor, behind: Tensor, last: Tensor | None, at: slice) -> tuple[Tensor, Tensor]:
    """exp(a) [b, c, h, k] of a block, 0 in earlier documents, and the block's sum of log decays [b, h, k].

    Args:
        log_decay: of the block.
        behind: sum of log decays to its right, [b, h, k].
        last: see `last_document`.
        at: the block's tokens.
    """
    sums, total = exclusive_sums(log_decay.flatten(2), behind=True)
    factor = sums.unflatten(2, log_decay.shape[2:]).add_(behind.unsqueeze(1)).exp_()
    if last is not None:
        factor *= last[:, at, None, None]
    return factor, total.unflatten(1, log_decay.shape[2:])


def gated_forward(v: Tensor, shape: torch.Size, keys_of: KeysOf, segment_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """A, D, and the sums of log decays to the right of every block [n, b, h, k]; `shape` is that of the keys."""
    b, _, h, k = shape
    wide = sum_dtype(v.dtype)
    state = torch.zeros(b, h, k, v.shape[-1], dtype=wide, device=v.device)
    behind, right_sums = torch.zeros(b, h, k, dtype=wide, device=v.device), []
    last, runs = last_document(segment_ids, wide), _block_runs(v)
    for place, at in enumerate(visited(runs, v)):
        key, log_decay = keys_of(at)
        right_sums.append(behind.unsqueeze(0))
        factor, total = _decay_behind(log_decay, behind, last, at)
        state += (factor.mul_(key)).permute(0, 2, 3, 1) @ in_accumulation_dtype(v[:, at]).transpose(1, 2)
        behind = behind + total
        if place == 1:
            right_sums += unvisited_like(runs, [behind])
    return state, behind.exp().unsqueeze(-1), torch.cat(right_sums)


def gated_backward(
    v: Tensor, keys_of: KeysOf, segment_ids: Tensor | None, right_sums: Tensor, dstate: Tensor, dtotal: Tensor, dv: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Write dv, and yield of every block its tokens, keys, and the gradients of its keys and log decays.

    Args:
        v: values.
        keys_of: keys and log decays of a block.
        segment_ids: document numbers of the shard.
        right_sums: see `gated_forward`.
        dstate: gradient of A.
        dtotal: gradient of the sum of all log decays, [b, h, k].
        dv: buffer for the gradient of v.
    """
    last, before = last_document(segment_ids, dstate.dtype), dtotal
    runs = _block_runs(v)
    for number in reversed(visited(range(len(runs)), v)):
        at = runs[number]
        key, log_decay = keys_of(at)
        factor, _ = _decay_behind(log_decay, right_sums[number], last, at)
        dv[:, at] = ((factor * key).transpose(1, 2) @ dstate).transpose(1, 2)
        dkey = (in_accumulation_dtype(v[:, at]).transpose(1, 2) @ dstate.transpose(-1, -2)).transpose(1, 2).mul(factor)
        sums, total = exclusive_sums((dkey * key).flatten(2), behind=False)
        yield at, key, dkey, sums.unflatten(2, key.shape[2:]).add_(before.unsqueeze(1))
        before = before + total.unflatten(1, key.shape[2:])


@outside_autocast
class _GatedSummary(torch.autograd.Function):
    """From keys and log decays."""

    @staticmethod
    def keys_of(key: Tensor, log_decay: Tensor) -> KeysOf:
        """Slices of both."""
        return lambda at: (in_accumulation_dtype(key[:, at]), in_accumulation_dtype(log_decay[:, at]))

    @staticmethod
    def forward(ctx: Any, key: Tensor, v: Tensor, log_decay: Tensor, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        state, decay, right_sums = gated_forward(v, key.shape, _GatedSummary.keys_of(key, log_decay), segment_ids)
        ctx.save_for_backward(key, v, log_decay, segment_ids, decay, right_sums)
        return state, decay

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        key, v, log_decay, segment_ids, decay, right_sums = ctx.saved_tensors
        dkey, dv, dl = torch.empty_like(key), torch.empty_like(v), torch.empty_like(log_decay)
        dtotal = (grads[1] * decay).squeeze(-1)
        keys_of = _GatedSummary.keys_of(key, log_decay)
        for at, _, dkey_block, dl_block in gated_backward(v, keys_of, segment_ids, right_sums, grads[0], dtotal, dv):
            dkey[:, at], dl[:, at] = dkey_block, dl_block
        return dkey, dv, dl, None


@path("scan.summary", "reference")
def gated_summary_reference(key: Tensor, v: Tensor, log_decay: Tensor, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """The recurrence, by autograd."""
    key, v = in_accumulation_dtype(key), in_accumulation_dtype(v)
    _, state = scan_recurrent(key, key, v, log_decay, scale=1.0, segment_ids=segment_ids)
    return state, log_decay.sum(1).exp().unsqueeze(-1)


@path("scan.summary", "torch")
def gated_summary_torch(key: Tensor, v: Tensor, log_decay: Tensor, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """The blocks of this file."""
    return _GatedSummary.apply(key, v, log_decay, segment_ids)


def gated_summary(
    key: Tensor, v: Tensor, log_decay: Tensor, segment_ids: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """What a shard leaves behind in `gated_scan`; see the head of this file.

    Args:
        key: [b, s, h, k].
        v: [b, s, h, v].
        log_decay: [b, s, h, k], or [b, s, h, 1] for one rate per head.
        segment_ids: document numbers of the shard, [b, s]; None without document masking.
        backend: as in `gated_scan`.

    Returns:
        A [b, h, k, v] and D [b, h, k, 1].
    """
    log_decay = log_decay.to(sum_dtype(key.dtype)).expand(*key.shape)
    return choose("scan.summary", backend, key.device)(key, v, log_decay, segment_ids)
