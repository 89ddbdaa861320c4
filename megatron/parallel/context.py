"""Context parallelism: every row is split into contiguous shards, one per rank; mixers exchange states and halos, not tokens.

`ContextParallel` is the `ContextShard` of `layers/base.py` that communicates. What a linear-attention layer needs from the left
is its recurrent state and a few tokens, so a message does not grow with the sequence (LASP-2, arXiv 2502.07563, gathers the
states of linear attention in the same way). A shard that starts from an empty state leaves A behind and shrinks what comes in
by D, so the state before shard r is S_r = D_(r-1) S_(r-1) + A_(r-1), an exclusive scan over the ranks; its backward is the same
scan from the other end. Two exchanges compute it:

    all_gather  one collective, folded locally: (P - 1)(|A| + |D|) elements sent forward, (P - 1)|A| backward
    scan        log2 P rounds of point-to-point messages: (1 + ceil(log2 P))(|A| + |D|) in either direction

Documents need no message: every rank holds the segment ids of the whole row, from which two factors per rank follow. `enters`
is 1 if the token before the shard belongs to the document of its first token, `through` if in addition the shard is a single
document. Both are computed without a device synchronisation, once per micro batch.

Every rank builds the same graph: the first one receives zeros, never None. Under activation recomputation a rank with a shorter
graph would stop before a collective for which the others wait.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import P2POp, ProcessGroup, irecv, isend

from megatron.ops.precision import in_accumulation_dtype, outside_autocast

EXCHANGES = ("all_gather", "scan")


class ContextParallel:
    """This rank's shard of every row of a micro batch; see `ContextShard` in `layers/base.py` for the methods.

    Attributes:
        offset: tokens of the row before the shard.
        enters: see the head of this file, [P, b]; None for ones. `enters_reversed`: as seen from the right.
        through: as `enters`.
    """

    def __init__(
        self,
        group: ProcessGroup | None,
        rank: int,
        size: int,
        rows: int,
        length: int,
        segment_ids: Tensor | None = None,
        exchange: str = "all_gather",
        device: torch.device | str | None = None,
    ) -> None:
        """A shard of `rows` rows.

        Args:
            group: the context-parallel group; None is the default group.
            rank: rank in the group.
            size: ranks of the group.
            rows: rows of the micro batch, b.
            length: tokens per row and rank, s.
            segment_ids: document numbers of the whole row, [b, size * length]; None without document masking.
            exchange: all_gather | scan.
            device: of the hidden states; None is that of `segment_ids`.

        Raises:
            ValueError: an unknown exchange, or segment ids that are not those of the whole row.
        """
        if exchange not in EXCHANGES:
            raise ValueError(f"the exchange of states is one of {', '.join(EXCHANGES)}, got {exchange!r}")
        if segment_ids is not None and tuple(segment_ids.shape) != (rows, size * length):
            raise ValueError(f"segment_ids must be [{rows}, {size * length}], the whole row, got {tuple(segment_ids.shape)}")
        self.group, self.rank, self.size, self.length, self.exchange = group, rank, size, length, exchange
        self.offset = rank * length
        self.device = device if device is not None or segment_ids is None else segment_ids.device
        self.segment_ids = None if segment_ids is None else segment_ids.to(self.device, non_blocking=True)
        self.enters, self.through = self._factors(reverse=False)
        self.enters_reversed, self.through_reversed = self._factors(reverse=True)

    def _factors(self, reverse: bool) -> tuple[Tensor | None, Tensor | None]:
        """`enters` and `through` of every rank, [P, b] of 0 and 1, as seen from the left or from the right; None: all 1."""
        if self.segment_ids is None:
            return None, None
        shards = self.segment_ids.unflatten(1, (self.size, self.length))
        first, last = shards[:, :, 0].t(), shards[:, :, -1].t()
        joined = (first[1:] == last[:-1]).float()  # of shards r - 1 and r
        border = torch.zeros_like(joined[:1]) if self.size > 1 else torch.zeros_like(first, dtype=torch.float32)
        enters = torch.cat([joined, border] if reverse else [border, joined])
        return enters, enters * (first == last)

    def carry(self, state: Tensor, decay: Tensor | None = None, *, matrix: bool = False, reverse: bool = False) -> Tensor:
        """The state before the first token of this shard (`reverse`: behind its last token, from the right)."""
        state = in_accumulation_dtype(state).contiguous()
        decay = None if decay is None else decay.to(state.dtype).contiguous()
        return _Carry.apply(state, decay, self, matrix and decay is not None, reverse)

    def halo(self, x: Tensor, n: int) -> Tensor:
        """The last `n` tokens before this shard, [b, n, ...]; zeros where they are of another document or do not exist."""
        if not 0 < n <= self.length:
            raise ValueError(f"a halo of {n} tokens needs a shard of at least as many; it has {self.length}")
        return _Halo.apply(x, n, self)

    def halo_places(self, n: int, rows: int) -> Tensor:
        """Position in the row of each token of the halo, [b, n]; -1 where it is not visible."""
        places, hidden = (
            torch.arange(self.offset - n, self.offset, device=self.device).expand(rows, n),
            self.halo_hidden(n, rows),
        )
        return places if hidden is None else places.masked_fill(hidden, -1)

    def halo_hidden(self, n: int, rows: int) -> Tensor | None:
        """[b, n], True where a token of the halo is not visible; None if all are."""
        if self.rank == 0:
            return torch.ones(rows, n, dtype=torch.bool, device=self.device)
        if self.segment_ids is None:
            return None
        return self.segment_ids[:, self.offset - n : self.offset] != self.segment_ids[:, self.offset : self.offset + 1]

    def to_heads(self, x: Tensor) -> Tensor:
        """All heads of the shard's tokens [b, s, h, k] -> all tokens of the row for h / P heads, [b, S, h / P, k]."""
        if x.shape[2] % self.size:
            raise ValueError(f"{x.shape[2]} heads cannot be divided among {self.size} context-parallel ranks")
        return _AllToAll.apply(x, self, True)

    def to_tokens(self, x: Tensor) -> Tensor:
        """The inverse of `to_heads`: [b, S, h / P, k] -> [b, s, h, k]."""
        return _AllToAll.apply(x, self, False)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over the shards, on every rank."""
        return _Sum.apply(x, self)

    # The messages: every one of them involves all ranks of the group, which call them in the same order.

    def all_gather(self, x: Tensor) -> Tensor:
        """[n] of each rank -> [P, n], in the order of the shards."""
        gathered = x.new_empty(self.size, *x.shape)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
        gather(gathered.flatten(0, 1), x, group=self.group)
        return gathered

    def shift(self, x: Tensor, by: int) -> Tensor:
        """The contiguous `x` of rank - `by`; zeros on ranks that have no such neighbour."""
        received, messages = torch.zeros_like(x), []
        if 0 <= self.rank + by < self.size:
            messages.append(P2POp(isend, x, self._global(self.rank + by), self.group))
        if 0 <= self.rank - by < self.size:
            messages.append(P2POp(irecv, received, self._global(self.rank - by), self.group))
        for work in dist.batch_isend_irecv(messages) if messages else []:
            work.wait()
        return received

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


def _per_row(factors: Tensor, x: Tensor) -> Tensor:
    """Factors [..., b] in x's dtype, with the dimensions of x [..., b, *] behind."""
    return factors.to(x.dtype).reshape(*factors.shape, *[1] * (x.dim() - factors.dim()))


def _act(factor: Tensor | None, state: Tensor, matrix: bool) -> Tensor:
    """A shard's total decay applied to a state: a factor, or a matrix [.., k, k] from the left."""
    if factor is None:
        return state
    return factor @ state if matrix else factor * state


def _fold(values: Tensor, factors: Tensor | None, matrix: bool) -> Tensor:
    """sum_i F_0 ... F_(i-1) x_i over the shards at distance i = 0, 1, ...

    Args:
        values: x, [n, b, *]; zeros result from n = 0.
        factors: F, [n, b, *], broadcast against `values`; None for ones.
        matrix: factors are matrices [n, b, h, k, k], which multiply from the left.
    """
    if factors is None:
        return values.sum(0)
    if not matrix:
        weights = torch.cat([torch.ones_like(factors[:1]), factors[:-1]]).cumprod(0)
        return (weights * values).sum(0)
    total = torch.zeros_like(values[0]) if len(values) else values.sum(0)
    for x, factor in zip(values.flip(0), factors.flip(0), strict=True):
        total = x + factor @ total
    return total


@outside_autocast
class _Carry(torch.autograd.Function):
    """O_r = T_r O_(r-1) + A_r over the ranks with T = through D; returns enters_r O_(r-1)."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, decay: Tensor | None, shard: ContextParallel, matrix: bool, reverse: bool) -> Tensor:
        enters = shard.enters_reversed if reverse else shard.enters
        through = shard.through_reversed if reverse else shard.through
        factors = None
        if shard.exchange == "scan":
            before = _scan(shard, state, _total(decay, through, shard.rank, state), matrix, -1 if reverse else 1)
        else:
            states, factors = _gathered(shard, state, decay, through, matrix)
            before = _fold(*_ordered(states, factors, shard.rank, left=not reverse), matrix)
        incoming = before if enters is None else before * _per_row(enters[shard.rank], before)
        ctx.save_for_backward(incoming if decay is not None else None, decay, factors, enters, through)
        ctx.settings = shard, matrix, reverse
        return incoming

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        incoming, decay, factors, enters, through = ctx.saved_tensors
        shard, matrix, reverse = ctx.settings
        grad = grads[0].contiguous()
        own = grad if enters is None else grad * _per_row(enters[shard.rank], grad)
        total = _total(decay, through, shard.rank, grad)
        if shard.exchange == "scan":
            total = total.transpose(-1, -2) if matrix and total is not None else total
            after = _scan(shard, own, total, matrix, 1 if reverse else -1)
        else:
            gathered = shard.all_gather(own.flatten()).unflatten(1, own.shape)
            factors = factors.transpose(-1, -2) if matrix and factors is not None else factors
            after = _fold(*_ordered(gathered, factors, shard.rank, left=reverse), matrix)
        if decay is None:
            return after, None, None, None, None
        dstate = after if through is None else after * _per_row(through[shard.rank], after)
        ddecay = dstate @ incoming.transpose(-1, -2) if matrix else (dstate * incoming).sum_to_size(decay.shape)
        return after, ddecay, None, None, None


def _total(decay: Tensor | None, through: Tensor | None, rank: int, state: Tensor) -> Tensor | None:
    """T of one rank, which broadcasts against its state; None for 1."""
    if through is None:
        return decay
    factor = _per_row(through[rank], state)
    return factor if decay is None else decay * factor


def _gathered(
    shard: ContextParallel, state: Tensor, decay: Tensor | None, through: Tensor | None, matrix: bool
) -> tuple[Tensor, Tensor | None]:
    """A and T of all ranks, [P, b, *]; states and decays travel in one message."""
    if decay is None:
        states = shard.all_gather(state.flatten()).unflatten(1, state.shape)
        return states, None if through is None else _per_row(through, states)
    gathered = shard.all_gather(torch.cat([state.flatten(), decay.flatten()]))
    states = gathered[:, : state.numel()].unflatten(1, state.shape)
    decays = gathered[:, state.numel() :].unflatten(1, decay.shape)
    return states, decays.clone() if through is None else decays * _per_row(through, decays)


def _ordered(values: Tensor, factors: Tensor | None, rank: int, left: bool) -> tuple[Tensor, Tensor | None]:
    """What the shards on one side of `rank` hold, nearest first."""
    if left:
        return values[:rank].flip(0), None if factors is None else factors[:rank].flip(0)
    return values[rank + 1 :], None if factors is None else factors[rank + 1 :]


def _scan(shard: ContextParallel, value: Tensor, factor: Tensor | None, matrix: bool, way: int) -> Tensor:
    """Exclusive scan of (T, A) over the ranks in direction `way`, in log2 P rounds: what all ranks before leave behind."""
    shape, step = value.shape, 1
    while step < shard.size:
        if factor is None:
            value = value + shard.shift(value.contiguous(), way * step)
        else:
            # a rank without a neighbour receives zeros: nothing comes in, and its factor is not used again
            flat = shard.shift(torch.cat([value.flatten(), factor.flatten()]), way * step)
            value = value + _act(factor, flat[: value.numel()].view(shape), matrix)
            factor = _act(factor, flat[value.numel() :].view(factor.shape), matrix)
        step *= 2
    return shard.shift(value.contiguous(), way)


@outside_autocast
class _Halo(torch.autograd.Function):
    """The left neighbour's last tokens; their gradient travels back and is added to those tokens'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int, shard: ContextParallel) -> Tensor:
        ctx.n, ctx.shard, ctx.shape = n, shard, x.shape
        return _visible(shard, shard.shift(x[:, x.shape[1] - n :].contiguous(), 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        received = ctx.shard.shift(_visible(ctx.shard, grads[0]).contiguous(), -1)
        dx = received.new_zeros(ctx.shape)
        dx[:, dx.shape[1] - ctx.n :] = received
        return dx, None, None


def _visible(shard: ContextParallel, x: Tensor) -> Tensor:
    """A halo [b, n, ...] with zeros where it is hidden."""
    hidden = shard.halo_hidden(x.shape[1], x.shape[0])
    return x if hidden is None else x.masked_fill(hidden.to(x.device).reshape(*hidden.shape, *[1] * (x.dim() - 2)), 0)


@outside_autocast
class _AllToAll(torch.autograd.Function):
    """Between "all heads of my tokens" and "all tokens of my heads"; the backward is the opposite exchange."""

    @staticmethod
    def exchange(x: Tensor, shard: ContextParallel, to_heads: bool) -> Tensor:
        """One all-to-all; blocks of heads or of tokens are put outermost for it."""
        blocks = x.unflatten(2, (shard.size, -1)).movedim(2, 0) if to_heads else x.unflatten(1, (shard.size, -1)).movedim(1, 0)
        blocks = blocks.contiguous()
        received = torch.empty_like(blocks)
        dist.all_to_all_single(received, blocks, group=shard.group)
        return received.movedim(0, 1).flatten(1, 2) if to_heads else received.movedim(0, 2).flatten(2, 3)

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: ContextParallel, to_heads: bool) -> Tensor:
        ctx.shard, ctx.to_heads = shard, to_heads
        return _AllToAll.exchange(x, shard, to_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _AllToAll.exchange(grads[0], ctx.shard, not ctx.to_heads), None, None


@outside_autocast
class _Sum(torch.autograd.Function):
    """All-reduce in both directions: every rank's result depends on every rank's input."""

    @staticmethod
    def total(x: Tensor, shard: ContextParallel) -> Tensor:
        """The sum in a new tensor."""
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=shard.group)
        return out

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: ContextParallel) -> Tensor:
        ctx.shard = shard
        return _Sum.total(x, shard)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Sum.total(grads[0], ctx.shard), None
